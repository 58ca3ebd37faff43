"""The module serves one model by OpenAI's protocol, on the loopback interface unless asked.

    GET  /                          a page that uses the following
    GET  /health
    GET  /v1/models
    POST /v1/chat/completions       stream: false or true (server-sent events)
    POST /v1/completions            the same, of a text that is continued

Starlette and uvicorn do the HTTP: chunked bodies, keep-alive, clients that hang up. One answer is
generated at a time, since one saturates the device; the others wait, up to a bound.
"""

import asyncio
import json
import logging
import random
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from hamner.errors import UserError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import iterate_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send

    from hamner.chat.guard import SameOrigin, own_names
    from hamner.chat.page import page_route
    from hamner.chat.protocol import (
        ApiError,
        ChatRequest,
        CompletionRequest,
        Reply,
        ServedModel,
    )
except ModuleNotFoundError as error:
    raise UserError(f"--serve needs the package {error.name}: pip install -e '.[serve]'") from error

from hamner.chat.config import HOST
from hamner.model.generate import Completion

MAX_BODY_BYTES = 2**20
BODY_SECONDS = 10.0
"""longest a client may take to send its request"""
MAX_CONNECTIONS = 100

logger = logging.getLogger(__name__)


class ChatServer:
    """The server has the endpoints of one model.

    Args:
        model: with its config, of which the server takes `max_requests` at a time, of which more
            get status 429, `seed` of the choice of tokens, and where to answer, `host` and `serve`.
    """

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.config = config = model.config
        self.device_lock = asyncio.Lock()
        self.created = int(time.time())
        self.seeds = random.Random(config.seed)
        """gives every answer another seed"""
        app = Starlette(
            routes=[
                page_route(),
                Route("/health", lambda _: JSONResponse({"status": "ok"})),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            # A page in a browser must not reach the model through a name that points here. Other
            # machines know this one by names that are not known here.
            middleware=[
                Middleware(
                    TrustedHostMiddleware,
                    allowed_hosts=own_names(config.host) if config.is_local else ["*"],
                    www_redirect=False,
                ),
                Middleware(SameOrigin, host=config.host),
                Middleware(_BoundedRequests, limit=config.max_requests),
            ],
            exception_handlers={
                ApiError: lambda _, error: error.response(),
                UserError: lambda _, error: ApiError(500, str(error)).response(),
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
            UserError: the port is not free, or the address not this machine's.
        """
        host, port = self.config.host, self.config.serve
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family)
        except (OSError, UnicodeError) as error:  # a name that cannot be one is a UnicodeError
            reason = getattr(error, "strerror", None) or str(error)
            at = "" if host == HOST else f" --host {host}"
            raise UserError(
                f"--serve {port}{at}: {reason}; name another port, or 0 for any free one"
                f"{', and an address of this machine' if at else ''}"
            ) from error
        bound = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        if self.config.is_any_address:
            shown = "localhost"
        url = f"http://{shown}:{bound}"
        say(
            f"serving the model {self.model.name}: a page to use it at {url}, OpenAI's protocol at "
            f"{url}/v1; Ctrl-C stops"
        )
        if not self.config.is_local:
            say(f"warning: whoever reaches --host {host} can use the model, without a password")
        if self.config.is_any_address:
            name = socket.gethostname()
            say(f"from other machines: http://{name}:{bound}, or this machine's address for {name}")
        self.uvicorn.run(sockets=[listener])

    async def models(self, http: HttpRequest) -> Response:
        """The method answers GET /v1/models; of the system prompt and other defaults a name that a
        stranger may have pointed here learns nothing."""
        model = {**self.model.listing(), "created": self.created}
        if not http.state.is_own_name:
            del model["defaults"]
        return JSONResponse({"object": "list", "data": [model]})

    async def chat_completions(self, http: HttpRequest) -> Response:
        """The method answers POST /v1/chat/completions."""
        return await self.respond(http, ChatRequest.read(await _read_body(http)))

    async def completions(self, http: HttpRequest) -> Response:
        """The method answers POST /v1/completions."""
        return await self.respond(http, CompletionRequest.read(await _read_body(http)))

    async def respond(
        self, http: HttpRequest, request: ChatRequest | CompletionRequest
    ) -> Response:
        """The method gives the answer to a request, whole or as a stream."""
        reply = request.reply(self.model, self.seeds.getrandbits(32))
        if request.stream:
            wanted = request.usage_in_stream
            events = self.events(
                reply, at_end=wanted.include_usage, always=wanted.continuous_usage_stats
            )
            return _EventStream(events, media_type="text/event-stream")
        async with aclosing(self.pieces(reply.completion)) as pieces:
            async for _ in pieces:
                if await http.is_disconnected():
                    raise ApiError(499, "the client left")
        return JSONResponse(reply.whole())

    async def pieces(self, completion: Completion) -> AsyncGenerator[str, None]:
        """The iterator gives the text as a thread generates it; closing it frees the device."""
        async with self.device_lock:
            async for piece in iterate_in_threadpool(iter(completion)):
                yield piece

    async def events(
        self, reply: Reply, *, at_end: bool, always: bool
    ) -> AsyncGenerator[str, None]:
        """The iterator gives the answer as server-sent events.

        An error is an event too, since the status is sent already; the stream has its end anyway.

        Args:
            reply: not generated yet.
            at_end: whether the last event has the numbers of tokens.
            always: whether every event of a piece has them.
        """

        def event(content: dict, finish_reason: str | None = None) -> str:
            numbers = {"usage": reply.usage()} if always else {}
            return _event(reply.piece(content, finish_reason, **numbers))

        if reply.opening:
            yield event(reply.opening)
        try:
            async with aclosing(self.pieces(reply.completion)) as pieces:
                async for piece in pieces:
                    yield event(reply.part(piece))
            yield event(reply.part(""), reply.completion.finish_reason)
        except UserError as error:
            yield _event(ApiError(500, str(error)).body())
        except Exception:
            logger.exception("an answer was cut short")
            yield _event(ApiError(500, "internal error").body())
        if at_end:
            yield _event(reply.body(reply.piece_kind, [], usage=reply.usage()))
        yield "data: [DONE]\n\n"


def _event(body: dict) -> str:
    return f"data: {json.dumps(body)}\n\n"


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


async def _read_body(request: HttpRequest) -> bytes:
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
