"""Conversations lie side by side in rows of T positions, none divided, none seeing another."""

import bisect
from collections.abc import Sequence

import numpy as np
import torch

from hamner.data.batch import IGNORED_TARGET, Batch
from hamner.data.conversations.examples import Example


def pack(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """The function fills rows by best fit: each example goes where it leaves the smallest room.

    Examples are taken in their order. Taking the longest first would waste 1% less, but fill rows
    with conversations of one length, which are often of one kind. None may be longer than the
    capacity, the positions of a row.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (left, row), ascending
    for example in examples:
        best = bisect.bisect_left(room, (example.length, 0))
        if best < len(room):
            left, row = room.pop(best)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (left - example.length, row))
    return rows


def lay_out(rows: Sequence[Sequence[Example]], seq_len: int, padding: int) -> Batch:
    """The function makes a batch of packed rows.

    The targets are shifted here, as in the loader of pre-training: `targets[t]` is the token after
    `inputs[t]` where that token is learned, and ignored elsewhere. An example's last token is only
    a target, so nothing is predicted across examples. The end of a row is padding, a document of
    its own that no loss counts. The examples of a row have together at most `seq_len` positions.
    """
    shape = (len(rows), seq_len)
    inputs = np.full(shape, padding, np.int64)
    targets = np.full(shape, IGNORED_TARGET, np.int64)
    document_ids = np.zeros(shape, np.int32)
    for number, row in enumerate(rows):
        start = 0
        for document, example in enumerate(row):
            part = (number, slice(start, start + example.length))
            inputs[part] = example.ids[:-1]
            targets[part] = np.where(example.learned[1:], example.ids[1:], IGNORED_TARGET)
            document_ids[part] = document
            start += example.length
        document_ids[number, start:] = len(row)
    return Batch(*map(torch.from_numpy, (inputs, targets, document_ids)))
