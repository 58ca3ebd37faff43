"""A matrix becomes int8 and fp32 scales: just in time, symmetric, rounded to nearest even.

    scale  = max |x| / 127                     of a row, or of 256 elements of a row
    values = round(x * (127 / max |x|))        -127 to 127, ties to even

`int8_matmul` wants both operands with the reduced axis last ("K-major": tensor cores of sm_86 read
8-bit operands in no other order), so the quantiser also writes transposed: then what shares a scale
is a column of x, or 256 rows of a column, and column c of x is row c of the result. A linear layer
y = x weight^T needs

    forward              x by rows (N, in)              weight by rows (out, in)
    gradient of x        d_y by rows (N, out)           weight transposed (in, out)
    gradient of weight   d_y transposed (out, N)        x transposed (in, N)

Maximum, division, rounding and transposition are one pass over x wherever a program holds all that
shares a scale: a row, or 256 rows of some columns. A whole column has a pass before that for its
maximum (no atomics: every 256 rows write theirs).

Bytes that must move, e = bytes an element of an (N, D) input: N D e read and N D written, and 4
bytes a scale; one scale a column reads twice. For bf16, N 24,576, D 1024 that is 75 MB: 0.025 ms at
3.0 TB/s, 0.089 ms at 850 GB/s.

What is not finite is not lost: a row (or its 256 elements) with a NaN or an infinity has the scale
NaN and the values 0, so that all that it takes part in is NaN. A row whose maximum is below 2^-100
is quantised as if that were its maximum, so zeros have a scale that is not zero; below 2^-121 the
inverse would overflow.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import check_contiguous, check_dtype, check_shape
from hamner.kernels.launch import capability, tile_shape

GROUP = tl.constexpr(256)  # elements along K that share a scale
LARGEST = tl.constexpr(127.0)
SMALLEST_MAXIMUM = tl.constexpr(2.0**-100)
MAX_ROW = 32_768  # a row is held in registers
# Added to a float below 2^22 it leaves no bit for a fraction: what it rounds to (nearest, ties to
# even) stands in the sum's lowest bits, in two's complement.
ROUNDING = tl.constexpr(1.5 * 2**23)
INFINITY_BITS = tl.constexpr(0x7F800000)


class Int8Matrix(NamedTuple):
    """A matrix is values times scales, both of `int8_matmul`'s layout.

    Groups are 1, where a row has one scale, or ceil(K / 256), each 256 elements of a row.
    """

    values: Tensor  # (rows, K) int8
    scales: Tensor  # (groups, rows) fp32


class Config(NamedTuple):
    """A program quantises rows of about `tile` elements together, or 256 rows of `columns`.

    A row wider than the tile takes a program with more warps.
    """

    tile: int
    warps: int
    columns: int
    column_warps: int


# 16 bytes of bf16 a load, several of them in flight. 32 columns are runs of 64 bytes read, and 256
# written once transposed. All are what an H200 runs fastest (`python -m bench.tune int8_quantize`,
# profiles/LOG.md), of its own code and of sm_86's.
CONFIGS = {
    "8.6": Config(4096, 2, 32, 4),
    "8.0": Config(4096, 2, 32, 4),
    "9.0": Config(4096, 2, 32, 4),
}


@triton.jit
def magnitude_bits(x):
    """The bits of |x| in fp32 are integers in the order of |x|, infinity and then NaN above all."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(largest_bits):
    """The largest `magnitude_bits` of what shares a scale give scale and inverse, NaN and zero
    where that is not finite."""
    is_finite = largest_bits < INFINITY_BITS
    largest = tl.maximum(largest_bits.to(tl.float32, bitcast=True), SMALLEST_MAXIMUM)
    scale = tl.where(is_finite, tl.div_rn(largest, LARGEST), float("nan"))
    return scale, tl.where(is_finite, tl.div_rn(LARGEST, largest), 0.0)


