"""The order is deterministic: files, blocks and documents, each permuted by seed and epoch.

There is no shuffle buffer: the order is a function of (seed, epoch), so the state of a half-read
epoch is three small numbers, and to resume costs reading one block again.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

Document = TypeVar("Document", covariant=True)

#: State of a stage: small, JSON-serialisable, never changed once it was handed out.
State = dict[str, Any]


def check_counts(state: State, *keys: str) -> None:
    """The function checks numbers of a saved state, which a damaged file may hold no more.

    Raises:
        KeyError, TypeError, ValueError: one is not there, or not a count.
    """
    for key in keys:
        if type(state[key]) is not int or state[key] < 0:
            raise ValueError(f"{key} {state[key]!r}")


def permutation(length: int, *key: int) -> np.ndarray:
    """The permutation of `range(length)` is random and depends on the key alone.

    It is made of raw bits, which NumPy promises to keep, unlike `Generator.permutation`: a run must
    resume to the same order under a later NumPy.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(raw, kind="stable")


class BlockFile(Protocol[Document]):
    """A file can be read in blocks of documents."""

    def blocks(self, start: int, *key: int) -> Iterator[Sequence[Document]]:
        """The blocks come from `start`, in the order of `key` unless a file is read forward."""


def shuffled_documents(
    files: Sequence[BlockFile[Document]], seed: int, epoch: int, state: State | None
) -> Iterator[tuple[Document, State]]:
    """The iterator gives one epoch of documents, each with the state to go on after it.

    Args:
        files: the source's files, in an order that does not change.
        seed: of the run.
        epoch: number of the epoch, from 0.
        state: of the last document that was read, or None to begin.
    """
    state = state or {"file": 0, "block": 0, "row": 0}
    first_block, first_row = state["block"], state["row"]
    order_of_files = permutation(len(files), seed, epoch)
    for file_number in range(state["file"], len(files)):
        blocks = files[order_of_files[file_number]].blocks(first_block, seed, epoch, file_number)
        for block_number, block in enumerate(blocks, start=first_block):
            order = permutation(len(block), seed, epoch, file_number, block_number)
            for row in range(first_row, len(block)):
                state = {"file": file_number, "block": block_number, "row": row + 1}
                yield block[order[row]], state
            first_row = 0
        first_block = 0
