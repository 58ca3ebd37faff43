"""The module says what a document is, where it comes from, and which split it belongs to."""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from hamner.data.shuffle import State

Split = Literal["train", "validation"]

#: Where a row keeps its text, in the order of preference.
TEXT_FIELDS = ("text", "content", "messages")


class Source(Protocol):
    """A source can be known again."""

    def identity(self) -> State:
        """The identity must be equal when a run resumes: JSON, readable where it can be."""


class Extent(NamedTuple):
    """An extent says how much of an epoch was read."""

    done: float
    total: float
    unit: str
    """of both, such as bytes"""


class TextSource(Source, Protocol):
    """A text source gives documents as text. An epoch is resumable after every document."""

    def extent(self, seed: int, epoch: int, state: State | None) -> Extent:
        """The extent is that at a state; an epoch begins with None."""

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The iterator gives one epoch of documents, each with the state to go on after it."""


class TokenSource(Source, Protocol):
    """A token source gives documents as token ids, each ending with the end-of-text token."""

    def tokens(
        self, split: Split, seed: int, epoch: int, state: State | None
    ) -> Iterator[tuple[np.ndarray, State]]:
        """The iterator gives one epoch of a split, each document with the state to go on after it.

        An empty document yields an empty array, for the reader to count.
        """


def document_text(row: Any) -> str:
    """The row is a string, `{"text"}`, `{"content"}` or `{"messages": [{"content"}]}`.

    The messages of a conversation are joined by newlines: in pre-training they are plain text.

    Raises:
        ValueError: with half a sentence that says what is wrong; the caller adds file and row.
    """
    field, value = "text", row
    if isinstance(row, dict):
        field = next((name for name in TEXT_FIELDS if name in row), "")
        if not field:
            found = ", ".join(map(str, row)) or "nothing"
            raise ValueError(f'has no field "text", "content" or "messages" (it has {found})')
        value = row[field]
    if field == "messages":
        value = _conversation_text(value)
    if not isinstance(value, str):
        raise ValueError(f'"{field}" must be a string, not {_json_name(value)}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"{field}" holds half a surrogate pair, which is no text') from error
    return value


def _conversation_text(messages: Any) -> str:
    if not isinstance(messages, list):
        raise ValueError(f'"messages" must be a list, not {_json_name(messages)}')
    contents = [m.get("content") if isinstance(m, dict) else None for m in messages]
    if not all(isinstance(content, str) for content in contents):
        raise ValueError('"messages" holds a message without a "content" string')
    return "\n".join(contents)


def _json_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def split_of(text: str, val_fraction: float) -> Split:
    """The split of a document is a function of its text alone.

    So it does not depend on order, seed, source or file, and a document that occurs twice is
    never on both sides.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"
