"""The module sends requests to a server as they are, with any headers."""

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Response:
    """A response was read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    url: str,
    path: str,
    body: dict | None = None,
    *,
    method: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """The function posts a body, or without one gets what is there."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        content = {} if body is None else {"Content-Type": "application/json"}
        connection.request(
            method or ("GET" if body is None else "POST"),
            path,
            None if body is None else json.dumps(body),
            {**content, **(headers or {})},
        )
        response = connection.getresponse()
        names = {name.lower(): value for name, value in response.getheaders()}
        return Response(response.status, names, response.read())
    finally:
        connection.close()
