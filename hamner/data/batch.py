"""A batch is what a step trains on: packed sequences and their targets, shifted already."""

from dataclasses import dataclass

import torch

IGNORED_TARGET = -100
"""target that no loss counts"""


@dataclass(frozen=True)
class Batch:
    """A batch holds packed sequences: T tokens a row, no padding.

    Attributes:
        inputs: (B, T) int64.
        targets: (B, T) int64; `targets[:, t]` is the token after `inputs[:, t]`. Only here are
            targets shifted: models never do it.
        document_ids: (B, T) int32, from 0 in each row, non-decreasing. A document's end-of-text
            token is its last one.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor

    def pin_memory(self) -> "Batch":
        """The copy lies in page-locked memory, from where a GPU fetches it asynchronously."""
        return Batch(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})
