"""The tests ask the server through the official client, and with requests that are not its."""

import contextlib
import importlib
import json
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, replace

import openai
import pytest

from hamner.chat import server
from hamner.chat.config import ChatConfig
from hamner.chat.protocol import ServedModel
from hamner.chat.server import HOST, MAX_BODY_BYTES, ChatServer
from hamner.data.chat_template import Message, render_prompt
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.model.generate import Generator
from hamner.model.sampling import Sampling
from tests import forked
from tests.chat.serving import DEFAULT, END, SlowScript, says, serving
from tests.models import DENSE
from tests.saved import save_run, sharp
from tests.scripted import Script

MESSAGES = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(vocab_size=261)


@contextlib.contextmanager
def running(generator, **settings):
    """The context gives a client of a server that runs in a thread."""
    with (
        serving(generator, **settings) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
    ):
        yield client


def chat_server(script, **config) -> ChatServer:
    return ChatServer(ServedModel(script, "mine", ChatConfig(**config), is_chat=True))


@pytest.fixture(scope="module")
def script():
    return says("Héllo, 你好!")


@pytest.fixture(scope="module")
def client(script):
    with running(script) as client:
        yield client


def create(client, **kwargs):
    return client.chat.completions.create(**{"model": "mine", "messages": MESSAGES} | kwargs)


def test_an_answer(client, script, tokenizer):
    result = create(client)
    (choice,) = result.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Héllo, 你好!"
    assert choice.finish_reason == "stop"
    prompt = render_prompt([Message("system", "Be terse."), Message("user", "Hi")], tokenizer)
    assert script.prompts[-1] == prompt
    assert result.model == "mine"
    assert result.usage.prompt_tokens == len(prompt)
    assert result.usage.completion_tokens == len("Héllo, 你好!".encode()) + 1
    assert result.usage.total_tokens == result.usage.prompt_tokens + result.usage.completion_tokens


