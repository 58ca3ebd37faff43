"""Conversations to examples: mask, cut at a turn boundary, split, counts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hamner.data.chat_template import Message, render
from hamner.data.conversations import examples
from hamner.data.conversations.examples import ConversationSource, load_examples, most_used_system
from hamner.data.loader import DataConfig
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError

#: One token a character: lengths can be counted by eye.
TOKENIZER = load_tokenizer(vocab_size=261)


def write(path: Path, *conversations: list[tuple[str, str]]) -> str:
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in conversation]}
        for conversation in conversations
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def load(*specs: str, seq_len: int = 64, val_fraction: float = 0.0) -> list[ConversationSource]:
    config = DataConfig(specs, seq_len, 1, 0, val_fraction, bad_rows=0.1)
    return load_examples(config, TOKENIZER)


def spelled(example) -> str:
    """The text with what is learned in brackets."""
    text, inside = "", False
    for token, learned in zip(example.ids, example.learned, strict=True):
        if learned != inside:
            text += "[" if learned else "]"
            inside = learned
        text += TOKENIZER.decode([int(token)])
    return f"{text}]" if inside else text


HI = [("user", "Hi"), ("assistant", "Hey!")]
LONG = [*HI, ("user", "And"), ("assistant", "x" * 50)]


def test_ids_and_mask_are_the_templates(tmp_path):
    (source,) = load(write(tmp_path / "a.jsonl", HI))
    (example,) = source.train
    rendered = render([Message("user", "Hi"), Message("assistant", "Hey!")], TOKENIZER)
    assert example.ids.tolist() == rendered.ids
    assert example.learned.tolist() == rendered.learned
    assert example.ids.dtype == np.int32
    assert spelled(example) == "<|user|>\nHi\n<|assistant|>\n[Hey!<|end|>]"


@pytest.mark.parametrize(("seq_len", "is_cut"), [(11, True), (69, True), (70, False)])
def test_cut_after_the_last_answer_that_fits(tmp_path, seq_len, is_cut):
    """HI has 12 tokens and so 11 positions, LONG 71 tokens."""
    (source,) = load(write(tmp_path / "a.jsonl", LONG), seq_len=seq_len)
    (example,) = source.train
    whole = len(render([Message(*turn) for turn in LONG], TOKENIZER).ids)
    assert example.length <= seq_len
    assert source.cut == (["a.jsonl:1"] if is_cut else [])
    assert source.tokens_cut == whole - len(example.ids)
    assert spelled(example).startswith("<|user|>\nHi\n<|assistant|>\n[Hey!<|end|>]")
    assert ("x" in spelled(example)) == (not is_cut)


def test_all_that_fits_is_kept_and_what_does_not_is_counted(tmp_path):
    data = write(tmp_path / "a.jsonl", [*HI, *HI, *HI])
    (source,) = load(data, seq_len=2 * 12 + 5)
    assert [len(example.ids) for example in source.train] == [2 * 12]
    assert source.tokens_cut == 12


def test_the_end_of_the_text_has_its_room_too(tmp_path):
    """Where tags are text, it follows the last answer."""
    data, tokenizer = write(tmp_path / "a.jsonl", HI), TOKENIZER.with_text_tags()
    turns = [Message(*turn) for turn in HI]
    ids = [*render(turns, tokenizer).ids, tokenizer.eot_id]
    fits, too_long = (
        load_examples(DataConfig((data,), seq_len, 1, 0, 0.0), tokenizer)[0]
        for seq_len in (len(ids) - 1, len(ids) - 2)
    )
    assert [example.ids.tolist() for example in fits.train] == [ids]
    assert fits.train[0].learned[-1]
    assert (too_long.train, too_long.too_long) == ([], ["a.jsonl:1"])


def test_exactly_a_row_fits_and_one_token_more_does_not(tmp_path):
    data = write(tmp_path / "a.jsonl", HI)
    length = len(render([Message(*turn) for turn in HI], TOKENIZER).ids) - 1
    (fits,) = load(data, seq_len=length)
    assert [example.length for example in fits.train] == [length]
    (too_long,) = load(data, seq_len=length - 1)
    assert too_long.train == []
    assert too_long.too_long == ["a.jsonl:1"]


def test_what_follows_the_last_answer_is_left_out(tmp_path):
    data = write(tmp_path / "a.jsonl", [*HI, ("user", "bye")])
    (source,) = load(data)
    assert spelled(source.train[0]).endswith("<|end|>]")
    assert source.cut == []


def test_nothing_learned_is_dropped_and_named(tmp_path):
    data = write(tmp_path / "a.jsonl", HI, [("user", "Hi")], [("user", "Hi"), ("assistant", " ")])
    (source,) = load(data)
    assert len(source.train) == 1
    assert source.nothing_learned == ["a.jsonl:2", "a.jsonl:3"]


def test_an_answer_of_weight_0_is_read_and_not_learned(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No", "weight": 0}]
    more = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yo", "weight": 1}]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, turns + more)))
    (source,) = load(str(path))
    assert [spelled(example) for example in source.train] == [
        "<|user|>\nHi\n<|assistant|>\nNo<|end|><|user|>\nSo?\n<|assistant|>\n[Yo<|end|>]"
    ]
    assert source.nothing_learned == ["a.jsonl:1"]


def test_a_spec_without_a_weight_has_weight_1_beside_one_that_has(tmp_path):
    first, second = (write(tmp_path / name, HI) for name in ("a.jsonl", "b.jsonl"))
    assert [source.weight for source in load(f"{first}=2", second)] == [2, 1]


def add_bad_rows(path: str) -> None:
    """The function adds rows of three kinds behind what the file has."""
    with Path(path).open("a") as file:
        file.write("oops\n" * 3 + '{"messages": []}\n' + "oops\n" + '{"id": 1}\n')


def test_unusable_rows_are_counted_by_kind_and_line_and_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", *[HI] * 60)
    add_bad_rows(path)
    (source,) = load(path)
    assert len(source.train) == 60
    assert (source.rows, source.num_unusable) == (66, 6)
    assert [text.replace(" (Expecting value)", "") for text in source.describe_unusable()] == [
        "4 not JSON: a.jsonl:61-63, 65",
        "1 holds no message: a.jsonl:64",
        '1 has no field "messages", "conversations" or "text", and no pair such as "prompt" and '
        '"completion" (it has id): a.jsonl:66',
    ]


def test_too_many_of_them_are_refused_all_at_once(tmp_path):
    first = write(tmp_path / "a.jsonl", *[HI] * 54)
    second = write(tmp_path / "b.jsonl", *[HI] * 53)
    for path in (first, second):
        add_bad_rows(path)
    # 6 of 60 are a tenth, 6 of 59 are more.
    with pytest.raises(UserError) as caught:
        load(first, second)
    assert f"--data {second}: 6 of 59 rows cannot be used (4 not JSON" in str(caught.value)
    assert "1 holds no message: b.jsonl:57;" in str(caught.value)
    assert "--bad-rows SHARE (now 0.1)" in str(caught.value)
    assert first not in str(caught.value)
    config = DataConfig((first, second), 64, 1, 0, 0.0)
    assert len(load_examples(replace(config, bad_rows=0.2), TOKENIZER)) == 2
    with pytest.raises(UserError) as caught:
        load_examples(replace(config, bad_rows=0.0), TOKENIZER)
    assert "a.jsonl: 6 of 60" in str(caught.value)
    assert "b.jsonl: 6 of 59" in str(caught.value)


def test_an_endless_source_without_a_conversation_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "GIVE_UP_ROWS", 20)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "prose", str(i): i}) + "\n" for i in range(90)))
    with pytest.raises(UserError, match="20 of 20 rows cannot be used"):
        load(str(path))
    path.write_text("".join(json.dumps({str(i): i}) + "\n" for i in range(90)))
    with pytest.raises(UserError, match="12 of 12 kinds more"):
        load(str(path))
    (source,) = load(write(path, *[HI] * 30))
    assert len(source.train) == 30


@pytest.mark.parametrize(
    ("systems", "weights", "expected"),
    [
        ([["A", "B", "B", ""], []], (1, 1), "B"),
        ([["A", "B", "B"], ["A"]], (1, 3), "A"),
        ([[""] * 9 + ["A", "B", "B"], []], (1, 1), "B"),
        ([[""] * 59 + ["A"] * 12, []], (1, 1), ""),
        ([[""], []], (1, 1), ""),
    ],
)
def test_the_system_prompt_used_most(tmp_path, systems, weights, expected):
    specs = [
        write(tmp_path / f"{i}.jsonl", *([("system", f" {s}\n"), *HI] if s else HI for s in texts))
        + f"={weight}"
        for i, (texts, weight) in enumerate(zip(systems, weights, strict=True))
    ]
    assert most_used_system(load(*specs)) == expected


def test_duplicates_are_counted_over_all_sources_and_kept(tmp_path):
    first = write(tmp_path / "a.jsonl", HI, HI)
    others = [("user", " Hi "), ("assistant", "Hey!")], [("assistant", "Hi"), ("user", "Hey!")]
    second = write(tmp_path / "b.jsonl", *others)
    sources = load(first, second)
    assert [source.duplicates for source in sources] == [1, 1]
    assert [len(source.train) for source in sources] == [2, 2]


def test_split_holds_out_by_content_alone(tmp_path):
    conversations = [[("user", str(i)), ("assistant", "ok")] for i in range(200)]
    first = write(tmp_path / "a.jsonl", *conversations)
    second = write(tmp_path / "b.jsonl", *reversed(conversations))
    sources = load(first, second, val_fraction=0.2)
    texts = [[sorted(map(spelled, part)) for part in (s.train, s.validation)] for s in sources]
    assert texts[0] == texts[1]
    assert 20 < len(texts[0][1]) < 60
    assert not set(texts[0][0]) & set(texts[0][1])
