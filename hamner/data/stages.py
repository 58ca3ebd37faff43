"""From sources to packed sequences: nested iterators, each yielding (item, state).

    tokens of one source -> endless epochs -> weighted mixture -> packed rows

A state holds the states of the stages before it and says how to go on after its item, so to save
the position of the whole pipeline is to keep the state that came with the last item. States are
small JSON and are never changed once yielded.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hamner.data.documents import Split, TokenSource
from hamner.data.shuffle import State
from hamner.errors import UserError

logger = logging.getLogger(__name__)

#: A lost source is asked again after so many tokens of the others: half an hour or more at the
#: speeds of one GPU, so that waiting for one that is still dead costs little.
LOST_TOKENS = 50_000_000


class SourceLost(UserError):
    """A source that has given documents and now fails: others can take its place."""


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
        SourceLost: it fails after its first document, or has none left.
        UserError: it fails before, or has none at all.
    """
    state = state or {"epoch": 0, "position": None, "tokens": 0, "documents": 0, "skipped": 0}
    try:
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
                    f"--data {name}: no document to train on ({state['skipped']} empty ones "
                    "skipped, the rest, if any, held out for validation)"
                )
            state = {**state, "epoch": state["epoch"] + 1, "position": None}
            _announce_epoch(name, state["epoch"])
    except UserError as error:
        if state["documents"] == 0:
            raise
        raise SourceLost(str(error)) from error


def _announce_epoch(name: str, epoch: int) -> None:
    """Says that documents come again: the 1st, 2nd, 4th, 8th ... time."""
    if epoch & (epoch - 1) == 0:
        logger.warning(
            "--data %s: all of it has been read %d times over; its documents come again",
            name,
            epoch,
        )


def one_epoch(source: TokenSource, split: Split, seed: int) -> Iterator[tuple[np.ndarray, State]]:
    """The documents of a split once, with the counter that `mixture` goes by."""
    tokens = 0
    for ids, _ in source.tokens(split, seed, 0, None):
        if len(ids):
            tokens += len(ids)
            yield ids, {"tokens": tokens}


@dataclass(frozen=True)
class WeightedStream:
    """A source as `mixture` sees it.

    Attributes:
        name: in messages, as the user wrote it.
        weight: share of the tokens, relative to the others' weights.
        read: its documents, each with the state to go on after it, from a state on (None: from the
            beginning). A state counts the `tokens` so far.
    """

    name: str
    weight: float
    read: Callable[[State | None], Iterator[tuple[np.ndarray, State]]]


def mixture(
    streams: Sequence[WeightedStream],
    state: State | None,
    used: int = 0,
    lost_tokens: int = LOST_TOKENS,
) -> Iterator[tuple[np.ndarray, int, State]]:
    """Takes each document from the stream whose credit of tokens lags its weight the most.

    So the shares of tokens follow the weights to within a document, at any time. A stream that
    ends is left out.

    A stream that is lost is left out too, with a warning, and the shares of the others follow
    their weights. After every `lost_tokens` tokens it is asked again. When it comes back its
    credit is level with the others': it takes its share from there, and makes up for nothing, lest
    the model see it alone for hours. Who is lost is part of the state, so a resumed run goes by the
    same shares.

    Args:
        streams: the sources.
        state: to go on from.
        used: tokens of the next document that were inputs already. Should its stream be lost now,
            they are remembered until it comes back.
        lost_tokens: as above.

    Yields:
        A document, how many of its tokens were inputs already, and the state to read it again.

    Raises:
        SourceLost: the last stream is lost.
        UserError: a state that does not fit its document.
    """
    mixed = _Mixture(streams, state)
    pending: int | None = used
    while live := mixed.live():
        index = mixed.next_stream(live, lost_tokens)
        if pending is not None:
            mixed.used[index], pending = pending, None
        state = mixed.state()
        ids = mixed.read(index, live)
        if ids is None:
            continue
        skip, mixed.used[index] = mixed.used[index], 0
        if skip >= len(ids):
            raise UserError("--resume: the saved data position is damaged: its document is shorter")
        mixed.count(index, ids)
        yield ids, skip, state


