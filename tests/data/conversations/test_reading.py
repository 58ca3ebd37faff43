"""Conversations from files and the hub, and rows that cannot be used."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hamner.data import retry
from hamner.data.chat_template import Message
from hamner.data.conversations import reading
from hamner.data.conversations.reading import Conversation, Unusable, read_conversations
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


def read(*specs: str) -> list[Conversation | Unusable]:
    return [
        conversation for spec in parse_specs(specs) for conversation in read_conversations(spec)
    ]


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


def test_rows_that_cannot_be_used_are_told_by_kind_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    write(path, OPENAI, {"messages": []}, OPENAI, ["Hi"])
    path.write_bytes(path.read_bytes() + b'{not json\n{"text": "\xff"}\n' + b"[" * 100_000)
    assert [row for row in read(str(path)) if isinstance(row, Unusable)] == [
        Unusable("holds no message", "bad.jsonl", 2),
        Unusable("a conversation must be a JSON object", "bad.jsonl", 4),
        Unusable("not JSON (Expecting property name enclosed in double quotes)", "bad.jsonl", 5),
        Unusable("not UTF-8", "bad.jsonl", 6),
        Unusable("nested too deeply", "bad.jsonl", 7),
    ]


def test_a_table_has_conversations(tmp_path, monkeypatch):
    """Fields of other rows are null in each; it is in memory three rows at a time."""
    monkeypatch.setattr(reading, "PARQUET_ROWS", 3)
    path = tmp_path / "a.parquet"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": "{}"}}]}
    empty = dict.fromkeys(["id", "messages", "prompt", "completion"])
    rows = [
        {"messages": [{"role": "user", "content": "Hi", "weight": 1}, call]},
        OPENAI | {"id": 1},
        {"prompt": "Hi", "completion": "Hey!"},
        {"id": 2},
    ]
    table = pyarrow.Table.from_pylist([empty | row for row in rows])
    pyarrow.parquet.write_table(table, path)
    found = read(str(path))
    assert found[1] == Conversation(MESSAGES, "a.parquet:1")
    assert found[2].messages == (Message("user", "Hi"), Message("assistant", "Hey!"))
    assert (type(found[3]), found[3].number) == (Unusable, 3)
    assert '"name": "w"' in found[0].messages[1].content


def test_a_table_without_conversations_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "score": [2]}), path)
    with pytest.raises(UserError, match=r'no column "messages".*it has id, score'):
        read(str(path))


def test_one_array_or_lines_by_the_name_of_json(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([OPENAI, SHARE_GPT], indent=1))
    assert read(str(path)) == [
        Conversation(MESSAGES, "alpaca.json:0"),
        Conversation(MESSAGES, "alpaca.json:1"),
    ]
    assert read(str(write(path, OPENAI))) == [Conversation(MESSAGES, "alpaca.json:1")]


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "chats").mkdir(parents=True)
    write(tmp_path / "me" / "chats" / "train.jsonl", OPENAI, {"messages": []}, OPENAI)
    assert read("hf:me/chats") == [
        Conversation(MESSAGES, "hf:me/chats:0"),
        Unusable("holds no message", "hf:me/chats", 1),
        Conversation(MESSAGES, "hf:me/chats:2"),
    ]


def test_a_data_set_is_read_on_after_an_error(monkeypatch):
    class Dataset:
        """The data set fails once, after its second row; whoever reads it again begins at the
        first row, or at the one of a state."""

        begin, state, has_failed = 0, 0, False

        def __iter__(self):
            self.state, self.begin = self.begin, 0
            while self.state < 4:
                if self.state == 2 and not self.has_failed:
                    self.has_failed = True
                    raise ConnectionError("gone")
                self.state += 1
                yield {"prompt": str(self.state), "completion": "x"}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.begin = state

    monkeypatch.setattr(reading, "open_location", lambda _: Dataset())
    monkeypatch.setattr(retry, "FIRST_DELAY_SECONDS", 0.0)
    found = read("hf:me/chats")
    assert [c.messages[0].content for c in found] == ["1", "2", "3", "4"]
    assert [c.origin for c in found] == [f"hf:me/chats:{n}" for n in range(4)]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl.gz", gzip.compress(b"{}" * 50, mtime=0)[:-9], "damaged compressed file"),
        ("a.jsonl.zst", b"no zstd", "its content is not zst"),
        ("a.txt", b"Hi", "read from .jsonl files"),
        ("a.parquet", b"PAR1 no parquet", "not a readable parquet file"),
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
    with pytest.raises(UserError, match="shards:x: conversations are not read from shards"):
        read("shards:x")
    with pytest.raises(UserError, match="no such file or folder"):
        read("missing.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_wide_encodings_are_named(tmp_path, name, encoding):
    data = f"{json.dumps(OPENAI)}\n".encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=rf"is {encoding[:6].upper()}, not UTF-8; convert it"):
        read(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.zst"])
def test_content_of_another_kind_than_the_name_says_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps(OPENAI).encode(), mtime=0))
    with pytest.raises(UserError, match=r"its content is (gz; rename|not (parquet|zst), though)"):
        read(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_nul_bytes_are_named(tmp_path, name):
    """A crash leaves them at the end of a file."""
    path = write(tmp_path / name, OPENAI)
    path.write_bytes(path.read_bytes() + bytes(4096))
    good, bad = read(str(path))
    assert good.messages == MESSAGES
    assert (bad.kind, bad.number) == ("holds NUL bytes, as binary files and those of a crash do", 2)
