"""The errors of a linear layer's int8 operands are measured on samples, inside its backward.

Backward has all operands in the dtype they are quantised from: x, the weight and the gradient of
the result. Of each, 64 programs take a tile of a few rows that have scales of their own (columns,
where the transpose is quantised), spread evenly: quantise it as int8_quantize.py does, and write
two sums of squares, of what rounding changed and of what there was. The error of an operand is

    sqrt(sum of (x - values * scale)^2 / sum of x^2)

and 0.0075 for 1,024 normal numbers a scale. The sums leave as the gradient of an input that is not
otherwise used, so autograd adds them up over micro-batches, and they pass through recomputation,
torch.compile and CUDA graphs like any gradient.

A tile is 4 rows or 32 columns, of one group where scales are grouped. All of it is read twice, once
for the maximum. Bytes that must move, for bf16: of an operand by rows, 1,024 to 1,536 wide, 1 to
1.6 MB (grouped 0.3), of a transposed weight, whose columns are all or most of them in the sample, 4
to 8 MB (grouped 2). For option a with "int8" that is 0.8 GB a micro-batch: 0.8 ms at 936 GB/s
beside some 700.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.int8_quantize import (
    GROUP,
    magnitude_bits,
    num_groups,
    quantize_int8_reference,
    scale_and_inverse,
    to_int8,
)

SPOTS = 64
BLOCK_ROWS, BLOCK_COLUMNS = 4, 32
# By reasoning: a load has runs of 512 bytes of a row of bf16, or of 64 across columns.
ROW_ELEMENTS, COLUMN_ELEMENTS, NUM_WARPS = 1024, 256, 8


@triton.jit
def quantization_error_kernel(
    x_ptr,
    sums_ptr,  # (at least as many as programs, 2) fp32: squares of errors, squares of x
    num_lines,  # a line is a row of what is quantised
    length,
    line_stride,
    element_stride,
    GROUPED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,  # 256 where grouped
):
    pid, programs = tl.program_id(0), tl.num_programs(0)
    groups = tl.cdiv(length, BLOCK_E) if GROUPED else 1
    tiles = tl.cdiv(num_lines, BLOCK_L) * groups
    # Even spots, moved within their stretches: neither blocks nor groups always come with the same.
    tile = pid * tiles // programs + pid % (tiles // programs)
    offs_l = (tile // groups).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < num_lines
    first = tile % groups * BLOCK_E
    end = tl.minimum(first + BLOCK_E, length) if GROUPED else length
    line_ptrs = x_ptr + offs_l[:, None] * line_stride

    largest = tl.zeros((BLOCK_L,), tl.int32)
    for start in range(first, end, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask = mask_l[:, None] & (offs_e < end)[None, :]
        ptrs = line_ptrs + offs_e.to(tl.int64)[None, :] * element_stride
        x = tl.load(ptrs, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(magnitude_bits(x), axis=1))
    scale, inverse = scale_and_inverse(largest)

    errors = tl.zeros((BLOCK_L,), tl.float32)
    squares = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(first, end, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        mask = mask_l[:, None] & (offs_e < end)[None, :]
        ptrs = line_ptrs + offs_e.to(tl.int64)[None, :] * element_stride
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        lost = x - to_int8(x, inverse[:, None]).to(tl.float32) * scale[:, None]
        errors += tl.sum(lost * lost, axis=1)
        squares += tl.sum(x * x, axis=1)
    tl.store(sums_ptr + pid * 2, tl.sum(errors, axis=0))
    tl.store(sums_ptr + pid * 2 + 1, tl.sum(squares, axis=0))


def launch_quantization_error(
    x: Tensor, sums: Tensor, *, transposed: bool = False, grouped: bool = False
) -> None:
    """The function writes the sums (SPOTS, 2) of a sample of x (N, D), or of its transpose; where
    there are fewer tiles than spots, what is left of the sums stays as it is."""
    if not x.numel():
        return
    block_l, block_e = (
        (BLOCK_COLUMNS, COLUMN_ELEMENTS) if transposed else (BLOCK_ROWS, ROW_ELEMENTS)
    )
    lines = x.T if transposed else x
    block_e = GROUP.value if grouped else block_e
    tiles = triton.cdiv(len(lines), block_l) * num_groups(lines.shape[1], grouped)
    quantization_error_kernel[(min(SPOTS, tiles),)](
        x, sums, *lines.shape, *lines.stride(),
        GROUPED=grouped, BLOCK_L=block_l, BLOCK_E=block_e,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def quantization_error_reference(
    x: Tensor, *, transposed: bool = False, grouped: bool = False
) -> Tensor:
    """This is `launch_quantization_error` of the whole of x (N, D) in plain torch: sums (2,)."""
    values, scales = quantize_int8_reference(x, transposed=transposed, grouped=grouped)
    lines = (x.T if transposed else x).float()
    groups = num_groups(lines.shape[1], grouped)
    each = scales.T.repeat_interleave(GROUP.value if groups > 1 else lines.shape[1], dim=1)
    lost = lines - values.float() * each[:, : lines.shape[1]]
    return torch.stack((lost.square().sum(), lines.square().sum()))