class _Mixture:
    """A mixture counts what each of its streams has given, and knows which of them are lost."""

    def __init__(self, streams: Sequence[WeightedStream], state: State | None) -> None:
        nothing = [None] * len(streams)
        state = state or {
            "sources": nothing,
            "credit": [0.0] * len(streams),
            "lost": nothing,
            "used": [0] * len(streams),
        }
        self.streams = streams
        self.states: list[State | None] = list(state["sources"])
        self.credit: list[float] = list(state["credit"])
        self.lost: list[int | None] = list(state["lost"])
        """tokens of all streams when each was lost"""
        self.used: list[int] = list(state["used"])
        """tokens of each stream's next document that were inputs already"""
        self.readers = [stream.read(of) for stream, of in zip(streams, self.states, strict=True)]
        self.total = sum(of["tokens"] for of in self.states if of)
        self.ended: set[int] = set()

    def state(self) -> State:
        """The state is a copy, and says how to read the next document again."""
        return {
            "sources": list(self.states),
            "credit": list(self.credit),
            "lost": list(self.lost),
            "used": list(self.used),
        }

    def live(self) -> list[int]:
        """The live streams have neither ended nor are they lost."""
        numbers = range(len(self.streams))
        return [i for i in numbers if self.lost[i] is None and i not in self.ended]

    def next_stream(self, live: Sequence[int], lost_tokens: int) -> int:
        """The next stream is a lost one that is to be asked again, or the one that lags most."""
        for index, since in enumerate(self.lost):
            if since is not None and self.total >= since + lost_tokens:
                return index
        return min(live, key=lambda i: (self._level(i), i))

    def read(self, index: int, live: Sequence[int]) -> np.ndarray | None:
        """The function reads a document, or None if the stream has ended or is lost.

        Raises:
            SourceLost: the last stream is lost.
        """
        stream, was_lost = self.streams[index], self.lost[index] is not None
        if was_lost:
            self.readers[index] = stream.read(self.states[index])
            self.credit[index] = min(map(self._level, live)) * stream.weight
        try:
            ids, self.states[index] = next(self.readers[index])
        except StopIteration:
            self.ended.add(index)
            return None
        except SourceLost as error:
            if live == [index]:
                raise
            logger.warning("%s. TRAINING GOES ON WITHOUT IT, on the other sources alone", error)
            self.lost[index] = self.total
            return None
        if was_lost:
            logger.warning("--data %s: is back", stream.name)
            self.lost[index] = None
        return ids

    def count(self, index: int, ids: np.ndarray) -> None:
        """The tokens of a document are put down to its stream."""
        self.total += len(ids)
        self.credit[index] += len(ids)

    def _level(self, index: int) -> float:
        return self.credit[index] / self.streams[index].weight


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
    documents: Iterator[tuple[np.ndarray, int, State]], num_rows: int, seq_len: int
) -> Iterator[tuple[Rows, State]]:
    """Lays documents end to end and cuts every `num_rows * seq_len` tokens, losing none.

    What is left over at a cut is always the end of the last document. So the state is the state
    before that document and the number of its tokens that were inputs already, which holds for any
    number and length of rows: what `mixture` takes to go on. A stream that ends loses what does not
    fill the rows.

    Args:
        documents: as `mixture` yields them.
        num_rows: rows of an item.
        seq_len: T.
    """
    size = num_rows * seq_len
    pieces: list[np.ndarray] = []
    available = 0
    while True:
        while available <= size:  # one token more than the inputs: the last target
            try:
                document, skip, before = next(documents)
            except StopIteration:
                return
            pieces.append(document[skip:])
            available += len(document) - skip
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
