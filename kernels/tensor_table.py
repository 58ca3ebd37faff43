"""Several tensors in one launch: where they lie, and which program works on which piece of which.

A model's parameters are a hundred tensors and more, many of them small. A launch for each leaves
the GPU half empty at its beginning and end. Here programs look their tensor up instead: its address
in a table, and the number of their chunk of it in a list.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int16: tl.int16,
}
ALIGNMENT = 16
"""bytes of an address, and elements of a tensor, that let every access be as wide as possible"""


class TensorTable(NamedTuple):
    """What a kernel needs to find its operands, on their device."""

    addresses: Tensor
    """(columns, tensors) int64"""
    numels: Tensor
    """(tensors,) int64"""
    chunks: Tensor
    """(programs, 2) int32: a tensor, and the number of a chunk of it"""
    is_aligned: bool
    """whether ALIGNMENT divides all addresses and sizes"""


def tensor_table(columns: Sequence[Sequence[Tensor]], chunk_size: int) -> TensorTable:
    """The table of tensors that are worked on together: columns[0][i], columns[1][i] and so on.

    Nothing waits for the GPU, and a table that was asked for before is not built again: the first
    time must not be while a CUDA graph is recorded.

    Args:
        columns: of equally many contiguous tensors each, with the sizes of columns[0]; on one
            device.
        chunk_size: elements a program works on.
    """
    first = columns[0]
    numels = tuple(tensor.numel() for tensor in first)
    addresses = tuple(tuple(tensor.data_ptr() for tensor in column) for column in columns)
    device = first[0].device
    is_aligned = all(n % ALIGNMENT == 0 for n in numels) and all(
        address % ALIGNMENT == 0 for column in addresses for address in column
    )
    return TensorTable(
        _on_device(addresses, device),
        _on_device(numels, device),
        _chunks(numels, chunk_size, device),
        is_aligned,
    )


@functools.lru_cache(maxsize=32)
def _on_device(values: tuple, device: torch.device) -> Tensor:
    """Integers as an int64 tensor."""
    return _copied(torch.tensor(values, dtype=torch.int64), device)


@functools.lru_cache(maxsize=32)
def _chunks(numels: tuple[int, ...], chunk_size: int, device: torch.device) -> Tensor:
    """See `TensorTable.chunks`: tensor by tensor, the chunks of each in their order."""
    counts = torch.tensor([triton.cdiv(numel, chunk_size) for numel in numels])
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    first = (counts.cumsum(0) - counts)[tensor]
    number = torch.arange(len(tensor)) - first
    return _copied(torch.stack((tensor, number), dim=1).to(torch.int32), device)


def _copied(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return values.to(device)
    # From pageable memory the copy would wait for the GPU.
    return values.pin_memory().to(device, non_blocking=True)


@triton.jit
def table_entry(
    addresses_ptr,  # (columns, num_tensors) int64
    column: tl.constexpr,
    tensor,
    num_tensors,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pointer to the first element of a tensor."""
    pointer = tl.load(addresses_ptr + column * num_tensors + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def table_chunk(
    numels_ptr,  # (tensors,) int64
    chunks_ptr,  # (programs, 2) int32
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Tensor of this program, the first element of its chunk, and the tensor's size."""
    program = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * program)
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    numel = tl.load(numels_ptr + tensor)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    return tensor, start, numel
