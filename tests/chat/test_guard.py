"""The tests ask for what another origin's page would, and for what the server's own does."""

import socket

import pytest

from hamner.chat.config import HOST
from tests.chat.requests import ask
from tests.chat.serving import says, serving

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
QUESTION = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def url():
    with serving(says("Hello")) as url:
        yield url


def test_programs_that_send_no_origin_are_answered(url):
    assert ask(url, MODELS).status == 200
    assert ask(url, CHAT, QUESTION).status == 200


def test_the_servers_own_page_is_answered(url):
    headers = {"Origin": url, "Sec-Fetch-Site": "same-origin"}
    assert ask(url, MODELS, headers=headers).status == 200
    assert ask(url, CHAT, QUESTION, headers=headers).status == 200
    port = url.rpartition(":")[2]
    for name in ("localhost", "LocalHost", "[::1]"):
        own = {"Host": f"{name}:{port}", "Origin": f"http://{name}:{port}"}
        assert ask(url, CHAT, QUESTION, headers=own).status == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://evil.example",
        "null",
        "",
        f"http://{HOST}",
        f"http://{HOST}:1",
        "http://localhost:8000",
        "file://",
        "http://[",
        "http://evil.example@{host}",
        "http://{host}.evil.example",
    ],
)
def test_a_page_of_another_origin_is_refused(url, origin):
    origin = origin.replace("{host}", url.removeprefix("http://"))
    for path, body in ((MODELS, None), (CHAT, QUESTION), ("/v1/completions", {"prompt": "Hi"})):
        response = ask(url, path, body, headers={"Origin": origin})
        assert response.status == 403
        assert "may not use this server" in response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers


def test_a_page_of_another_origin_may_not_ask_whether_it_may(url):
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    response = ask(url, CHAT, method="OPTIONS", headers=headers)
    assert response.status == 403
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_page_of_another_origin_embeds_is_refused_and_a_link_is_not(url, site):
    headers = {"Sec-Fetch-Site": site}
    assert ask(url, MODELS, headers=headers).status == 403
    assert ask(url, CHAT, QUESTION, headers=headers).status == 403
    assert ask(url, "/", headers=headers).status == 200


def test_a_name_that_points_here_is_refused_even_with_its_own_origin(url):
    port = url.rpartition(":")[2]
    headers = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}
    for path, body in (("/", None), (MODELS, None), (CHAT, QUESTION)):
        assert ask(url, path, body, headers=headers).status == 400


@pytest.fixture(scope="module")
def shared_url():
    """The address of a server that other machines reach."""
    with serving(says("Hello"), serve=0, host="0.0.0.0", system="Be secret.") as url:
        yield url


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, "any.example", 200),
        ("http://192.168.1.5:8000", "192.168.1.5:8000", 200),
        ("http://[fd00::5]:8000", "[fd00::5]:8000", 200),
        ("http://localhost:8000", "localhost:8000", 200),
        (f"http://{socket.gethostname()}:8000", f"{socket.gethostname()}:8000", 200),
        # Behind a proxy with TLS.
        ("https://chat.example", "chat.example", 200),
        # It may point anywhere.
        ("http://evil.example:8000", "evil.example:8000", 403),
        ("http://evil.example", "192.168.1.5:8000", 403),
        ("http://192.168.1.6:8000", "192.168.1.5:8000", 403),
    ],
)
def test_a_server_that_others_reach_knows_its_page_by_address_or_name(
    shared_url, origin, host, status
):
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    assert ask(shared_url, CHAT, QUESTION, headers=headers).status == status


@pytest.mark.parametrize(
    ("host", "site", "may_know"),
    [
        ("192.168.1.5:8000", None, True),
        ("[fd00::5]:8000", None, True),
        ("LocalHost", None, True),
        (f"{socket.gethostname()}:8000", None, True),
        # Behind a proxy with TLS, as a browser asks for its page.
        ("chat.example", "same-origin", True),
        # It may point here, and its page looks like a program.
        ("evil.example:8000", None, False),
        ("192.168.1.5.evil.example", None, False),
        ("[", None, False),
    ],
)
def test_the_system_prompt_is_kept_from_names_that_a_stranger_may_point_here(
    shared_url, host, site, may_know
):
    headers = {"Host": host} | ({} if site is None else {"Sec-Fetch-Site": site})
    (model,) = ask(shared_url, MODELS, headers=headers).json()["data"]
    assert (model["id"], model["kind"]) == ("mine", "chat")
    assert ("Be secret." in str(model)) == may_know
    assert ("defaults" in model) == may_know
