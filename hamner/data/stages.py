"""From sources to packed sequences: nested iterators, each yielding (item, state).

    tokens of one source -> endless epochs -> weighted mixture -> packed rows

A state holds the states of the stages before it and says how to go on after its item, so to save
the position of the whole pipeline is to keep the state that came with the last item. States are
small JSON and are never changed once yielded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hamner.data.documents import Split
from hamner.data.shuffle import State
from hamner.data.sources import TokenSource
from hamner.errors import UserError


def epochs(
    source: TokenSource, name: str, seed: int, state: State | None
) -> Iterator[tuple[np.ndarray, State]]:
    """The training documents of one source, without end, each epoch in a new order.

    Args:
        source: to read.
        name: of the source in messages, as the user wrote it.
        seed: of the run.
        state: to go on from; its counters are what `TrainLoader.progress` shows.

    Raises:
        UserError: an epoch without a single training document.
    """
    state = state or {"epoch": 0, "position": None, "tokens": 0, "documents": 0, "skipped": 0}
    while True:
        is_whole, documents_before = state["position"] is None, state["documents"]
        for ids, position in source.tokens("train", seed, state["epoch"], state["position"]):
            is_empty = len(ids) == 0
            state = {
                "epoch": state["epoch"],
                "position": position,
                "tokens": state["tokens"] + len(ids),
                "documents": state["documents"] + (not is_empty),
                "skipped": state["skipped"] + is_empty,
            }
            if not is_empty:
                yield ids, state
        if is_whole and state["documents"] == documents_before:
            raise UserError(
                f"--data {name}: no document to train on ({state['skipped']} empty ones skipped, "
                "the rest, if any, held out for validation)"
            )
        state = {**state, "epoch": state["epoch"] + 1, "position": None}


def one_epoch(source: TokenSource, split: Split, seed: int) -> Iterator[tuple[np.ndarray, State]]:
    """The documents of a split once, with the counter that `mixture` goes by."""
    tokens = 0
    for ids, _ in source.tokens(split, seed, 0, None):
        if len(ids):
            tokens += len(ids)
            yield ids, {"tokens": tokens}


def mixture(
    streams: Sequence[Iterator[tuple[np.ndarray, State]]],
    weights: Sequence[float],
    state: State | None,
) -> Iterator[tuple[np.ndarray, State]]:
    """Takes each document from the stream whose tokens lag its weight the most.

    So the shares of tokens follow the weights to within a document, at any time. A stream that
    ends is left out.
    """
    states = list(state["sources"]) if state else [None] * len(streams)
    live = set(range(len(streams)))
    while live:
        index = min(live, key=lambda i: (_tokens(states[i]) / weights[i], i))
        try:
            ids, states[index] = next(streams[index])
        except StopIteration:
            live.remove(index)
            continue
        yield ids, {"sources": list(states)}


def _tokens(state: State | None) -> int:
    return state["tokens"] if state else 0


@dataclass(frozen=True)
class Rows:
    """Packed sequences of T tokens; row r + 1 goes on where row r ends.

    Attributes:
        inputs: (R, T) int64.
        targets: (R, T) int64, the token after each input.
        document_ids: (R, T) int32, from 0 in each row, non-decreasing.
    """

    inputs: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray


def packed(
    documents: Iterator[tuple[np.ndarray, State]],
    num_rows: int,
    seq_len: int,
    state: State | None,
) -> Iterator[tuple[Rows, State]]:
    """Lays documents end to end and cuts every `num_rows * seq_len` tokens, losing none.

    What is left over at a cut is always the end of the last document. So the state is the state
    before that document and the number of its tokens that were inputs already, which holds for any
    number and length of rows. A stream that ends loses what does not fill the rows.

    Args:
        documents: token ids, going on after `state["documents"]`.
        num_rows: rows of an item.
        seq_len: T.
        state: to go on from.
    """
    before, skip = (state["documents"], state["used"]) if state else (None, 0)
    after = before
    size = num_rows * seq_len
    pieces: list[np.ndarray] = []
    available = 0
    while True:
        while available <= size:  # one token more than the inputs: the last target
            before = after
            try:
                document, after = next(documents)
            except StopIteration:
                return
            pieces.append(document[skip:])
            available += len(document) - skip
            skip = 0
        left = available - size
        pieces[-1] = pieces[-1][: len(pieces[-1]) - left + 1]
        used = len(document) - left
        yield _rows(pieces, num_rows, seq_len), {"documents": before, "used": used}
        pieces, available = [document[used:]], left


def _rows(pieces: list[np.ndarray], num_rows: int, seq_len: int) -> Rows:
    tokens = np.concatenate(pieces).astype(np.int64)
    document = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(p) for p in pieces])
    shape = (num_rows, seq_len)
    document = document[:-1].reshape(shape)
    return Rows(tokens[:-1].reshape(shape), tokens[1:].reshape(shape), document - document[:, :1])