def test_a_streamed_answer(client):
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert "".join(pieces) == "Héllo, 你好!"
    assert pieces[:2] == ["H", "é"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "stop"
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("Héllo, 你好!".encode()) + 1


def test_settings_of_a_request(client, script):
    create(client)
    assert script.sampling == DEFAULT
    beyond = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    create(client, temperature=0, top_p=0.3, extra_body=beyond)
    assert script.sampling == Sampling(temperature=0, top_p=0.3, **beyond)
    result = create(client, max_tokens=3)
    assert (result.choices[0].message.content, result.usage.completion_tokens) == ("Hé", 3)
    assert result.choices[0].finish_reason == "length"
    for less in (None, 5):
        result = create(client, max_completion_tokens=1, max_tokens=less)
        assert result.choices[0].message.content == "H"
    for seed in (0, 7):
        create(client, seed=seed)
        assert script.seeds[-1] == seed
    for stop in ("lo", ["!", "lo"]):
        result = create(client, stop=stop)
        assert result.choices[0].message.content == "Hél"
        assert result.choices[0].finish_reason == "stop"
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    create(client, messages=[{"role": "user", "content": parts}], n=1, user="me")
    assert script.prompts[-1] == render_prompt([Message("user", "Hi")], script.tokenizer)
    create(client, messages=[{"role": "developer", "content": "Be terse."}, MESSAGES[1]])
    create(client)
    assert script.prompts[-1] == script.prompts[-2]


def test_the_model_is_listed_and_answers_to_any_name(client):
    assert [model.id for model in client.models.list()] == ["mine"]
    assert create(client, model="gpt-5").model == "mine"


def test_the_list_says_what_a_page_must_know(client, tokenizer):
    (model,) = client.models.list()
    assert (model.kind, model.context_length) == ("chat", 1000)
    assert model.defaults == {**asdict(DEFAULT), "max_tokens": 100, "system": ""}
    script = Script(tokenizer, [], context=50)
    with running(script, is_chat=False, max_new_tokens=7, system="Be.") as base:
        (model,) = base.models.list()
    assert (model.kind, model.context_length) == ("base", 50)
    assert (model.defaults["max_tokens"], model.defaults["system"]) == (7, "Be.")


def test_health(client):
    head = f"GET /health HTTP/1.1\nHost: {HOST}\nConnection: close"
    assert raw(client, head) == (200, {"status": "ok"})


def complete(client, **kwargs):
    return client.completions.create(**{"model": "any", "prompt": "Once <|user|>"} | kwargs)


def test_a_text_is_continued(client, script, tokenizer):
    result = complete(client)
    (choice,) = result.choices
    assert (choice.text, choice.finish_reason) == ("Héllo, 你好!", "stop")
    assert (result.object, result.model) == ("text_completion", "mine")
    # Without a template, and a text's special tokens are text.
    assert script.prompts[-1] == tokenizer.encode("Once <|user|>")
    assert result.usage.prompt_tokens == len(script.prompts[-1])
    for prompt in (["Once <|user|>"], script.prompts[-1], [script.prompts[-1]]):
        complete(client, prompt=prompt, temperature=0, max_tokens=1)
        assert script.prompts[-1] == script.prompts[-2]
    assert script.sampling == replace(DEFAULT, temperature=0)
    complete(client, prompt="")
    assert script.prompts[-1] == [tokenizer.eot_id]


def test_a_text_is_continued_in_pieces(client):
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "Héllo, 你好!"
    assert chunks[0].choices[0].text == "H"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len("Héllo, 你好!".encode()) + 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [261]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 1000}, "prompt"),
        ({"echo": True}, "echo"),
        ({"logprobs": 3}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_texts_that_are_refused(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **change)
    assert caught.value.param == param


def test_a_base_model_continues_texts_and_has_no_conversations(tokenizer):
    # What ends an answer does not end a text.
    script = Script(tokenizer, [*tokenizer.encode("a"), END, *tokenizer.encode("b"), 0])
    with running(script, is_chat=False) as client:
        result = complete(client)
        assert (result.choices[0].text, result.choices[0].finish_reason) == ("a<|end|>b", "stop")
        with pytest.raises(openai.BadRequestError, match="it continues texts, at /v1/completions"):
            create(client)


def test_a_text_longer_than_the_context_may_lose_its_beginning(tokenizer):
    script = says("Hi", context=40)
    text = "abcdefghij" * 5
    with running(script) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, prompt=text)
        assert caught.value.code == "context_length_exceeded"
        auto = {"extra_body": {"truncation": "auto"}}
        result = complete(client, prompt=text, **auto)
        # Room is left for a quarter.
        assert script.prompts[-1] == tokenizer.encode(text)[-30:]
        assert (result.usage.prompt_tokens, result.usage.forgotten) == (30, 20)
        assert complete(client, prompt="abc", **auto).usage.forgotten == 0


def test_a_conversation_longer_than_the_context_may_lose_its_oldest_turns(tokenizer):
    def user(text):
        return {"role": "user", "content": text}

    def assistant(text):
        return {"role": "assistant", "content": text}

    script = says("Hi", context=60)
    system = {"role": "system", "content": "Sys"}
    messages = [system, user("a" * 20), assistant("b" * 20), user("c"), assistant("d"), user("e")]
    with running(script) as client:
        with pytest.raises(openai.BadRequestError):
            create(client, messages=messages)
        auto = {"extra_body": {"truncation": "auto"}}
        result = create(client, messages=messages, **auto)
        kept = [Message(m["role"], m["content"]) for m in (system, *messages[3:])]
        assert script.prompts[-1] == render_prompt(kept, tokenizer)
        assert result.usage.forgotten == 2
        assert create(client, messages=[user("a")], **auto).usage.forgotten == 0
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, messages=[user("a" * 80)], **auto)
        assert caught.value.code == "context_length_exceeded"
        no_question = create(client, messages=[system, assistant("d")], **auto)
        assert no_question.usage.forgotten == 0


