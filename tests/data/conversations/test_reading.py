"""Conversations from files: three forms, and what is refused."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest

from hamner.data.chat_template import Message
from hamner.data.conversations.reading import Conversation, parse_conversation, read_conversations
from hamner.data.specs import parse_specs
from hamner.errors import UserError

MESSAGES = (
    Message("system", "Be terse."),
    Message("user", "Hi"),
    Message("assistant", "Hey!"),
    Message("user", "2+2"),
    Message("assistant", "4."),
)
OPENAI = {"messages": [{"role": m.role, "content": m.content} for m in MESSAGES]}
SHARE_GPT = {
    "id": "x",
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}.get(m.role, m.role), "value": m.content}
        for m in MESSAGES
    ],
}
TEXT = {
    "text": "<|system|>\nBe terse.\n<|user|>\nHi\n<|assistant|>\nHey!\n<|user|>\n2+2\n"
    "<|assistant|>\n4.\n"
}


def write(path: Path, *rows) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read(*specs: str) -> list[Conversation]:
    return [
        conversation for spec in parse_specs(specs) for conversation in read_conversations(spec)
    ]


@pytest.mark.parametrize("row", [OPENAI, SHARE_GPT, TEXT])
def test_three_forms_of_one_conversation(row):
    assert parse_conversation(row) == MESSAGES


def test_end_tokens_in_text_are_not_content():
    marked = (
        TEXT["text"].replace("Hey!\n", "Hey!<|end|>\n").replace("4.\n", "4.<|end|><|endoftext|>")
    )
    assert parse_conversation({"text": marked}) == MESSAGES


def test_one_file_may_mix_the_forms(tmp_path):
    path = write(tmp_path / "mixed.jsonl", OPENAI, SHARE_GPT)
    path.write_text(path.read_text() + "\n\n" + json.dumps(TEXT), encoding="utf-8-sig")
    conversations = read(str(path))
    assert [c.messages for c in conversations] == [MESSAGES] * 3
    assert [c.origin for c in conversations] == ["mixed.jsonl:1", "mixed.jsonl:2", "mixed.jsonl:5"]


def test_folders_globs_and_compression(tmp_path):
    plain = write(tmp_path / "a.jsonl", OPENAI).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain, mtime=0))
    with pyarrow.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as stream:
        stream.write(plain)
    assert [c.messages for c in read(str(tmp_path))] == [MESSAGES] * 3
    assert [c.origin for c in read(f"{tmp_path}/*.jsonl")] == ["a.jsonl:1"]


def test_builtin_set_is_short_dialogues_with_answers():
    conversations = read("builtin")
    assert len(conversations) >= 50
    assert len({c.messages for c in conversations}) == len(conversations)
    for conversation in conversations:
        roles = [m.role for m in conversation.messages if m.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(m.content.strip() == m.content != "" for m in conversation.messages)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (["Hi"], "must be a JSON object"),
        ({"prompt": "Hi"}, "it has prompt"),
        ({}, "it has nothing"),
        ({"messages": "Hi"}, '"messages" must be a list'),
        ({"messages": []}, "holds no message"),
        ({"messages": [{"role": "user"}]}, '"role" and "content"'),
        ({"messages": [{"role": "user", "content": None}]}, '"role" and "content"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, 'the role "tool"'),
        ({"conversations": [{"from": "robot", "value": "x"}]}, 'the role "robot"'),
        ({"text": 5}, '"text" must be a string'),
        ({"text": "Just prose."}, "must begin with one of <|system|>"),
        ({"text": "Prose <|user|>\nHi"}, "must begin with one of <|system|>"),
        ({"text": "<|user|>\n\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_by_line(tmp_path, row, named):
    path = write(tmp_path / "bad.jsonl", OPENAI, row)
    with pytest.raises(UserError) as caught:
        read(str(path))
    assert f"--data {path}, line 2: " in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b"{not json\n", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 50, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.zst", b"no zstd", "cannot be read"),
        ("a.txt", b"Hi", "read from .jsonl files"),
    ],
)
def test_damaged_files_are_one_sentence(tmp_path, name, content, named):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="--data") as caught:
        read(str(path))
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


def test_other_kinds_of_data_are_refused():
    with pytest.raises(UserError, match=r"hf:a/b: conversations are read from \.jsonl files"):
        read("hf:a/b")
    with pytest.raises(UserError, match="no such file or folder"):
        read("missing.jsonl")
