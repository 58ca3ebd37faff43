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

    Args:
        app: what answers other requests.
        host: where the server answers.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        name = socket.gethostname().lower()
        self.names = {*own_names(host.lower()), name, f"{name}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await refusal.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, headers.get("host", "")):
            return ApiError(
                403,
                f"the page of {origin} may not use this server: open the server's own page, by "
                "the address of its machine",
            )
        # Browsers send no Origin with a GET that the page cannot read, but nearly all say this.
        is_foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        if is_foreign and scope["path"].startswith("/v1/"):
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
        return parts.scheme == "https" or name in self.names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
