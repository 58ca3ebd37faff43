"""The tests read the page as a browser gets it, without one."""

import base64
import hashlib
import re

import pytest

from tests.chat.requests import ask
from tests.chat.serving import says, serving


@pytest.fixture(scope="module")
def response():
    with serving(says("Hello")) as url:
        yield ask(url, "/")


@pytest.fixture(scope="module")
def html(response):
    return response.body.decode()


def test_the_page_may_run_and_load_nothing_but_itself(response, html):
    assert response.status == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; ")
    )

    def hashed(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    assert policy == {
        "default-src": "'none'",
        "script-src": hashed("script"),
        "style-src": hashed("style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_the_page_is_not_framed_guessed_at_or_named_to_others(response):
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cross-origin-resource-policy"] == "same-origin"


def test_the_page_names_no_other_address(html):
    named = set(re.findall(r"https?://[^\s'\"`)]*", html))
    # XML's names of SVG are no addresses.
    assert named == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(?:link|script|img|iframe)[^>]*\b(?:src|href)=\"(?!data:)", html)
    assert not re.findall(r"\bon\w+=\"|\bstyle=\"", html)


def test_the_page_makes_no_markup_of_strings(html):
    makers = "innerHTML|outerHTML|insertAdjacentHTML|document.write|setHTML|DOMParser|eval|Function"
    assert not re.findall(rf"\b(?:{makers})\b", html)
