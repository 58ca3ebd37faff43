"""Sources become packed sequences in nested iterators, each of which yields (item, state).

    tokens of one source -> endless epochs -> weighted mixture -> packed rows

A state holds the states of the stages before it and says how to go on after its item, so to save
the position of the whole pipeline is to keep the state that came with the last item. States are
small JSON and are never changed once yielded.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch

from hamner.data.bad_rows import TooManyBadRows
from hamner.data.batch import Batch
from hamner.data.documents import Split, TokenSource
from hamner.data.shuffle import State
from hamner.data.specs import Spec
from hamner.errors import UserError

logger = logging.getLogger(__name__)

#: A lost source is asked again after so many tokens of the others: half an hour or more at the
#: speeds of one GPU, so that waiting for one that is still dead costs little.
LOST_TOKENS = 50_000_000

#: What a state of the mixture has of every stream.
STATE_KEYS = ("sources", "credit", "lost", "used")
#: State of a source before its first document; its counters are those of `TrainLoader.progress`.
START: State = {"epoch": 0, "position": None, "tokens": 0, "documents": 0, "skipped": 0}

Reader = Callable[[State | None], Iterator[tuple[np.ndarray, State]]]
"""gives a source's documents, each with the state to go on after it, from a state on (None: from
the beginning); a state counts the `tokens` so far"""


class SourceLost(UserError):
    """A source that has given documents fails now: others can take over its share."""


def epochs(
    source: TokenSource, name: str, seed: int, state: State | None
) -> Iterator[tuple[np.ndarray, State]]:
    """The iterator gives a source's training documents without end, each epoch in a new order.

    Raises:
        SourceLost: it fails after its first document, or has none left.
        TooManyBadRows: its content is to be mended.
        UserError: it fails before, or has none at all.
    """
    state = state or START
    try:
        while True:
            is_whole, documents_before = state["position"] is None, state["documents"]
            for ids, position in source.tokens("train", seed, state["epoch"], state["position"]):
                state = {**state, "position": position}
                if len(ids):
                    state["tokens"] += len(ids)
                    state["documents"] += 1
                    yield ids, state
                else:
                    state["skipped"] += 1
            if is_whole and state["documents"] == documents_before:
                raise UserError(
                    f"--data {name}: no document to train on ({state['skipped']} empty ones "
                    "skipped, the rest, if any, held out for validation)"
                )
            epoch = state["epoch"] + 1
            state = {**state, "epoch": epoch, "position": None}
            if epoch & (epoch - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time
                logger.warning(
                    "--data %s: all of it has been read %d times over; its documents come again",
                    name,
                    epoch,
                )
    except UserError as error:
        if state["documents"] == 0 or isinstance(error, TooManyBadRows):
            raise
        raise SourceLost(str(error)) from error


def one_epoch(source: TokenSource, split: Split, seed: int) -> Iterator[tuple[np.ndarray, State]]:
    """The iterator gives the documents of a split once, with the counter of a `Reader`."""
    tokens = 0
    for ids, _ in source.tokens(split, seed, 0, None):
        if len(ids):
            tokens += len(ids)
            yield ids, {"tokens": tokens}


@dataclass(eq=False)
class _Stream:
    """A stream is a source of the mixture with what it has given so far.

    Attributes:
        spec: its name and its weight.
        read: its documents from a state on.
        state: after its last document.
        credit: tokens that it has given, which its share of the mixture is measured by.
        lost: tokens of all streams when it was lost, None while it is not.
        used: tokens of its next document that were inputs already.
    """

    spec: Spec
    read: Reader
    state: State | None = None
    credit: float = 0.0
    lost: int | None = None
    used: int = 0

    def __post_init__(self) -> None:
        self.documents = self.read(self.state)

    def level(self) -> float:
        """The level of a stream is lowest where its credit lags its weight the most."""
        return self.credit / self.spec.weight

    def next_document(self, live: Sequence["_Stream"]) -> np.ndarray:
        """The stream gives its next document; one that is lost is opened again for it.

        Raises:
            StopIteration: the stream ends.
            SourceLost: it is lost, perhaps once more.
        """
        was_lost = self.lost is not None
        if was_lost:
            self.documents = self.read(self.state)
            self.credit = min(stream.level() for stream in live) * self.spec.weight
        ids, self.state = next(self.documents)
        if was_lost:
            logger.warning("--data %s: is back", self.spec.text)
            self.lost = None
        return ids


def mixture(
    specs: Sequence[Spec], readers: Sequence[Reader], state: State | None
) -> Iterator[tuple[np.ndarray, int, State]]:
    """The iterator takes each document from the stream whose credit lags its weight the most.

    So the shares of tokens follow the weights to within a document, at any time. A stream that
    ends is left out.

    A stream that is lost is left out too, with a warning, and the shares of the others follow
    their weights. After every `LOST_TOKENS` tokens it is asked again. When it comes back its
    credit is level with the others': it takes its share from there, and makes up for nothing, lest
    the model see it alone for hours. Who is lost is part of the state, so a resumed run goes by the
    same shares.

    Args:
        specs: names and weights of the streams.
        readers: of the streams.
        state: of `packed`, to go on from. Should the stream of the next document be lost now, the
            tokens of it that were inputs already are remembered until it comes back.

    Yields:
        A document, how many of its tokens were inputs already, and the state to read it again.

    Raises:
        SourceLost: the last stream is lost.
        UserError: a state that does not fit its document.
    """
    before, pending = (state["documents"], state["used"]) if state else (None, 0)
    columns = zip(*(before[key] for key in STATE_KEYS), strict=True) if before else repeat(())
    opened = zip(specs, readers, columns, strict=False)
    streams = [_Stream(spec, read, *values) for spec, read, values in opened]
    total = sum(stream.state["tokens"] for stream in streams if stream.state)
    while live := [stream for stream in streams if stream.lost is None]:
        asked_again = (s for s in streams if s.lost is not None and total >= s.lost + LOST_TOKENS)
        stream = next(asked_again, None) or min(live, key=_Stream.level)
        if pending is not None:
            stream.used, pending = pending, None
        before = _state_of(streams)
        try:
            ids = stream.next_document(live)
        except StopIteration:
            streams.remove(stream)
            continue
        except SourceLost as error:
            if live == [stream]:
                raise
            logger.warning("%s. TRAINING GOES ON WITHOUT IT, on the other sources alone", error)
            stream.lost = total
            continue
        skip, stream.used = stream.used, 0
        if skip >= len(ids):
            raise UserError("--resume: the saved data position is damaged: its document is shorter")
        total += len(ids)
        stream.credit += len(ids)
        yield ids, skip, before


def _state_of(streams: Sequence[_Stream]) -> State:
    """The state says how to read the next document again."""
    return {
        "sources": [stream.state for stream in streams],
        "credit": [stream.credit for stream in streams],
        "lost": [stream.lost for stream in streams],
        "used": [stream.used for stream in streams],
    }


def packed(
    documents: Iterator[tuple[np.ndarray, int, State]], num_rows: int, seq_len: int
) -> Iterator[tuple[Batch, State]]:
    """The iterator lays documents end to end and cuts every `num_rows * seq_len` tokens.

    None is lost: what is left over at a cut is always the end of the last document. So the state is
    the state before that document and the number of its tokens that were inputs already, which
    holds for any number and length of rows: what `mixture` takes to go on. A stream that ends loses
    what does not fill the rows. Row r + 1 goes on where row r ends.
    """
    size = num_rows * seq_len
    pieces: list[np.ndarray] = []
    available = 0
    for document, skip, before in documents:
        pieces.append(document[skip:])
        available += len(document) - skip
        while available > size:  # one token more than the inputs: the last target
            left = available - size
            pieces[-1] = pieces[-1][: len(pieces[-1]) - left + 1]
            used = len(document) - left
            yield _batch(pieces, num_rows, seq_len), {"documents": before, "used": used}
            pieces, available = [document[used:]], left


def _batch(pieces: Sequence[np.ndarray], num_rows: int, seq_len: int) -> Batch:
    """The batch has one token less than the pieces; its tensors share no memory."""
    shape = (num_rows, seq_len)
    tokens = np.concatenate(pieces).astype(np.int64)
    document = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(p) for p in pieces])
    document = document[:-1].reshape(shape)
    inputs, targets = (part.reshape(shape).copy() for part in (tokens[:-1], tokens[1:]))
    return Batch(*map(torch.from_numpy, (inputs, targets, document - document[:, :1])))
