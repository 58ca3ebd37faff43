"""The module opens sources of token sequences: text, split and tokenized on the way, or shards."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from hamner.data.bad_rows import BadRows
from hamner.data.builtin import BuiltinSource
from hamner.data.documents import Split, TextSource, TokenSource, split_of
from hamner.data.files import FileSource
from hamner.data.hub import HubSource
from hamner.data.retry import RetriedSource
from hamner.data.shards import ShardSource
from hamner.data.shuffle import State
from hamner.data.specs import Spec
from hamner.data.tokenizer import Tokenizer

#: Documents that are read ahead of the tokenizer, which works on many at once.
DOCUMENTS_PER_BATCH = 128


def open_text_source(spec: Spec, bad_rows: BadRows) -> TextSource:
    """The function opens a spec that gives text; what it opens reads on after a network's errors.

    Args:
        spec: of the source.
        bad_rows: counts those of the source.

    Raises:
        UserError: nothing to read there.
    """
    if spec.kind == "builtin":
        return BuiltinSource()
    kind = HubSource if spec.kind == "hub" else FileSource
    return RetriedSource(kind(spec.location, bad_rows), spec.text)


def open_source(
    spec: Spec, tokenizer: Tokenizer, val_fraction: float, bad_rows: BadRows
) -> TokenSource:
    """The function opens any spec. Shards were split when they were prepared.

    Raises:
        UserError: nothing to read there, or shards of another tokenizer.
    """
    if spec.kind == "shards":
        return RetriedSource(ShardSource(spec.location, tokenizer), spec.text)
    return TokenizedText(open_text_source(spec, bad_rows), tokenizer, val_fraction)


def describe(sources: Any) -> str:
    """The function says what sources are, from a saved state, which may be damaged."""
    descriptions = []
    try:
        for source in sources:
            identity = ", ".join(f"{key} {value}" for key, value in source["identity"].items())
            weight = f"={source['weight']:g}" if "weight" in source else ""
            descriptions.append(f"{source['spec']}{weight} ({identity})")
    except (AttributeError, KeyError, TypeError, ValueError):
        return "damaged"
    return " ".join(descriptions)


def tokenized(
    documents: Iterator[tuple[str, State]],
    tokenizer: Tokenizer,
    val_fraction: float,
    split: Split | None = None,
) -> Iterator[tuple[Split, np.ndarray, State]]:
    """The function splits and encodes documents, many at once; `split` leaves the other one out.

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
    """Text is split by the hash of each document and tokenized on the way."""

    def __init__(self, source: TextSource, tokenizer: Tokenizer, val_fraction: float) -> None:
        self._source, self._tokenizer = source, tokenizer
        self._val_fraction = val_fraction
        self.identity = source.identity

    def tokens(
        self, split: Split, seed: int, epoch: int, state: State | None
    ) -> Iterator[tuple[np.ndarray, State]]:
        documents = self._source.documents(seed, epoch, state)
        for _, ids, after in tokenized(documents, self._tokenizer, self._val_fraction, split):
            yield ids, after