@triton.jit
def to_int8(x, inverse):
    """Elements are rounded to int8, zeros where the inverse is."""
    # Not a product that ends in a sum: the compiler would fuse both, and round once instead of
    # twice, in some places and not in others.
    scaled = tl.clamp(tl.where(inverse > 0.0, x.to(tl.float32), 0.0) * inverse, -LARGEST, LARGEST)
    return (scaled + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def int8_pointers(values_ptr, offs, x):
    """The function gives the pointers by which a kernel that writes x (rows, columns) too, or
    might, writes what x is quantised to.

    A thread writes as many int8 at once as it reads of x in 16 bytes. It could write 16, but then
    the compiler would have it hold 16: a sum over a row of what it holds would be in another order,
    so of other bits, than in the same kernel without int8, and tensors of x's dtype would go
    through shared memory.
    """
    at_once: tl.constexpr = 128 // x.dtype.primitive_bitwidth
    return tl.max_contiguous(values_ptr + offs, (1, at_once))


@triton.jit
def quantize_rows_kernel(
    x_ptr,  # (N, D) input dtype
    values_ptr,  # (N, D) int8
    scales_ptr,  # (groups, N) fp32
    N,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # elements that share a scale
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least WIDTH
):
    groups: tl.constexpr = (D + WIDTH - 1) // WIDTH
    pid = tl.program_id(0)
    group = pid % groups
    offs_m = (pid // groups).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = group * WIDTH + tl.arange(0, BLOCK_D)
    mask_m = offs_m < N
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    offs = offs_m[:, None] * D + offs_d[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    scale, inverse = scale_and_inverse(tl.max(magnitude_bits(x), axis=1))
    tl.store(scales_ptr + group.to(tl.int64) * N + offs_m, scale, mask=mask_m)
    tl.store(values_ptr + offs, to_int8(x, inverse[:, None]), mask=mask)


@triton.jit
def column_maxima_kernel(
    x_ptr,  # (N, D) input dtype
    maxima_ptr,  # (ceil(N / 256), D) int32: magnitude_bits
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_d_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    group = (pid // num_d_blocks).to(tl.int64)
    offs_n = group * GROUP + tl.arange(0, GROUP)
    offs_d = pid % num_d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = (offs_n < N)[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs_n[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    largest = tl.max(magnitude_bits(x), axis=0)
    tl.store(maxima_ptr + group * D + offs_d, largest, mask=mask_d)


@triton.jit
def quantize_columns_kernel(
    x_ptr,  # (N, D) input dtype
    maxima_ptr,  # (D,) int32: magnitude_bits of whole columns, or None: of these 256 rows
    values_ptr,  # (D, N) int8
    scales_ptr,  # (groups, D) fp32
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_d_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    group = (pid // num_d_blocks).to(tl.int64)
    offs_n = group * GROUP + tl.arange(0, GROUP)
    offs_d = pid % num_d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = (offs_n < N)[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs_n[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    if maxima_ptr is None:
        scale, inverse = scale_and_inverse(tl.max(magnitude_bits(x), axis=0))
        tl.store(scales_ptr + group * D + offs_d, scale, mask=mask_d)
    else:
        maxima = tl.load(maxima_ptr + offs_d, mask=mask_d, other=0)
        scale, inverse = scale_and_inverse(maxima)
        if group == 0:
            tl.store(scales_ptr + offs_d, scale, mask=mask_d)
    values = tl.trans(to_int8(x, inverse[None, :]))
    offs = offs_d.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(values_ptr + offs, values, mask=tl.trans(mask))


def empty_int8(like: Tensor, shape: Sequence[int], *, grouped: bool) -> Int8Matrix:
    """The function allocates, where `like` is, the rows of a quantised (..., K) of this shape."""
    *leading, length = shape
    rows = math.prod(leading)
    values = like.new_empty(rows, length, dtype=torch.int8)
    return Int8Matrix(
        values, like.new_empty(num_groups(length, grouped), rows, dtype=torch.float32)
    )


def num_groups(length: int, grouped: bool) -> int:
    """The function gives the scales of a row of this length."""
    return max(1, triton.cdiv(length, GROUP.value)) if grouped else 1


def _launch_rows(x: Tensor, values: Tensor, scales: Tensor, config: Config) -> None:
    num_rows, length = x.shape
    groups = len(scales)
    width = GROUP.value if groups > 1 else length
    block_m, block_d, warps = tile_shape(config.tile, config.warps, width)
    quantize_rows_kernel[(triton.cdiv(num_rows, block_m) * groups,)](
        x, values, scales, num_rows,
        D=length, WIDTH=width, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=min(warps, 32),
    )  # fmt: skip


def _launch_columns(
    x: Tensor, values: Tensor, scales: Tensor, config: Config, *, grouped: bool
) -> None:
    num_rows, width = x.shape
    row_blocks, block_d = triton.cdiv(num_rows, GROUP.value), config.columns
    grid = (row_blocks * triton.cdiv(width, block_d),)
    options = {"D": width, "BLOCK_D": block_d, "num_warps": config.column_warps}
    maxima = None
    if not grouped:
        maxima = x.new_empty(row_blocks, width, dtype=torch.int32)
        column_maxima_kernel[grid](x, maxima, num_rows, **options)
        maxima = maxima.amax(dim=0)
    quantize_columns_kernel[grid](x, maxima, values, scales, num_rows, **options)


@torch.library.custom_op("hamner::quantize_int8", mutates_args=())
def _quantize_int8_op(x: Tensor, transposed: bool, grouped: bool) -> tuple[Tensor, Tensor]:
    values, scales = empty_int8(x, x.shape[::-1] if transposed else x.shape, grouped=grouped)
    if x.numel() == 0:
        return values, scales.fill_(SMALLEST_MAXIMUM.value / LARGEST.value)
    config = CONFIGS[capability(x.device)]
    with torch.cuda.device_of(x):
        if transposed:
            _launch_columns(x, values, scales, config, grouped=grouped)
        else:
            _launch_rows(x, values, scales, config)
    return values, scales


@_quantize_int8_op.register_fake
def _(x, transposed, grouped):
    return tuple(empty_int8(x, x.shape[::-1] if transposed else x.shape, grouped=grouped))


def quantize_int8(x: Tensor, *, transposed: bool = False, grouped: bool = False) -> Int8Matrix:
    """The op quantises a matrix, or its transpose, by rows of the result.

    Args:
        x: (N, D) float32, float16 or bfloat16, contiguous.
        transposed: quantise and write x^T, so that the result's rows are the columns of x.
        grouped: a scale for each 256 elements of a row instead of one for the row.

    Returns:
        Values (N, D) int8 and scales (groups, N) fp32, D and N exchanged where transposed. Values
        are -127 to 127, rounded to nearest even; no gradient goes through them. A row, or group,
        that is not finite has the scale NaN and values 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_dtype("x", x)
    check_shape("x", x.shape, ("rows", "columns"))
    check_contiguous("x", x)
    if not (transposed or grouped) and x.shape[1] > MAX_ROW:
        raise ValueError(
            f"x has rows of {x.shape[1]:,} elements; one scale is for at most {MAX_ROW:,}, "
            "longer rows take grouped=True"
        )
    return Int8Matrix(*_quantize_int8_op(x, transposed, grouped))


def quantize_int8_reference(
    x: Tensor, *, transposed: bool = False, grouped: bool = False
) -> Int8Matrix:
    """This is `quantize_int8` in plain torch, to the bit."""
    matrix = (x.T if transposed else x).float()
    rows, length = matrix.shape
    groups = num_groups(length, grouped)
    width = GROUP.value if grouped else length
    padded = torch.nn.functional.pad(matrix, (0, groups * width - length))
    chunks = padded.reshape(rows, groups, width)
    is_finite = chunks.isfinite().all(dim=-1, keepdim=True)
    chunks = chunks.where(is_finite, 0.0)
    smallest = chunks.new_full((rows, groups, 1), SMALLEST_MAXIMUM.value)
    largest = torch.cat((chunks.abs(), smallest), dim=-1).amax(dim=-1, keepdim=True)
    # Tensors, because torch may divide by a number, or a number, through a rounded reciprocal.
    steps = torch.full_like(largest, LARGEST.value)
    values = (chunks * (steps / largest)).round().to(torch.int8)
    scales = (largest / steps).where(is_finite, torch.nan)
    return Int8Matrix(
        values.reshape(rows, groups * width)[:, :length].contiguous(), scales[..., 0].T.contiguous()
    )
