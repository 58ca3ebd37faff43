"""The tests use commands, streaming and `python -m hamner.chat` as a user meets it."""

import json
import os
import re
import sys
from dataclasses import replace
from functools import partial

import pytest

from hamner.chat.__main__ import main, parse, write
from hamner.chat.config import ChatConfig
from hamner.chat.server import ChatServer
from hamner.chat.session import Chat, Complete, Terminal
from hamner.data.chat_template import Message, render_prompt
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.model.generate import Completion, Generator
from hamner.model.sampling import Sampling
from tests import forked
from tests.imports import output_without
from tests.models import DENSE
from tests.saved import save_run, sharp
from tests.scripted import Script

END = 4
SHAPE = replace(DENSE, vocab_size=300, max_seq_len=128)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(vocab_size=300)


class Console:
    """The console is a terminal on which lines are typed one after the other."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.text = list(lines), ""

    def read(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def write(self, piece: str) -> None:
        self.text += piece


def session(kind, tokenizer, says: str, *lines: str, context: int = 1000, **config):
    """The function gives a finished session, what was shown, and the script that spoke."""
    ids = [*tokenizer.encode(says), END if kind is Chat else tokenizer.eot_id]
    script = Script(tokenizer, ids, context)
    console = Console(*lines)
    finished = kind(ChatConfig(**config), script, Terminal(console.read, console.write))
    finished.run()
    return finished, console.text, script


def test_answers_are_shown_until_quit(tokenizer):
    _, text, script = session(Chat, tokenizer, "Hey — you!", "Hi", "", "/quit", "never read")
    assert text == "Hey — you!\n"
    assert len(script.prompts) == 1


def test_commands(tokenizer, tmp_path):
    file = tmp_path / "talk.jsonl"
    _, text, script = session(
        Chat,
        tokenizer,
        "Hey!",
        *("/system", "/system Be terse.", "/temp 0.25", "Hi", f"/save {file}"),
        *("/clear", "/system off", "Again", f"/save {file}", "/help", "/temp"),
    )
    shown = text.splitlines()
    assert shown[:5] == [
        "(system prompt: none)",
        "(system prompt: Be terse.)",
        "(temperature 0.25)",
        "Hey!",
        f"(appended to {file})",
    ]
    assert {"/clear", "/system", "/temp", "/save", "/quit"} <= set(re.findall(r"/\w+", text))
    assert shown[-1] == "(temperature 0.25)"
    assert script.sampling == Sampling(temperature=0.25)
    system, hi = Message("system", "Be terse."), Message("user", "Hi")
    assert script.prompts == [
        render_prompt([system, hi], tokenizer),
        render_prompt([Message("user", "Again")], tokenizer),
    ]
    answer = {"role": "assistant", "content": "Hey!"}
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {
            "messages": [
                {"role": "system", "content": "Be terse."},
                {"role": "user", "content": "Hi"},
                answer,
            ]
        },
        {"messages": [{"role": "user", "content": "Again"}, answer]},
    ]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/nonsense", "there is no command /nonsense"),
        ("/temp warm", "/temp warm: not a number"),
        ("/temp -1", "--temperature -1.0 must be 0 or above"),
        ("/temp 1e999", "--temperature inf must be"),
        ("/save", "there is no conversation yet"),
        ("x" * 200, "shorten them"),
    ],
)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(tokenizer, line, shown):
    _, text, _ = session(Chat, tokenizer, "Hey!", line, "Hi", context=100)
    mistake, answer = text.splitlines()
    assert shown in mistake
    assert answer == "Hey!"


def test_a_file_that_cannot_be_written_is_named(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    lines = f"/save {tmp_path}", f"/save {tmp_path}/pipe", "/save", "/save ~nosuchuser/x"
    _, text, _ = session(Chat, tokenizer, "Hey!", "Hi", *lines)
    *shown, unknown = text.splitlines()[1:]
    assert shown == [
        f"(/save {tmp_path}: Is a directory)",
        f"(/save {tmp_path}/pipe is a pipe, which nobody may ever read: name a file)",
        "(/save needs the name of a file, such as /save talk.jsonl)",
    ]
    assert unknown.startswith("(/save ~nosuchuser/x: ")


def test_a_pasted_block_is_one_turn_even_if_it_begins_like_a_command(tokenizer):
    block = "/usr/bin/x: not found\n/quit\nWhy?"
    chat, text, script = session(Chat, tokenizer, "Hey!", block, "/system Be\nterse.", "Hi")
    assert script.prompts[0] == render_prompt([Message("user", block)], tokenizer)
    assert chat.system == "Be\nterse."
    assert len(script.prompts) == 2


def test_a_full_context_is_said(tokenizer):
    _, text, _ = session(Chat, tokenizer, "1234567", *["asking"] * 5, context=60)
    assert "sees the oldest 2 messages" in text
    _, text, _ = session(Chat, tokenizer, "1234567", "asking", max_new_tokens=3)
    assert text.splitlines() == [
        "123",
        "(cut: no room for more; --max-new-tokens and --seq-len set it)",
    ]


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(tokenizer):
    class Impatient(Console):
        def write(self, piece: str) -> None:
            super().write(piece)
            if self.text == "Hey":
                raise KeyboardInterrupt

    console = Impatient("Hi", "/save ")
    script = Script(tokenizer, [tokenizer.encode(c)[0] for c in "Hey you"] + [END])
    chat = Chat(ChatConfig(), script, Terminal(console.read, console.write))
    chat.run()
    assert console.text.startswith("Hey\n(/save needs")
    assert chat.turns == [Message("user", "Hi"), Message("assistant", "Hey")]


def test_completion_continues_each_line_for_itself(tokenizer, tmp_path):
    file = tmp_path / "texts.jsonl"
    _, text, script = session(
        Complete, tokenizer, " there was", "Once", "Then", f"/save {file}", "/clear", "/help"
    )
    assert text.startswith("Once there was\nThen there was\n")
    assert "there is no command /clear" in text
    assert script.prompts == [tokenizer.encode("Once"), tokenizer.encode("Then")]
    assert json.loads(file.read_text()) == {"text": "Then there was"}


def test_a_file_without_a_last_line_end_loses_nothing(tokenizer, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "mine"}')
    session(Complete, tokenizer, " there was", "Once", f"/save {file}", f"/save {file}")
    rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert rows == ["mine", "Once there was", "Once there was"]


def test_completion_of_a_text_that_fills_the_context(tokenizer):
    line = "abcdefgh" * 30
    _, text, script = session(Complete, tokenizer, "!", line, context=100)
    assert script.prompts == [tokenizer.encode(line)[-75:]]
    assert "only saw the last 75 tokens" in text
    # A short answer needs less room.
    _, text, script = session(Complete, tokenizer, "!", line[:95], context=100, max_new_tokens=4)
    assert script.prompts == [tokenizer.encode(line[:95])] and "only saw" not in text


def test_every_answer_has_its_own_seed_and_the_flag_repeats_them(tokenizer):
    first, second = (
        session(Chat, tokenizer, "Hey!", *["Hi"] * 3, seed=3)[2].seeds for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3


def test_flags():
    config = parse(["--checkpoint", "runs/x", "--temperature", "0", "--top-p", "0.5"])
    assert config.sampling == Sampling(temperature=0, top_p=0.5)
    for args, named in (
        (["--min-p", "2"], "--min-p 2"),
        (["--serve", "70000"], "--serve 70000"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 needs --serve PORT"),
        (["--max-requests", "2"], "--max-requests 2 needs --serve PORT"),
        (["--serve", "0", "--host", ""], "--host is empty"),
        (["--temperature", "inf"], "--temperature inf must be 0 or above and finite"),
        (["--repetition-penalty", "nan"], "--repetition-penalty nan"),
    ):
        with pytest.raises(UserError, match=named):
            parse(args)


command = partial(forked.run_module, "hamner.chat")


def greedy(model, tokenizer, prompt: list[int], count: int) -> str:
    completion = Completion(
        Generator(model, tokenizer),
        prompt,
        Sampling(temperature=0, repetition_penalty=1),
        max_new_tokens=count,
        stop_ids={tokenizer.eot_id, 1, 2, 3, END},
    )
    return completion.run()


GREEDY_FLAGS = ["--temperature", "0", "--max-new-tokens", "12"]


def test_a_chat_model_from_the_command_line(tmp_path, tokenizer):
    model = sharp(SHAPE)
    save_run(tmp_path / "runs" / "mine", model, chat=True)
    result = command("--system", "Be terse.", *GREEDY_FLAGS, input="Hi\n/quit\n", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    title, hint, answer = result.stdout.split("\n", 2)
    assert title.startswith("runs/mine/checkpoints/step_00000007: ")
    assert title.endswith("on cpu, context 128") or "cuda" in title
    assert hint == "/help lists the commands"
    prompt = render_prompt([Message("system", "Be terse."), Message("user", "Hi")], tokenizer)
    assert answer.startswith(greedy(model, tokenizer, prompt, 12))


def test_extreme_settings_and_any_seed_give_tokens(tmp_path, monkeypatch, capsys):
    run = str(save_run(tmp_path / "mine", sharp(SHAPE)))
    tiny = ["--temperature", "1e-40", "--top-p", "1e-300", "--repetition-penalty", "1e-39"]
    for flags in (
        [*tiny, "--seed", str(10**23), "--max-new-tokens", "1"],
        ["--repetition-penalty", "1e39", "--seed", "-5", "--max-new-tokens", "1"],
        ["--seq-len", "1", "--max-new-tokens", str(10**24)],
    ):
        typing(monkeypatch, "a")
        main(["--checkpoint", run, "--device", "cpu", *flags])
        assert capsys.readouterr().out.splitlines()[-1] != "a"


def typing(monkeypatch, *lines: str) -> None:
    """The function has a command read these lines."""
    console = Console(*lines)
    monkeypatch.setattr("builtins.input", lambda: console.read(""))


def test_an_answer_does_not_command_the_terminal(monkeypatch, capsys):
    for is_terminal, shown in ((True, "\ufffd[2Jé\n"), (False, "\x1b[2Jé\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        write("\x1b[2Jé\n")
        assert capsys.readouterr().out == shown


def test_a_chat_begins_with_the_system_prompt_of_its_data(tmp_path, monkeypatch, capsys):
    run = save_run(tmp_path / "mine", sharp(SHAPE), chat=True)
    path = run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"sft": {"system": "You are Al."}}))
    for flags, shown in (
        ([], "(system prompt: You are Al.)"),
        (["--system", "Be terse."], "(system prompt: Be terse.)"),
        (["--system", ""], "(system prompt: none)"),
    ):
        typing(monkeypatch, "/system")
        main(["--checkpoint", str(run), "--device", "cpu", *flags])
        said = capsys.readouterr().out
        assert said.splitlines()[-1] == shown
        assert ("system prompt, most used in its data: You are Al." in said) == (not flags)


def test_a_base_model_completes(tmp_path, tokenizer, monkeypatch):
    model = sharp(SHAPE)
    run = save_run(tmp_path / "mine", model)
    result = command("--checkpoint", str(run), *GREEDY_FLAGS, input="The history", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "it continues what you write" in result.stdout
    text = greedy(model, tokenizer, tokenizer.encode("The history"), 12)
    assert f"The history{text}\n" in result.stdout
    served = []
    monkeypatch.setattr(ChatServer, "serve", lambda server, _: served.append(server.model))
    main(["--checkpoint", str(run), "--serve", "0", "--device", "cpu"])
    assert [(model.name, model.is_chat) for model in served] == [("mine", False)]


def test_a_context_without_room_for_a_conversation_is_refused(tmp_path, tokenizer):
    run = save_run(tmp_path / "mine", sharp(SHAPE), chat=True)
    needed = len(render_prompt([Message("user", "?")], tokenizer)) + 1
    for length in (1, needed - 1):
        with pytest.raises(UserError, match=f"--seq-len .* give {needed} or more"):
            main(["--checkpoint", str(run), "--seq-len", str(length), "--device", "cpu"])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "--checkpoint: runs/ holds no run"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere is neither"),
        (["--checkpoint", "run", "--seq-len", "129"], "--seq-len 129 is longer"),
        (["--checkpoint", "run", "--system", "Be."], "--system: run/checkpoints/step_00000007 was"),
    ],
)
def test_bad_input_names_what_to_change(args, named, tmp_path, monkeypatch):
    save_run(tmp_path / "run", sharp(SHAPE))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(args)
    assert str(caught.value).startswith(named)


def test_bad_input_is_one_sentence_and_exit_2(tmp_path):
    result = command("--top-k", "-1", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: --top-k -1 must be 0 or above\n"


def test_help_does_not_load_torch():
    output = output_without(["torch"], "hamner.chat", "--help")
    assert {"--temperature", "--min-p", "--serve"} <= set(re.findall(r"--[a-z-]+", output))