def test_an_empty_system_message_asks_for_none(tokenizer):
    script = says("Hi")
    with running(script, system="Sys") as client:
        for messages in (MESSAGES[1:], [{"role": "system", "content": " "}, *MESSAGES[1:]]):
            create(client, messages=messages)
    with_default, without = script.prompts
    hi = Message("user", "Hi")
    assert with_default == render_prompt([Message("system", "Sys"), hi], tokenizer)
    assert without == render_prompt([hi], tokenizer)


@pytest.mark.parametrize("ask", [create, complete])
def test_every_piece_of_a_stream_may_have_the_numbers_of_tokens(client, ask):
    options = {"continuous_usage_stats": True}
    chunks = list(ask(client, stream=True, stream_options=options))
    generated = [chunk.usage.completion_tokens for chunk in chunks]
    assert generated == sorted(generated)
    assert generated[-1] == len("Héllo, 你好!".encode()) + 1
    assert all(chunk.choices for chunk in chunks)


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": value} for value in (5e-324, 1e-40)),
        {"top_p": 1e-300},
        {"seed": 10**23},
        {"seed": -5},
        {"max_tokens": 10**24},
        *(
            {"extra_body": {"repetition_penalty": value}}
            for value in (5e-324, 1e-39, 1e39, 1.7e308)
        ),
    ],
    ids=str,
)
def test_every_finite_setting_gives_a_token(model_client, settings):
    assert 0 < create(model_client, **{"max_tokens": 2} | settings).usage.completion_tokens <= 4
    chunks = list(create(model_client, **{"max_tokens": 2} | settings, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


@pytest.fixture(scope="module")
def model_client(tokenizer):
    """The client asks a real model, of a few tokens of context."""
    generator = Generator(sharp(replace(DENSE, vocab_size=261)), tokenizer)
    with running(generator, max_new_tokens=4) as client:
        yield client


def test_an_error_in_a_stream_is_an_event_and_the_stream_ends(tokenizer):
    class Failing(Script):
        error = UserError("the weights are of no use")

        def tokens(self, prompt, sampling, *, seed, unpenalized):
            yield tokenizer.encode("H")[0]
            raise self.error

    failing = Failing(tokenizer, [])
    with running(failing) as client:
        for error, said in ((failing.error, "of no use"), (RuntimeError("secret"), "internal")):
            failing.error = error
            with pytest.raises(openai.APIError, match=said):
                list(create(client, stream=True))
            response = client.chat.completions.with_raw_response.create(
                model="x", messages=MESSAGES, stream=True
            )
            lines = list(response.http_response.iter_lines())
            assert [line for line in lines if line][-1] == "data: [DONE]"
        with pytest.raises(openai.InternalServerError, match="internal"):
            create(client)


def test_the_servers_seed_and_system_prompt_are_the_flags(tokenizer):
    seeds = []
    for _ in range(2):
        script = says("Hi")
        with running(script, seed=10**23, system="Sys") as client:
            create(client, messages=MESSAGES[1:])
            create(client)
        seeds.append(script.seeds)
        first, second = script.prompts
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2
    assert first == render_prompt([Message("system", "Sys"), Message("user", "Hi")], tokenizer)
    assert "Sys" not in tokenizer.decode(second)


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"messages": []}, openai.BadRequestError, "messages"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            openai.BadRequestError,
            "messages.0.role",
        ),
        ({"messages": "Hi"}, openai.BadRequestError, "messages"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"temperature": "0.5"}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"stop": [""]}, openai.BadRequestError, "stop.0"),
        ({"stop": list("abcde")}, openai.BadRequestError, "stop"),
        ({"n": 2}, openai.BadRequestError, "n"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"presence_penalty": -0.5}, openai.BadRequestError, "presence_penalty"),
    ],
)
def test_requests_that_are_refused(client, change, error, param):
    with pytest.raises(error) as caught:
        create(client, **change)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert caught.value.body["message"]


