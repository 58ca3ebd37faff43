"""Sources of token sequences: text that is split and tokenized on the way, or shards."""

import itertools
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from hamner.data.documents import Split, split_of
from hamner.data.shuffle import State
from hamner.data.specs import Spec
from hamner.data.tokenizer import Tokenizer

#: Documents that are read ahead of the tokenizer, which works on many at once.
DOCUMENTS_PER_BATCH = 128


class TextSource(Protocol):
    """Documents as text. An epoch is resumable after every document."""

    def identity(self) -> State:
        """What must be equal when a run resumes: JSON, readable where it can be."""
        ...

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """One epoch of documents, each with the state to go on after it."""
        ...


class TokenSource(Protocol):
    """Documents as token ids, each ending with the end-of-text token."""

    def identity(self) -> State:
        """As of `TextSource`."""
        ...

    def tokens(
        self, split: Split, seed: int, epoch: int, state: State | None
    ) -> Iterator[tuple[np.ndarray, State]]:
        """One epoch of a split, each document with the state to go on after it.

        An empty document yields an empty array, for the reader to count.
        """
        ...


def open_text_source(spec: Spec) -> TextSource:
    """The reader of a spec that gives text; it reads on after a disk's or network's errors.

    Raises:
        UserError: nothing to read there.
    """
    if spec.kind == "builtin":
        from hamner.data.builtin import BuiltinSource

        return BuiltinSource()
    from hamner.data.retry import RetriedSource

    if spec.kind == "hub":
        from hamner.data.hub import HubSource

        return RetriedSource(HubSource(spec.location), spec.text)
    from hamner.data.files import FileSource

    return RetriedSource(FileSource(spec.location), spec.text)


def open_source(spec: Spec, tokenizer: Tokenizer, val_fraction: float) -> TokenSource:
    """The reader of any spec. Shards were split when they were prepared.

    Raises:
        UserError: nothing to read there, or shards of another tokenizer.
    """
    if spec.kind == "shards":
        from hamner.data.shards import ShardSource

        return ShardSource(spec.location, tokenizer)
    return TokenizedText(open_text_source(spec), tokenizer, val_fraction)


def tokenized(
    documents: Iterator[tuple[str, State]],
    tokenizer: Tokenizer,
    val_fraction: float,
    split: Split | None = None,
) -> Iterator[tuple[Split, np.ndarray, State]]:
    """Splits and encodes documents, many at once; `split` leaves the other one out.

    Yields:
        Split, token ids (int32, empty for a document without text) and state of each document.
    """
    while batch := list(itertools.islice(documents, DOCUMENTS_PER_BATCH)):
        kept = [
            (text, of, state)
            for text, state in batch
            if (of := split_of(text, val_fraction)) == split or split is None
        ]
        encoded = tokenizer.encode_batch([text for text, _, _ in kept])
        for ids, (text, of, state) in zip(encoded, kept, strict=True):
            ids = [*ids, tokenizer.eot_id] if text.strip() else []
            yield of, np.array(ids, dtype=np.int32), state


class TokenizedText:
    """Text, split by the hash of each document and tokenized on the way."""

    def __init__(self, source: TextSource, tokenizer: Tokenizer, val_fraction: float) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._val_fraction = val_fraction

    def identity(self) -> State:
        return self._source.identity()

    def tokens(
        self, split: Split, seed: int, epoch: int, state: State | None
    ) -> Iterator[tuple[np.ndarray, State]]:
        documents = self._source.documents(seed, epoch, state)
        for _, ids, after in tokenized(documents, self._tokenizer, self._val_fraction, split):
            yield ids, after
