"""The module serves one model by OpenAI's chat-completions protocol on the loopback interface.

    GET  /v1/models
    POST /v1/chat/completions       stream: false or true (server-sent events)

Starlette and uvicorn do the HTTP: chunked bodies, keep-alive, clients that hang up. One answer is
generated at a time, since one saturates the device; the others wait, up to a bound.
"""

import asyncio
import dataclasses
import json
import os
import random
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal

from hamner.errors import UserError

try:
    import uvicorn
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise UserError(
        f"--serve needs the package {error.name}: pip install 'hamner[serve]'"
    ) from error

from hamner.chat.config import ChatConfig
from hamner.data.chat_template import Message
from hamner.model.generate import Completion, ContextError, Generator, answer
from hamner.model.sampling import Sampling

HOST = "127.0.0.1"
MAX_BODY_BYTES = 2**20
BODY_SECONDS = 10.0
"""longest a client may take to send its request"""
MAX_CONNECTIONS = 100
UNSUPPORTED: dict[str, Any] = {
    "n": 1,
    "tools": [],
    "functions": [],
    "logprobs": False,
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
}
"""Parameters of the protocol that would change the answer, and the value that does not: any other
is refused rather than ignored."""


class ApiError(Exception):
    """The error is what a request gets, in the protocol's form, instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        """The response is as the official client expects it."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        headers = {"retry-after": "1"} if self.status == 429 else None
        return JSONResponse({"error": error}, self.status, headers)


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_TextPart], BeforeValidator(_as_parts)]

    def message(self) -> Message:
        text = "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class _StreamOptions(BaseModel):
    include_usage: bool = False


_Stops = list[Annotated[str, Field(min_length=1)]]
_Tokens = Annotated[int, Field(ge=1)] | None


class ChatRequest(BaseModel):
    """The fields are what is read of a request.

    Top-k, min-p and the repetition penalty go beyond the protocol.
    """

    model_config = ConfigDict(extra="allow")
    messages: Annotated[list[_Message], Field(min_length=1)]
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    max_tokens: _Tokens = None
    max_completion_tokens: _Tokens = None
    stop: Annotated[_Stops | None, Field(max_length=4), BeforeValidator(_as_list)] = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @classmethod
    def read(cls, body: bytes) -> "ChatRequest":
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
        for name, neutral in UNSUPPORTED.items():
            if (request.model_extra or {}).get(name) not in (None, neutral):
                raise ApiError(400, f"{name} is not supported here", param=name)
        return request

    def sampling(self, default: Sampling) -> Sampling:
        """The settings are those of this request, and the server's where it says nothing."""
        asked = {name: getattr(self, name) for name in vars(default)}
        return dataclasses.replace(default, **{n: v for n, v in asked.items() if v is not None})