def test_messages_too_long_for_the_context(tokenizer):
    with running(says("Hi", context=50)) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, messages=[{"role": "user", "content": "x" * 60}])
        assert caught.value.code == "context_length_exceeded"
        assert create(client).choices[0].message.content == "Hi"


def raw(client, head: str, body: bytes = b"") -> tuple[int, dict]:
    """The function gives status and JSON of a request written by hand."""
    with socket.create_connection((HOST, client.base_url.port), timeout=30) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    status, _, rest = answer.partition(b"\r\n")
    content = rest.partition(b"\r\n\r\n")[2]
    return int(status.split()[1]), json.loads(content) if content.startswith(b"{") else {}


JSON_HEAD = f"POST /v1/chat/completions HTTP/1.1\nHost: {HOST}\nContent-Type: application/json\n"
JSON_HEAD += "Connection: close"


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (f"{JSON_HEAD}\nContent-Length: 9", b'{"message', 400),
        (f"{JSON_HEAD}\nContent-Length: 2", b"[]", 400),
        (f"{JSON_HEAD}\nContent-Length: 4", b"\xff\xfe\x00\x01", 400),
        (JSON_HEAD.replace("application/json", "text/plain") + "\nContent-Length: 2", b"{}", 415),
        (JSON_HEAD.replace("completions", "nonsense") + "\nContent-Length: 2", b"{}", 404),
        (JSON_HEAD.replace("POST", "GET"), b"", 405),
    ],
)
def test_malformed_requests_get_errors_in_json(client, head, body, status):
    got, content = raw(client, head, body)
    assert got == status
    assert set(content["error"]) == {"message", "type", "param", "code"}


def test_a_name_that_points_here_is_not_let_in(client):
    """A web page could otherwise reach the model through its own domain."""
    head = f"GET /v1/models HTTP/1.1\nHost: {HOST}\nConnection: close"
    assert raw(client, head)[0] == 200
    assert raw(client, head.replace(f"Host: {HOST}", "Host: evil.example"))[0] == 400


def test_a_request_too_large_is_refused_before_it_is_read(client):
    size = MAX_BODY_BYTES + 1
    status, content = raw(client, f"{JSON_HEAD}\nContent-Length: {size}")
    assert (status, content["error"]["type"]) == (413, "invalid_request_error")
    # Without a length, by what comes.
    chunks = b"%x\r\n" % MAX_BODY_BYTES + b" " * MAX_BODY_BYTES + b"\r\n1\r\n \r\n"
    status, _ = raw(client, f"{JSON_HEAD}\nTransfer-Encoding: chunked", chunks)
    assert status == 413


