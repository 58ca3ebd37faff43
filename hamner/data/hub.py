"""The module streams Hugging Face datasets.

A reader thread fetches blocks of documents; the consumer watches it, and gives it up when nothing
arrives for a while. Every state points behind a document, so that whoever reads on (`retry`) loses
nothing and reads nothing twice. Files are permuted by seed and epoch, documents within a block.
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

from hamner.data.background import NotReady, Prefetcher
from hamner.data.bad_rows import BadRow, BadRows
from hamner.data.documents import Extent, document_text
from hamner.data.retry import one_line
from hamner.data.shuffle import State, check_counts, permutation
from hamner.errors import UserError

logger = logging.getLogger(__name__)

BLOCK_DOCUMENTS = 1000
#: How many rows a data set has is not known before its end: until then it is taken to have so many.
FEW_ROWS = 10_000
#: Without a new document for so long, a connection is given up. The libraries below retry on their
#: own within it.
STALL_SECONDS = 60.0


def open_dataset(name: str, config: str | None, split: str) -> Any:
    """The function opens a dataset of the hub (or a local folder) as a `datasets.IterableDataset`.

    Raises:
        UserError: no such dataset, config or split, or no connection.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    from hamner.data import hub_files

    try:
        builder = datasets.load_dataset_builder(name, config)
        hub_files.read_whole(builder)
        return builder.as_streaming_dataset(split=split)
    except DatasetNotFoundError as error:
        raise UserError(
            f"--data hf:{name}: the Hugging Face hub has no such dataset, or it is private or "
            "gated (then `hf auth login` first)"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"--data hf:{name}: the Hugging Face hub cannot be reached ({one_line(error)})"
        ) from error
    except Exception as error:  # an unknown config or split is a ValueError that lists them
        raise UserError(
            f"--data hf:{name}: config {config or '(none)'}, split {split} cannot be opened "
            f"({one_line(error)})"
        ) from error


def open_location(location: str) -> Any:
    """The function opens `owner/name[:config[:split]]`; the split is "train" unless given.

    Raises:
        UserError: as `open_dataset` does.
    """
    name, _, rest = location.partition(":")
    config, _, split = rest.partition(":")
    return open_dataset(name, config or None, split or "train")


Row = str | BadRow


class HubSource:
    """A hub source gives the documents of a streamed dataset, `owner/name[:config[:split]]`.

    The split is "train" unless given. Bad rows are passed over, up to a share of those read.
    """

    def __init__(self, location: str, bad_rows: BadRows | None = None) -> None:
        self._location, self._dataset = location, open_location(location)
        self._bad_rows = bad_rows or BadRows(f"hf:{location}")
        self._counted: set[tuple[int, int, int]] = set()
        """bad rows since the start, by file, block and row"""
        self._first = ""
        """what is wrong with the first of them"""
        self._rows = 0
        """read in all starts"""
        record = self._bad_rows.record
        with contextlib.suppress(KeyError, TypeError, ValueError):
            check_counts(record, "rows")
            check_counts(record["kinds"], *record["kinds"])
            self._rows, self._bad_rows.counts = (
                record["rows"],
                {self._bad_rows.name: record["kinds"]},
            )

    def identity(self) -> State:
        return {"name": self._location, "files": self._dataset.num_shards}

    def extent(self, seed: int, epoch: int, state: State | None) -> Extent:
        """The extent counts files, whose sizes nobody says."""
        return Extent(state["file"] if state else 0, self._dataset.num_shards, "files")

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The iterator gives one epoch, each document with the state to go on after it.

        Raises:
            TooManyBadRows: more than their share.
            TimeoutError: no document has arrived for `STALL_SECONDS`.
            Exception: whatever else the network or the libraries raise.
        """
        begins, rows_before = state is None, self._rows
        state = state or {"file": 0, "block": 0, "row": 0, "stream": None}
        order = permutation(self._dataset.num_shards, seed, epoch)
        first_block, first_row, stream = state["block"], state["row"], state["stream"]
        for file in range(state["file"], len(order)):
            connection = _Connection(self._dataset, self._location, int(order[file]))
            blocks = enumerate(connection.blocks(stream), start=first_block)
            for block, (texts, before, after) in blocks:
                rows = permutation(len(texts), seed, epoch, file, block)
                for row in range(first_row, len(texts)):
                    state = {"file": file, "block": block, "row": row + 1, "stream": before}
                    if row + 1 == len(texts):  # behind a whole block nothing of it is read again
                        state |= {"block": block + 1, "row": 0, "stream": after}
                    self._rows += 1
                    text = texts[rows[row]]
                    if isinstance(text, BadRow):
                        self._count(text, (int(order[file]), block, int(rows[row])))
                    else:
                        yield text, state
                first_row = 0
            first_block, stream = 0, None
        if begins and self._first:
            self._bad_rows.judge(self._rows - rows_before, self._first)

    def _count(self, row: BadRow, key: tuple[int, int, int]) -> None:
        """A bad row is counted, once in an epoch and in validation, and all are judged."""
        if key in self._counted:
            return
        self._counted.add(key)
        kinds = dict(self._bad_rows.counts.get(self._bad_rows.name, {}))
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
        self._bad_rows.keep({"rows": self._rows, "kinds": kinds}, {self._bad_rows.name: kinds})
        self._first = self._first or f"{row.path}: a row {row.reason}"
        sentence = self._bad_rows.judge(self._rows, self._first, assumed=FEW_ROWS)
        count = sum(kinds.values())
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time
            logger.warning("%s", sentence)


class _Connection:
    """A connection reads one file in a thread, so that a read that hangs can be left behind."""

    def __init__(self, dataset: Any, location: str, file: int) -> None:
        self._dataset, self._location, self._file = dataset, location, file
        self._last_document = time.monotonic()

    def blocks(self, before: State | None) -> Iterator[tuple[list[Row], State | None, State]]:
        """The iterator gives rows and the states before and after them, from a state on."""
        with contextlib.closing(Prefetcher(self._read(before), 2, "hamner-hub")) as arriving:
            began = time.monotonic()
            while True:
                try:
                    texts, after = arriving.get(timeout=min(1.0, STALL_SECONDS))
                except StopIteration:
                    return
                except NotReady:
                    idle = time.monotonic() - max(began, self._last_document)
                    if idle >= STALL_SECONDS:
                        raise TimeoutError(f"no document for {idle:.0f} s") from None
                    continue
                yield texts, before, after
                before, began = after, time.monotonic()

    def _read(self, state: State | None) -> Iterator[tuple[list[Row], State]]:
        stream = self._dataset.shard(num_shards=self._dataset.num_shards, index=self._file)
        if state is not None:
            stream.load_state_dict(state)
        rows = iter(stream)
        while texts := [self._text(row) for row in itertools.islice(rows, BLOCK_DOCUMENTS)]:
            yield texts, stream.state_dict()

    def _text(self, row: Any) -> Row:
        self._last_document = time.monotonic()
        try:
            return document_text(row)
        except ValueError as error:
            return BadRow(f"hf:{self._location}", self._file, str(error))
