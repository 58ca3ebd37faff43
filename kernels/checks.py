"""The argument checks that the ops' public functions share; every error names the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_dtype(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = SUPPORTED_DTYPES
) -> None:
    """A tensor of none of these dtypes raises a TypeError."""
    if tensor.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name} is {tensor.dtype}; it must be {allowed}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor that is not where the other is raises a ValueError."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor of another dtype than the other's raises a TypeError, elsewhere a ValueError."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, {other_name} is {other.dtype}; they must agree")
    check_same_device(name, tensor, other_name, other)


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int | str]) -> None:
    """A shape that is not the expected one raises a ValueError.

    An expected axis is its size, or the name of an axis of any size: ("tokens", 1024).
    """
    if len(shape) != len(expected) or any(
        not isinstance(axis, str) and size != axis
        for size, axis in zip(shape, expected, strict=True)
    ):
        axes = ", ".join(map(str, expected)) + "," * (len(expected) == 1)
        raise ValueError(f"{name} has shape {tuple(shape)}; it must be ({axes})")


def check_contiguous(name: str, tensor: Tensor) -> None:
    """A tensor that is not contiguous raises a ValueError."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def check_positive(name: str, value: int) -> None:
    """A number below 1 raises a ValueError."""
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