def test_a_request_that_does_not_come_is_given_up(client, monkeypatch):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.2)
    with socket.create_connection((HOST, client.base_url.port), timeout=30) as connection:
        connection.sendall(f"{JSON_HEAD}\nContent-Length: 99\n\n{{".replace("\n", "\r\n").encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def asking(client, results: list[str]):
    """The context has a request on its way, whose answer is added to `results`."""
    thread = threading.Thread(
        target=lambda: results.append(create(client).choices[0].message.content)
    )
    thread.start()
    yield
    thread.join(30)


def test_a_request_waits_for_the_one_before(tokenizer):
    script = SlowScript(tokenizer, [*tokenizer.encode("Hi"), END])
    results = []
    with running(script, serve=0, max_requests=2) as client, asking(client, results):
        wait_until(lambda: script.prompts)
        with asking(client, results):
            script.may_speak.set()
    assert results == ["Hi", "Hi"]


def test_requests_beyond_the_bound_are_turned_away(tokenizer):
    script = SlowScript(tokenizer, [*tokenizer.encode("Hi"), END])
    results = []
    with running(script, serve=0, max_requests=1) as client:
        with asking(client, results):
            wait_until(lambda: script.prompts)
            with pytest.raises(openai.RateLimitError) as caught:
                create(client)
            assert caught.value.response.headers["retry-after"] == "1"
            script.may_speak.set()
        assert results == ["Hi"]
        assert create(client).choices[0].message.content == "Hi"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_its_answer(tokenizer, stream):
    script = SlowScript(tokenizer, [tokenizer.encode("x")[0]] * 100_000, context=200_000)
    with running(script, serve=0, max_requests=1, max_new_tokens=100_000) as client:
        script.may_speak.set()
        if stream:
            chunks = create(client, stream=True)
            next(iter(chunks))
            chunks.response.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                create(client, timeout=0.2)

        def is_free() -> bool:
            try:
                return bool(create(client, max_tokens=1))
            except openai.RateLimitError:
                return False

        wait_until(is_free)
        assert script.spoken < 100_000


def test_a_port_that_is_taken_is_named(script):
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--serve {port}: Address already in use"):
            chat_server(script, serve=port).serve(print)


class _Started(Exception):
    """The exception stands for a server that would now serve."""


def start(script, monkeypatch, **config) -> str:
    """The function gives what a server says when it starts."""
    said = []
    started = chat_server(script, serve=0, **config)

    def stop(sockets):
        sockets[0].close()
        raise _Started

    monkeypatch.setattr(started.uvicorn, "run", stop)
    with pytest.raises(_Started):
        started.serve(said.append)
    return "\n".join(said)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_an_address_of_this_machine_alone_needs_no_warning(script, monkeypatch, host):
    said = start(script, monkeypatch, host=host)
    assert f"http://{host}:" in said
    assert "warning" not in said


def test_an_address_that_others_reach_is_warned_of_and_has_any_name(script, monkeypatch):
    said = start(script, monkeypatch, host="0.0.0.0")
    assert "warning: whoever reaches --host 0.0.0.0 can use the model" in said
    # 0.0.0.0 is no address to open.
    assert "http://localhost:" in said
    assert f"from other machines: http://{socket.gethostname()}:" in said
    with running(script, serve=0, host="0.0.0.0") as client:
        head = "GET /health HTTP/1.1\nHost: any.example\nConnection: close"
        assert raw(client, head)[0] == 200


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "x" * 70])
def test_an_address_that_is_not_here_is_named(script, host):
    with pytest.raises(UserError, match=f"--serve 0 --host {host}: .* an address of this machine"):
        chat_server(script, serve=0, host=host).serve(print)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "hamner.chat.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs the package uvicorn: pip install -e '\.\[serve"):
        importlib.import_module("hamner.chat.server")


def test_the_command_serves_a_real_model(tmp_path, tokenizer):
    """The greedy text is that of decoding without the server, streamed or not."""
    model = sharp(replace(DENSE, vocab_size=261))
    save_run(tmp_path / "runs" / "mine", model, chat=True)
    command = [sys.executable, "-m", "hamner.chat", "--serve", "0", "--device", "cpu"]
    said = tmp_path / "said.txt"
    with said.open("w") as file:
        process = forked.Popen(command, text=True, cwd=tmp_path, stdout=file)
    try:
        process.wait_until(lambda: said.read_text().count("\n") >= 2)
        url = re.search(r"http://127\.0\.0\.1:\d+/v1", said.read_text().splitlines()[1])[0]
        prompt = render_prompt([Message("user", "Hi")], tokenizer)
        tokens = Generator(model, tokenizer).tokens(
            prompt, Sampling(temperature=0, repetition_penalty=1), seed=0, unpenalized=()
        )
        expected = tokenizer.decode([next(tokens) for _ in range(20)])
        settings = {
            "messages": [{"role": "user", "content": "Hi"}],
            "temperature": 0,
            "max_tokens": 20,
        }
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            assert create(client, **settings).choices[0].message.content == expected
            chunks = create(client, **settings, stream=True)
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()
