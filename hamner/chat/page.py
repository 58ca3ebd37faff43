"""The module serves the page: one file, which loads nothing and may run nothing but itself.

Needs Starlette, of the extra `serve`.
"""

import base64
import hashlib
import re
from importlib import resources

from starlette.responses import HTMLResponse
from starlette.routing import Route

PAGE = "page.html"


def page_route() -> Route:
    """The route is `/`, the page; its scripts and styles are allowed by their hashes."""
    html = resources.files("hamner.chat").joinpath(PAGE).read_text(encoding="utf-8")
    response = HTMLResponse(html, headers=_headers(html))
    return Route("/", lambda _: response)


def _headers(html: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script", html),
        "style-src": _hashes("style", html),
        # The icon.
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # No string becomes markup or code, whatever the page does with it.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        # A newer version of the package has another page.
        "cache-control": "no-cache",
    }


def _hashes(tag: str, html: str) -> str:
    """The hashes are those of the elements with this tag, as a policy lists them."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
