"""The lint before fine-tuning: counts, names of odd conversations, a preview."""

import io
import json

import pytest
from rich.console import Console

from hamner.data.conversations.examples import UnusableRows, load_examples
from hamner.data.conversations.lint import describe, preview, show, show_unusable
from hamner.data.loader import DataConfig
from hamner.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(vocab_size=261)


def conversation(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def load(tmp_path, *rows, weight: str = ""):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = DataConfig((f"{path}{weight}",), 40, 1, 0, 0.0, bad_rows=0.1)
    (source,) = load_examples(config, TOKENIZER)
    return source


def test_every_case_is_counted_and_named(tmp_path):
    source = load(
        tmp_path,
        conversation("Hi", "Hey!"),
        conversation("Hi", "Hey!"),
        conversation("Hi", "Hey!", "More", "x" * 40),
        conversation("Hi", "x" * 40),
        *[conversation("Hi")] * 7,
        weight="=2",
    )
    size, nothing, too_long, cut, duplicates = describe(source)
    assert size == (
        f"{tmp_path}/a.jsonl: 3 conversations to train on, 2 times an epoch, 0 held out; "
        "36 tokens, 41.7% of them supervised"
    )
    assert nothing == (
        "  7 dropped, no answer to learn: a.jsonl:5; a.jsonl:6; a.jsonl:7; a.jsonl:8; a.jsonl:9 "
        "and 2 more"
    )
    assert too_long == "  1 dropped, the first answer ends beyond --seq-len: a.jsonl:4"
    assert cut == "  1 cut after the last answer within --seq-len (50 tokens lost): a.jsonl:3"
    assert duplicates == "  7 repeat an earlier conversation and are kept"


def test_data_do_not_command_the_terminal(tmp_path):
    bad = {"messages": [{"role": "\x1b[2J", "content": "x"}]}
    source = load(tmp_path, *[conversation("\x1b[2JHi", "Hey!\x07")] * 20, bad)
    show([source], TOKENIZER, Console(file=(said := io.StringIO()), force_terminal=False))
    assert "Hi" in said.getvalue() and "cannot be used" in said.getvalue()
    assert not set("\x1b\x07") & set(said.getvalue())


def test_rows_left_out_are_named(tmp_path):
    rows = [conversation("Hi", "Hey!")] * 20
    _, unusable, _ = describe(load(tmp_path, *rows, {"messages": []}, {"messages": []}))
    assert unusable == "  cannot be used and left out: 2 holds no message: a.jsonl:21-22"


def test_clean_data_is_one_line(tmp_path):
    assert len(describe(load(tmp_path, conversation("Hi", "Hey!")))) == 1


def test_preview_sets_off_what_is_learned(tmp_path):
    (example,) = load(tmp_path, conversation("Hi", "Hey!", "2+2", "4.")).train
    plain = preview(example, TOKENIZER, coloured=False).plain
    assert plain.endswith(
        "<|user|>\nHi\n<|assistant|>\n[[Hey!<|end|>]]<|user|>\n2+2\n<|assistant|>\n[[4.<|end|>]]"
    )
    coloured = preview(example, TOKENIZER, coloured=True)
    styled = [coloured.plain[s.start : s.end] for s in coloured.spans if "green" in str(s.style)]
    assert styled == ["Hey!<|end|>", "4.<|end|>"]


def test_show_prints_everything_and_escapes_nothing_twice(tmp_path):
    source = load(tmp_path, conversation("[red]Hi[/red]", "Hey!"))
    console = Console(record=True, width=80, file=(tmp_path / "out").open("w"))
    show([source], TOKENIZER, console)
    text = console.export_text()
    assert "1 conversations to train on" in text
    assert "[red]Hi[/red]" in text
    assert "[[Hey!<|end|>]]" in text


@pytest.mark.parametrize("kinds", [2, 8])
def test_kinds_that_the_sentence_has_no_room_for_are_listed_before_it(tmp_path, kinds):
    path = tmp_path / "rows.jsonl"
    names = [str(number) * 40 for number in range(kinds)]
    path.write_text("".join(f'{{"{name}": "{name * 2}"}}\n' for name in names))
    with pytest.raises(UnusableRows) as caught:
        load_examples(DataConfig((str(path),), 64, 1, 0, 0.0), TOKENIZER)
    console = Console(record=True, file=io.StringIO())
    show_unusable(caught.value, console)
    text = console.export_text()
    said = str(caught.value) + text
    assert all(f"(it has {name}): rows.jsonl:{n}" in said for n, name in enumerate(names, 1))
    assert bool(text) == (kinds == 8)
