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
from hamner.chat.context import newest_messages, newest_tokens
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


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """The served model is what answers, with what holds where a request says nothing."""

    generator: Generator
    name: str
    """in the protocol"""
    config: ChatConfig
    """`sampling`, `system` and `max_new_tokens`, which no request exceeds"""
    is_chat: bool
    """whether it was fine-tuned on conversations; a base model only continues texts"""

    def listing(self) -> dict[str, Any]:
        """The listing is the model as the protocol has it, and what a page must know of it."""
        sampling = dataclasses.asdict(self.config.sampling)
        return {
            "id": self.name,
            "object": "model",
            "owned_by": "hamner",
            "kind": "chat" if self.is_chat else "base",
            "context_length": self.generator.context,
            "defaults": {
                **sampling,
                "max_tokens": self.config.max_new_tokens,
                "system": self.config.system or "",
            },
        }


@dataclasses.dataclass
class Reply:
    """A reply is a completion in the form of one endpoint, whole or in pieces."""

    model: str
    completion: Completion
    forgotten: int | None = None
    """how many messages of a conversation, or tokens of a text, were left out to make room; None
    if the request did not allow it"""
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

    def whole(self) -> dict[str, Any]:
        """The body is all of a finished completion."""
        choice = {
            "index": 0,
            **self.content(self.completion.text),
            "finish_reason": self.completion.finish_reason,
            "logprobs": None,
        }
        return self.body(self.whole_kind, [choice], usage=self.usage())

    def piece(
        self, content: dict, finish_reason: str | None = None, **values: Any
    ) -> dict[str, Any]:
        """The body is a part of a streamed completion."""
        choice = {"index": 0, **content, "finish_reason": finish_reason, "logprobs": None}
        return self.body(self.piece_kind, [choice], **values)

    def usage(self) -> dict[str, int]:
        """The numbers are the tokens read and those generated so far."""
        prompt, generated = len(self.completion.prompt), self.completion.num_tokens
        numbers = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }
        return numbers if self.forgotten is None else {**numbers, "forgotten": self.forgotten}

    def content(self, text: str) -> dict[str, Any]:
        """The content is a whole text, as a choice has it."""
        return {"text": text}

    def part(self, text: str) -> dict[str, Any]:
        """The part is a piece of a text, as a choice has it; without text, the last one."""
        return {"text": text}


@dataclasses.dataclass
class ChatReply(Reply):
    """A chat's reply has messages, and when streamed, what is new of one."""

    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    whole_kind: ClassVar[str] = "chat.completion"
    piece_kind: ClassVar[str] = "chat.completion.chunk"
    opening: ClassVar[dict] = {"delta": {"role": "assistant", "content": ""}}

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class _StreamOptions(BaseModel):
    include_usage: bool = False
    """once more, at the end"""
    continuous_usage_stats: bool = False
    """with every piece, as vLLM has it"""


_Stops = list[Annotated[str, Field(min_length=1)]]
Tokens = Annotated[int, Field(ge=1)] | None


class Request(BaseModel):
    """The fields are what is read of any request.

    Top-k, min-p and the repetition penalty go beyond the protocol; `truncation` is that of
    OpenAI's Responses. Whatever name of a model is asked for, the one that is here answers.
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
    truncation: Literal["auto", "disabled"] | None = None
    """"auto" leaves out the oldest of what the context has no room for, else that is an error"""

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
    def usage_in_stream(self) -> _StreamOptions:
        """The property says when a stream has the numbers of tokens."""
        return self.stream_options or _StreamOptions()

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
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Tokens = None

    def asked_tokens(self) -> int | None:
        """The method gives the most tokens that the request allows, if it says so."""
        return self.max_completion_tokens or self.max_tokens

    def reply(self, model: ServedModel, seed: int) -> Reply:
        """The reply is the assistant's next turn, not generated yet.

        Raises:
            ApiError: the messages leave no room for an answer, or the model holds no conversation.
        """
        if not model.is_chat:
            raise ApiError(
                400,
                f"the model {model.name} was not fine-tuned on conversations: it continues texts, "
                "at /v1/completions",
            )
        messages = [message.message() for message in self.messages]
        if model.config.system and messages[0].role != "system":
            messages.insert(0, Message("system", model.config.system))
        if messages[0].role == "system" and not messages[0].content.strip():
            # It asks for none, not even the server's.
            del messages[0]
        settings = self.settings(model.config, seed)
        forgotten = None
        if self.truncation == "auto":
            given = len(messages)
            messages = newest_messages(messages, model.generator, settings["max_new_tokens"])
            forgotten = given - len(messages)
        try:
            completion = answer(model.generator, messages, **settings)
        except ContextError as error:
            raise too_long("messages", str(error)) from error
        return ChatReply(model.name, completion, forgotten)


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

    def reply(self, model: ServedModel, seed: int) -> Reply:
        """The reply continues the prompt, not generated yet; without one, it begins a text.

        Raises:
            ApiError: the prompt leaves no room for a continuation, or has ids of no token.
        """
        generator = model.generator
        tokenizer, prompt = generator.tokenizer, self.prompt
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = ids or [tokenizer.eot_id]
        if not all(0 <= token < tokenizer.vocab_size for token in ids):
            message = f"prompt: token ids are 0 to {tokenizer.vocab_size - 1:,}"
            raise ApiError(400, message, param="prompt")
        settings, forgotten = self.settings(model.config, seed), None
        if self.truncation == "auto":
            given = len(ids)
            ids = newest_tokens(ids, generator, settings["max_new_tokens"])
            forgotten = given - len(ids)
        if len(ids) >= generator.context:
            raise too_long(
                "prompt",
                f"the prompt takes {len(ids):,} tokens, the model's context is "
                f"{generator.context:,}: shorten it",
            )
        # The tokenizer of a base model may lack the tokens of conversations.
        stop_ids = turn_ends(tokenizer) if model.is_chat else {tokenizer.eot_id}
        completion = Completion(generator, ids, stop_ids=stop_ids, **settings)
        return Reply(model.name, completion, forgotten)


def too_long(param: str, message: str) -> ApiError:
    """The error says that a request does not fit the model's context."""
    return ApiError(400, message, param=param, code="context_length_exceeded")
