"""The module streams Hugging Face datasets.

A reader thread fetches blocks of documents; the consumer watches it, and gives it up when nothing
arrives for a while. Every state points behind a document, so that whoever reads on (`retry`) loses
nothing and reads nothing twice. Files are permuted by seed and epoch, documents within a block.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

from hamner.data.background import NotReady, Prefetcher
from hamner.data.documents import document_text
from hamner.data.retry import one_line
from hamner.data.shuffle import State, permutation
from hamner.errors import UserError

BLOCK_DOCUMENTS = 1000
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


class HubSource:
    """A hub source gives the documents of a streamed dataset, `owner/name[:config[:split]]`."""

    def __init__(self, location: str) -> None:
        self._location, self._dataset = location, open_location(location)

    def identity(self) -> State:
        return {"name": self._location, "files": self._dataset.num_shards}

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The iterator gives one epoch, each document with the state to go on after it.

        Raises:
            UserError: a row is not a document.
            TimeoutError: no document has arrived for `STALL_SECONDS`.
            Exception: whatever else the network or the libraries raise.
        """
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
                    yield texts[rows[row]], state
                first_row = 0
            first_block, stream = 0, None


class _Connection:
    """A connection reads one file in a thread, so that a read that hangs can be left behind."""

    def __init__(self, dataset: Any, location: str, file: int) -> None:
        self._dataset, self._location, self._file = dataset, location, file
        self._last_document = time.monotonic()

    def blocks(self, before: State | None) -> Iterator[tuple[list[str], State | None, State]]:
        """The iterator gives documents and the states before and after them, from a state on."""
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

    def _read(self, state: State | None) -> Iterator[tuple[list[str], State]]:
        stream = self._dataset.shard(num_shards=self._dataset.num_shards, index=self._file)
        if state is not None:
            stream.load_state_dict(state)
        rows = iter(stream)
        while texts := [self._text(row) for row in itertools.islice(rows, BLOCK_DOCUMENTS)]:
            yield texts, stream.state_dict()

    def _text(self, row: Any) -> str:
        self._last_document = time.monotonic()
        try:
            return document_text(row)
        except ValueError as error:
            raise UserError(f"--data hf:{self._location}: a row {error}") from error
