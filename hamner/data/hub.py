"""The module streams Hugging Face datasets.

A reader thread fetches blocks of documents; the consumer watches it, and gives it up when nothing
arrives for a while. Every state points behind a document, so that whoever reads on (`retry`) loses
nothing and reads nothing twice. Files are permuted by seed and epoch, documents within a block.
"""

import itertools
import time
from collections.abc import Callable, Iterator
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


class HubSource:
    """A hub source gives the documents of a streamed dataset.

    Args:
        location: `owner/name[:config[:split]]`; the split is "train" unless given.
        opener: opens the dataset by name, config and split.
        stall_seconds: as `STALL_SECONDS`.

    Raises:
        UserError: as `open_dataset`.
    """

    def __init__(
        self,
        location: str,
        *,
        opener: Callable[[str, str | None, str], Any] = open_dataset,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        name, _, rest = location.partition(":")
        config, _, split = rest.partition(":")
        self._location = location
        self._stall_seconds = stall_seconds
        self._dataset = opener(name, config or None, split or "train")

    def identity(self) -> State:
        return {"name": self._location, "files": self._dataset.num_shards}

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The iterator gives one epoch, each document with the state to go on after it.

        Raises:
            UserError: a row is not a document.
            TimeoutError: the network stalls.
            Exception: whatever else the network or the libraries raise.
        """
        state = state or {"file": 0, "block": 0, "row": 0, "stream": None}
        order = permutation(self._dataset.num_shards, seed, epoch)
        first_block, first_row, stream = state["block"], state["row"], state["stream"]
        for file in range(state["file"], len(order)):
            blocks = enumerate(self._blocks(int(order[file]), stream), start=first_block)
            for block, (texts, before, after) in blocks:
                rows = permutation(len(texts), seed, epoch, file, block)
                for row in range(first_row, len(texts)):
                    is_last = row + 1 == len(texts)
                    yield (
                        texts[rows[row]],
                        # Behind a whole block nothing of it is read again.
                        {"file": file, "block": block + 1, "row": 0, "stream": after}
                        if is_last
                        else {"file": file, "block": block, "row": row + 1, "stream": before},
                    )
                first_row = 0
            first_block, stream = 0, None

    def _blocks(
        self, file: int, state: State | None
    ) -> Iterator[tuple[list[str], State | None, State]]:
        """The iterator gives the blocks of a file after `state`, each between two states."""
        connection = _Connection(self._dataset, file, state, self._location)
        try:
            while (block := connection.next_block(self._stall_seconds)) is not None:
                texts, after = block
                yield texts, state, after
                state = after
        finally:
            connection.close()


class _Connection:
    """A connection reads one file in a thread, so that a read that hangs can be left behind."""

    def __init__(self, dataset: Any, file: int, state: State | None, location: str) -> None:
        self._location = location
        self._last_document = time.monotonic()
        self._blocks = Prefetcher(self._read(dataset, file, state), 2, "hamner-hub")

    def next_block(self, stall_seconds: float) -> tuple[list[str], State] | None:
        """`next_block` gives documents and the state after them, None at the end of the file.

        Raises:
            TimeoutError: no document has arrived for `stall_seconds`.
            Exception: whatever reading raised.
        """
        began = time.monotonic()
        while True:
            try:
                return self._blocks.get(timeout=min(1.0, stall_seconds))
            except StopIteration:
                return None
            except NotReady:
                idle = time.monotonic() - max(began, self._last_document)
                if idle >= stall_seconds:
                    raise TimeoutError(f"no document for {idle:.0f} s") from None

    def close(self) -> None:
        self._blocks.close()

    def _read(
        self, dataset: Any, file: int, state: State | None
    ) -> Iterator[tuple[list[str], State]]:
        stream = dataset.shard(num_shards=dataset.num_shards, index=file)
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