class ChatServer:
    """The server has the endpoints of one model.

    Args:
        generator: the model.
        name: of the model, in the protocol.
        config: `sampling` where a request says nothing, `max_new_tokens` whatever a request says,
            `max_requests` at a time, of which more get status 429, and the port, `serve`.
    """

    def __init__(self, generator: Generator, name: str, config: ChatConfig) -> None:
        self.generator, self.name, self.config = generator, name, config
        self.device_lock = asyncio.Lock()
        self.created = int(time.time())
        app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            ],
            # A page in a browser must not reach the model through a name that points here.
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", HOST]),
                Middleware(_BoundedRequests, limit=config.max_requests),
            ],
            exception_handlers={
                ApiError: lambda _, error: error.response(),
                HTTPException: lambda _, error: ApiError(
                    error.status_code, error.detail
                ).response(),
                Exception: lambda *_: ApiError(500, "internal error").response(),
            },
        )
        settings = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        self.uvicorn = uvicorn.Server(settings)

    def serve(self, say: Callable[[str], None]) -> None:
        """The method serves until the process is stopped; `say` shows a line to the user.

        Raises:
            UserError: the port is not free.
        """
        port = self.config.serve
        try:
            listener = socket.create_server((HOST, port))
        except OSError as error:
            reason = os.strerror(error.errno)
            raise UserError(
                f"--serve {port}: {reason}; name another port, or 0 for any free one"
            ) from error
        url = f"http://{HOST}:{listener.getsockname()[1]}/v1"
        say(f"serving the model {self.name} at {url}; Ctrl-C stops")
        self.uvicorn.run(sockets=[listener])

    async def models(self, _: Request) -> Response:
        """The method answers GET /v1/models."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "hamner"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat_completions(self, http: Request) -> Response:
        """The method answers POST /v1/chat/completions."""
        request = ChatRequest.read(await _read_body(http))
        if request.model not in (None, self.name):
            message = f"there is no model {request.model} here, only {self.name}"
            raise ApiError(404, message, param="model", code="model_not_found")
        asked = request.max_completion_tokens or request.max_tokens or self.config.max_new_tokens
        try:
            completion = answer(
                self.generator,
                [message.message() for message in request.messages],
                request.sampling(self.config.sampling),
                max_new_tokens=min(asked, self.config.max_new_tokens),
                stop_texts=request.stop or (),
                seed=random.getrandbits(32) if request.seed is None else request.seed % 2**63,
            )
        except ContextError as error:
            raise ApiError(
                400, str(error), param="messages", code="context_length_exceeded"
            ) from error
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }
        if request.stream:
            with_usage = request.stream_options is not None and request.stream_options.include_usage
            events = self.events(completion, head, with_usage)
            return _EventStream(events, media_type="text/event-stream")
        async with aclosing(self.pieces(completion)) as pieces:
            async for _ in pieces:
                if await http.is_disconnected():
                    raise ApiError(499, "the client left")
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "finish_reason": completion.finish_reason,
            "logprobs": None,
        }
        body = {**head, "object": "chat.completion", "choices": [choice]}
        return JSONResponse({**body, "usage": _usage(completion)})

    async def pieces(self, completion: Completion) -> AsyncGenerator[str, None]:
        """The iterator gives the text as a thread generates it; closing it frees the device."""
        async with self.device_lock:
            async for piece in iterate_in_threadpool(iter(completion)):
                yield piece

    async def events(
        self, completion: Completion, head: dict, with_usage: bool
    ) -> AsyncGenerator[str, None]:
        """The iterator gives the answer as server-sent events."""

        def event(choices: list[dict], **values) -> str:
            body = {**head, "object": "chat.completion.chunk", "choices": choices, **values}
            return f"data: {json.dumps(body)}\n\n"

        def choice(delta: dict, finish_reason: str | None = None) -> list[dict]:
            return [{"index": 0, "delta": delta, "finish_reason": finish_reason}]

        yield event(choice({"role": "assistant", "content": ""}))
        async with aclosing(self.pieces(completion)) as pieces:
            async for piece in pieces:
                yield event(choice({"content": piece}))
        yield event(choice({}, completion.finish_reason))
        if with_usage:
            yield event([], usage=_usage(completion))
        yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """The stream closes its generator at once when the client hangs up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().__call__(scope, receive, send)


class _BoundedRequests:
    """The ASGI middleware turns away more than `limit` POSTs at a time."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit, self.running = app, limit, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.running >= self.limit:
            refusal = ApiError(429, f"{self.limit} requests are waiting already; try again later")
            await refusal.response()(scope, receive, send)
            return
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1


async def _read_body(request: Request) -> bytes:
    """The function reads the body, no larger and no later than allowed.

    Raises:
        ApiError: it is not declared as JSON, too large or too late.
    """
    # A web page can send text to any address, JSON only to those that let it.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "the content type must be application/json")
    too_large = ApiError(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes")
    # uvicorn has checked that it is a number.
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the request took longer than {BODY_SECONDS:g} s to come") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the request ended early") from error
    return bytes(body)


def _usage(completion: Completion) -> dict:
    prompt, generated = len(completion.prompt), completion.num_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
