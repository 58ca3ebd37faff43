"""Hugging Face datasets, streamed: a run of days must outlive the network's bad minutes.

A reader thread fetches blocks of documents; the consumer watches it. On an error, or when nothing
arrives for a while, it is given up and a new one goes on from the state of the last whole block, so
that nothing is lost or read twice. Files are permuted by seed and epoch, documents within a block.
"""

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hamner.data.background import Prefetcher
from hamner.data.documents import document_text
from hamner.data.shuffle import State, permutation
from hamner.errors import UserError

logger = logging.getLogger(__name__)

BLOCK_DOCUMENTS = 1000


@dataclass(frozen=True)
class Retry:
    """When to give up a connection, and when the source.

    Attributes:
        stall_seconds: without a new document before a connection is given up.
        attempts: connections in a row without a new document before the source is given up.
        first_delay_seconds: before the second attempt; doubled each time, with jitter.
        max_delay_seconds: the longest of the delays.
    """

    stall_seconds: float = 120.0
    attempts: int = 20
    first_delay_seconds: float = 1.0
    max_delay_seconds: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        longest = min(self.max_delay_seconds, self.first_delay_seconds * 2 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


DEFAULT_RETRY = Retry()


def open_dataset(name: str, config: str | None, split: str) -> Any:
    """Opens a dataset of the hub (or of a local folder) as a `datasets.IterableDataset`.

    Raises:
        UserError: no such dataset, config or split, or no connection.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except DatasetNotFoundError as error:
        raise UserError(
            f"--data hf:{name}: the Hugging Face hub has no such dataset, or it is private or "
            "gated (then `hf auth login` first)"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"--data hf:{name}: the Hugging Face hub cannot be reached ({_one_line(error)})"
        ) from error
    except Exception as error:  # an unknown config or split is a ValueError that lists them
        raise UserError(
            f"--data hf:{name}: config {config or '(none)'}, split {split} cannot be opened "
            f"({_one_line(error)})"
        ) from error


class HubSource:
    """The documents of a streamed dataset.

    Args:
        location: `owner/name[:config[:split]]`; the split is "train" unless given.
        opener: opens the dataset by name, config and split.
        retry: when to give up.

    Raises:
        UserError: as `open_dataset`.
    """

    def __init__(
        self,
        location: str,
        *,
        opener: Callable[[str, str | None, str], Any] = open_dataset,
        retry: Retry = DEFAULT_RETRY,
    ) -> None:
        name, _, rest = location.partition(":")
        config, _, split = rest.partition(":")
        self._location = location
        self._retry = retry
        self._dataset = opener(name, config or None, split or "train")

    def identity(self) -> State:
        return {"name": self._location, "files": self._dataset.num_shards}

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """One epoch, each document with the state to go on after it.

        Raises:
            UserError: the network stayed down, or a row is not a document.
        """
        state = state or {"file": 0, "block": 0, "row": 0, "stream": None}
        order = permutation(self._dataset.num_shards, seed, epoch)
        first_block, first_row, stream = state["block"], state["row"], state["stream"]
        for file in range(state["file"], len(order)):
            blocks = enumerate(self._blocks(int(order[file]), stream), start=first_block)
            for block, (texts, before) in blocks:
                rows = permutation(len(texts), seed, epoch, file, block)
                for row in range(first_row, len(texts)):
                    yield (
                        texts[rows[row]],
                        {"file": file, "block": block, "row": row + 1, "stream": before},
                    )
                first_row = 0
            first_block, stream = 0, None

    def _blocks(self, file: int, state: State | None) -> Iterator[tuple[list[str], State | None]]:
        """The blocks of one file after `state`, each with the state before it."""
        failures = 0
        while True:
            connection = _Connection(self._dataset, file, state, self._location)
            try:
                while (block := connection.next_block(self._retry.stall_seconds)) is not None:
                    texts, after = block
                    yield texts, state
                    state, failures = after, 0
                return
            except UserError:
                raise
            except Exception as error:
                failures += 1
                reason = f"{type(error).__name__}: {_one_line(error)}"
                if failures >= self._retry.attempts:
                    raise UserError(
                        f"--data hf:{self._location}: given up after {failures} attempts in a row "
                        f"({reason}); check the network and resume"
                    ) from error
                delay = self._retry.delay(failures)
                logger.warning(
                    "hf:%s: %s; attempt %d in %.0f s", self._location, reason, failures + 1, delay
                )
                time.sleep(delay)
            finally:
                connection.close()


class _Connection:
    """Reads one file of a dataset in a thread, so that a read that hangs can be left behind."""

    def __init__(self, dataset: Any, file: int, state: State | None, location: str) -> None:
        self._location = location
        self._last_document = time.monotonic()
        self._blocks = Prefetcher(self._read(dataset, file, state), 2, "hamner-hub")

    def next_block(self, stall_seconds: float) -> tuple[list[str], State] | None:
        """The next documents and the state after them, None at the end of the file.

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
            except TimeoutError:
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
