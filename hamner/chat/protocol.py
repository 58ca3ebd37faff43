"""The module has the requests and replies of OpenAI's protocol: chats, and texts to be continued.

Needs pydantic and Starlette, of the extra `serve`.
"""

import dataclasses
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

from hamner.chat.config import ChatConfig
from hamner.data.chat_template import Message, turn_ends
from hamner.model.generate import Completion, ContextError, Generator, answer
from hamner.model.sampling import Sampling


class ApiError(Exception):
    """The error is what a request gets, in the protocol's form, instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The body is as the official client expects it."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The response has the body, and says when to try again."""
        headers = {"retry-after": "1"} if self.status == 429 else None
        return JSONResponse(self.body(), self.status, headers)


@dataclasses.dataclass
class Reply:
    """A reply is a completion in the form of one endpoint, whole or in pieces."""

    model: str
    id: str = dataclasses.field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    whole_kind: ClassVar[str] = "text_completion"
    piece_kind: ClassVar[str] = "text_completion"
    opening: ClassVar[dict | None] = None
    """what a stream begins with, before the first piece"""

    def body(self, kind: str, choices: list[dict], **values: Any) -> dict[str, Any]:
        """The body has the choices beside what all parts of a reply have in common."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **values}

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The body is all of a finished completion."""
        choice = {
            "index": 0,
            **self.content(completion.text),
            "finish_reason": completion.finish_reason,
            "logprobs": None,
        }
        return self.body(self.whole_kind, [choice], usage=usage(completion))

    def piece(self, content: dict, finish_reason: str | None = None) -> dict[str, Any]:
        """The body is a part of a streamed completion."""
        choice = {"index": 0, **content, "finish_reason": finish_reason, "logprobs": None}
        return self.body(self.piece_kind, [choice])

    def content(self, text: str) -> dict[str, Any]:
        """The content is a whole text, as a choice has it."""
        return {"text": text}

    def part(self, text: str) -> dict[str, Any]:
        """The part is a piece of a text, as a choice has it; without text, the last one."""
        return {"text": text}


class ChatReply(Reply):
    """A chat's reply has messages, and when streamed, what is new of one."""

    whole_kind, piece_kind = "chat.completion", "chat.completion.chunk"
    opening: ClassVar[dict] = {"delta": {"role": "assistant", "content": ""}}

    def __init__(self, model: str) -> None:
        super().__init__(model, id=f"chatcmpl-{uuid.uuid4().hex}")

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def usage(completion: Completion) -> dict[str, int]:
    """The numbers are the tokens read and generated."""
    prompt, generated = len(completion.prompt), completion.num_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class _StreamOptions(BaseModel):
    include_usage: bool = False


_Stops = list[Annotated[str, Field(min_length=1)]]
Tokens = Annotated[int, Field(ge=1)] | None


