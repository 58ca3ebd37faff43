"""Conversations are read from files, in the three forms people keep them in.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey!"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey!"}]}
    {"text": "<|user|>\nHi\n<|assistant|>\nHey!\n"}

A file may mix them. The built-in set is a file of the first form that Hamner ships.
"""

import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

from hamner.data.chat_template import END_TOKEN, ROLE_TOKENS, Message, Role
from hamner.data.files import find_files, open_bytes
from hamner.data.specs import Spec
from hamner.data.tokenizer import END_OF_TEXT
from hamner.errors import UserError
from hamner.files import parse_json

BUILTIN_FILE = "builtin.jsonl"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd")

#: The roles of ShareGPT's `from`, and of `role`, by the names that are seen there.
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
_TURN = re.compile("|".join(map(re.escape, ROLE_TOKENS.values())))
_TOKEN_ROLES = {token: role for role, token in ROLE_TOKENS.items()}


@dataclass(frozen=True)
class Conversation:
    """A conversation is messages, and where they were read."""

    messages: tuple[Message, ...]
    origin: str
    """for people: `file:line`"""


def read_conversations(spec: Spec) -> list[Conversation]:
    """The conversations are all of a `--data` spec: builtin, a file, folder or glob of JSON lines.

    Raises:
        UserError: not such a spec, a file that cannot be read, or a row that is no conversation,
            by file and line.
    """
    if spec.kind == "builtin":
        resource = resources.files("hamner.data.conversations").joinpath(BUILTIN_FILE)
        with resource.open("rb") as stream:
            return list(_parse_lines(stream, "builtin"))
    if spec.kind != "files":
        raise UserError(
            f"--data {spec.text}: conversations are read from .jsonl files; "
            "give a file, a folder, a glob or builtin"
        )
    conversations: list[Conversation] = []
    for path in find_files(spec.location):
        if not path.name.lower().endswith(SUFFIXES):
            raise UserError(
                f"--data {path}: conversations are read from .jsonl files "
                "(also with .gz, .zst or .zstd)"
            )
        try:
            # Arrow's streams have no lines of their own.
            with io.BufferedReader(open_bytes(path)) as stream:
                conversations.extend(_parse_lines(stream, str(path)))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"--data {path}: cannot be read ({error})") from error
    return conversations


def _parse_lines(stream: IO[bytes], name: str) -> Iterator[Conversation]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            # A byte order mark may open the first line.
            messages = parse_conversation(parse_json(line.decode("utf-8-sig")))
        except ValueError as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"not JSON ({error.msg})"
            elif isinstance(error, UnicodeDecodeError):
                reason = f"not UTF-8 at byte {error.start}"
            raise UserError(f"--data {name}, line {number}: {reason}") from error
        yield Conversation(messages, f"{Path(name).name}:{number}")


def parse_conversation(row: Any) -> tuple[Message, ...]:
    """The row has messages in any of the three forms; at least one.

    Raises:
        ValueError: with half a sentence that says what is wrong; the caller adds file and line.
    """
    if not isinstance(row, dict):
        raise ValueError("a conversation must be a JSON object")
    if "messages" in row:
        messages = _parse_list(row["messages"], "messages", "role", "content")
    elif "conversations" in row:
        messages = _parse_list(row["conversations"], "conversations", "from", "value")
    elif "text" in row:
        messages = _parse_text(row["text"])
    else:
        found = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f'has no field "messages", "conversations" or "text" (it has {found})')
    if not messages:
        raise ValueError("holds no message")
    for message in messages:
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise ValueError("holds half a surrogate pair, which is no text") from error
    return messages


def _parse_list(rows: Any, field: str, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(rows, list):
        raise ValueError(f'"{field}" must be a list')
    messages = []
    for row in rows:
        role = row.get(role_key) if isinstance(row, dict) else None
        content = row.get(content_key) if isinstance(row, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f'"{field}" holds a message without the strings "{role_key}" and "{content_key}"'
            )
        if role not in ROLES:
            raise ValueError(f'has the role "{role}", not one of {", ".join(ROLES)}')
        messages.append(Message(ROLES[role], content))
    return tuple(messages)


def _parse_text(text: Any) -> tuple[Message, ...]:
    """Role tokens open the turns; end tokens at a turn's end are not part of its content."""
    if not isinstance(text, str):
        raise ValueError('"text" must be a string')
    openings = list(_TURN.finditer(text))
    if not openings or text[: openings[0].start()].strip():
        raise ValueError(f'"text" must begin with one of {", ".join(ROLE_TOKENS.values())}')
    ends = [opening.start() for opening in openings[1:]] + [len(text)]
    messages = []
    for opening, end in zip(openings, ends, strict=True):
        content = text[opening.end() : end].strip().removesuffix(END_OF_TEXT).rstrip()
        content = content.removesuffix(END_TOKEN).strip()
        messages.append(Message(_TOKEN_ROLES[opening.group()], content))
    return tuple(messages)
