"""The scale says how large the rows are: as a model trains, or minute (`--smoke`).

`--smoke` runs every row on the CPU, kernels in Triton's interpreter, to show that the suite itself
works; its times mean nothing. The other modules read `SMOKE` when they are imported, which the
suite's conftest sets before that.

`--compile-only` runs what a row compiles once, and times nothing (bench/compile_ahead.py).
"""

from collections.abc import Callable
from typing import TypeVar

import torch

SMOKE = False
COMPILE_ONLY = False

T = TypeVar("T")


def pick(full: T, small: T) -> T:
    """The function gives a size: as it trains, or for --smoke."""
    return small if SMOKE else full


def device() -> str:
    """The function gives where rows run."""
    return "cpu" if SMOKE else "cuda"


def dtype() -> torch.dtype:
    """The function gives the compute dtype of the rows; the interpreter computes bfloat16
    wrongly."""
    return torch.float32 if SMOKE else torch.bfloat16


def compiled(function: Callable, **options) -> Callable:
    """The function is torch.compile for fixed shapes; --smoke does without the code generator."""
    backend = "eager" if SMOKE else "inductor"
    return torch.compile(function, dynamic=False, backend=backend, **options)