class Request(BaseModel):
    """The fields are what is read of any request.

    Top-k, min-p and the repetition penalty go beyond the protocol. Whatever name of a model is
    asked for, the one that is here answers.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    UNSUPPORTED: ClassVar[dict[str, Any]] = {
        "n": 1,
        "logit_bias": {},
        "frequency_penalty": 0,
        "presence_penalty": 0,
    }
    """Parameters that would change the answer, and the value that does not: any other is refused
    rather than ignored."""
    reply: ClassVar[type[Reply]] = Reply
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    max_tokens: Tokens = None
    stop: Annotated[_Stops | None, Field(max_length=4), BeforeValidator(_as_list)] = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @classmethod
    def read(cls, body: bytes) -> Self:
        """The method reads a request from its body.

        Raises:
            ApiError: not JSON, not of this form, or it asks for what is not here.
        """
        try:
            request = cls.model_validate_json(body, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            message = f"{where}: {first['msg']}" if where else first["msg"]
            raise ApiError(400, message, param=where or None) from error
        for name, neutral in cls.UNSUPPORTED.items():
            if (request.model_extra or {}).get(name) not in (None, neutral):
                raise ApiError(400, f"{name} is not supported here", param=name)
        return request

    @property
    def with_usage(self) -> bool:
        """The property says whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def asked_tokens(self) -> int | None:
        """The method gives the most tokens that the request allows, if it says so."""
        return self.max_tokens

    def settings(self, config: ChatConfig, seed: int) -> dict[str, Any]:
        """The settings are the request's, and the server's where it says nothing.

        Args:
            config: the server's.
            seed: where the request has none.
        """
        return {
            "sampling": self.sampling(config.sampling),
            "max_new_tokens": min(
                self.asked_tokens() or config.max_new_tokens, config.max_new_tokens
            ),
            "stop_texts": self.stop or (),
            "seed": seed if self.seed is None else self.seed,
        }

    def sampling(self, default: Sampling) -> Sampling:
        """The settings are those of this request, and the server's where it says nothing."""
        asked = {name: getattr(self, name) for name in vars(default)}
        return dataclasses.replace(default, **{n: v for n, v in asked.items() if v is not None})


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_TextPart], BeforeValidator(_as_parts)]

    def message(self) -> Message:
        text = "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatRequest(Request):
    """The request is a conversation, whose next turn is the answer."""

    UNSUPPORTED: ClassVar[dict[str, Any]] = Request.UNSUPPORTED | {
        "tools": [],
        "functions": [],
        "logprobs": False,
        "response_format": {"type": "text"},
    }
    reply: ClassVar[type[Reply]] = ChatReply
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Tokens = None

    def asked_tokens(self) -> int | None:
        """The method gives the most tokens that the request allows, if it says so."""
        return self.max_completion_tokens or self.max_tokens

    def completion(self, generator: Generator, config: ChatConfig, seed: int) -> Completion:
        """The completion is the assistant's next turn, not generated yet.

        Raises:
            ApiError: the messages leave no room for an answer.
        """
        messages = [message.message() for message in self.messages]
        if config.system and messages[0].role != "system":
            messages.insert(0, Message("system", config.system))
        try:
            return answer(generator, messages, **self.settings(config, seed))
        except ContextError as error:
            raise too_long("messages", str(error)) from error


def _one_prompt(prompt: Any) -> Any:
    """The prompt is one text or the ids of its tokens; a list of one of them is the same."""
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if isinstance(prompt, list) and not is_ids and len(prompt) == 1:
        return _one_prompt(prompt[0])
    if not is_ids and not isinstance(prompt, str):
        raise ValueError("must be one text, or the token ids of one")
    return prompt


class CompletionRequest(Request):
    """The request is a text, which is continued."""

    UNSUPPORTED: ClassVar[dict[str, Any]] = Request.UNSUPPORTED | {
        "best_of": 1,
        "echo": False,
        "logprobs": False,
        "suffix": "",
    }
    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]

    def completion(self, generator: Generator, config: ChatConfig, seed: int) -> Completion:
        """The completion continues the prompt, not generated yet; without one, it begins a text.

        Raises:
            ApiError: the prompt leaves no room for a continuation, or has ids of no token.
        """
        tokenizer, prompt = generator.tokenizer, self.prompt
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = ids or [tokenizer.eot_id]
        if not all(0 <= token < tokenizer.vocab_size for token in ids):
            message = f"prompt: token ids are 0 to {tokenizer.vocab_size - 1:,}"
            raise ApiError(400, message, param="prompt")
        if len(ids) >= generator.context:
            raise too_long(
                "prompt",
                f"the prompt takes {len(ids):,} tokens, the model's context is "
                f"{generator.context:,}: shorten it",
            )
        stop_ids = turn_ends(tokenizer)
        return Completion(generator, ids, stop_ids=stop_ids, **self.settings(config, seed))


def too_long(param: str, message: str) -> ApiError:
    """The error says that a request does not fit the model's context."""
    return ApiError(400, message, param=param, code="context_length_exceeded")
