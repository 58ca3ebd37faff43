"""The module keeps the pages of strangers, which run in the user's own browser, off the server.

The address of a server that only this machine reaches is no protection from them: a page may send
requests there, and by a name of its own that it points here even read the answers (DNS rebinding).
Programs other than browsers send no Origin, and nothing here concerns them.

Needs Starlette, of the extra `serve`.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hamner.chat.config import HOST
from hamner.chat.protocol import ApiError


def own_names(host: str) -> list[str]:
    """The names are those by which this machine reaches itself, and `host`, where it answers."""
    return ["localhost", HOST, "[::1]", host, f"[{host}]"]


class SameOrigin:
    """The ASGI middleware refuses what a page of another origin asks for.

    A page under a stranger's name that points here can send a GET that looks like a program's. So
    `is_own_name`, in the request's state, says to whom the server answers more than it must.

    Args:
        app: what answers other requests.
        host: where the server answers.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        name = socket.gethostname().lower()
        self.names = {*own_names(host.lower()), name, f"{name}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if refusal := self._refusal(scope["path"], headers):
                await refusal.response()(scope, receive, send)
                return
            scope.setdefault("state", {})["is_own_name"] = self._is_own_name(headers)
        await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, headers.get("host", "")):
            return ApiError(
                403,
                f"the page of {origin} may not use this server: open the server's own page, by "
                "the address of its machine",
            )
        # Browsers send no Origin with a GET that the page cannot read, but nearly all say this.
        is_foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if is_foreign and path.startswith("/v1/"):
            return ApiError(403, "a page of another origin may not use this server")
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """The method says whether the page came from this server.

        Its origin is then what the request was sent to. Behind that may still be a stranger's name
        that points here; but none for which this server, without TLS, could be https.
        """
        try:
            parts = urlsplit(origin.lower())
            name = parts.hostname or ""
        except ValueError:
            return False
        if not parts.netloc or parts.netloc != host.lower():
            return False
        return parts.scheme == "https" or self._knows(name)

    def _is_own_name(self, headers: Headers) -> bool:
        """The method says whether the request was sent to a name that no stranger can point here.

        Behind a proxy with TLS it is any name: of requests by https, and of no other to a name
        elsewhere, browsers say that they come from the same origin.
        """
        try:
            name = urlsplit(f"//{headers.get('host', '').lower()}").hostname or ""
        except ValueError:
            return False
        return self._knows(name) or headers.get("sec-fetch-site") == "same-origin"

    def _knows(self, name: str) -> bool:
        return name in self.names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
