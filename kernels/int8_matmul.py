"""A matmul of int8 operands: int32 sums on the tensor cores, fp32 scales, one rounding at the end.

    out[m, n] = sum over k of a[m, k] a_scale[m] * b[n, k] b_scale[n]

Both operands have the reduced axis last, as `quantize_int8` writes them. Fused are the scales, in
one of two modes by the operands' scales:

    one a row          int32 sums all along K, exact to K 133,144; then
                       out = (float(sum) * a_scale) * b_scale
    one each 256 of K  int32 sums of 256; each is scaled like that and added to an fp32 total, in
                       the order of K

so an outlier spoils the 256 elements around it, not its row. Nothing else rounds: the result is
equal, to the bit, to that formula on integer sums, on every card, whatever the launch table says.
That takes a compiler that fuses no multiplication with an addition (`enable_fp_fusion`).

A sum of 256 products is at most 256 * 127^2 < 2^22. The accumulator therefore begins at the bits of
1.5 * 2^23, and is, read as a float, that number plus the sum: one subtraction converts it, where
the conversion instruction has an eighth of the rate.

FLOPs are those of any matmul, 2 M N K, at twice the bf16 rate of an A100 or H100 and four times
that of a GeForce card, which halves bf16's. Floor at M 24,576, K 1024, N 5632 (0.283 TFLOP): 0.14
ms at 1,979 TOPS (H200), 1.0 ms at 284 (RTX 3090). Bytes: (M + N) K read and M N e written; at these
shapes the write is what tensor cores may wait for, 277 MB, 0.33 ms at 850 GB/s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import (
    SUPPORTED_DTYPES,
    check_contiguous,
    check_dtype,
    check_same_device,
    check_shape,
)
from hamner.kernels.int8_quantize import GROUP, ROUNDING, Int8Matrix, num_groups
from hamner.kernels.launch import capability, swizzled_tile

ROUNDING_BITS = tl.constexpr(0x4B400000)  # of ROUNDING
MAX_SUM = (2**31 - 1) // 127**2
"""products of int8 that int32 adds up"""


class Tile(NamedTuple):
    """A program has BLOCK_M x BLOCK_N results, BLOCK_K of K at a step, warps and stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int  # divides 256
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    rows: Tile
    grouped: Tile


# Of what compiles without spilling (tests/kernels/compile_gate.py): `grouped` holds int32 sums and
# fp32 totals, two registers a result, and a step's scales. As measured (`python -m bench.tune
# int8_matmul`, profiles/LOG.md), 9.0 on an H200, AMPERE_CONFIG as what that runs fastest of sm_86's
# code; each by the sum of the three products of option a's gate_up.
AMPERE_CONFIG = Config(rows=Tile(64, 256, 64, 4, 3), grouped=Tile(64, 128, 128, 4, 3))
CONFIGS = {
    "8.6": AMPERE_CONFIG,
    "8.0": AMPERE_CONFIG,
    "9.0": Config(rows=Tile(128, 128, 128, 4, 3), grouped=Tile(64, 128, 128, 4, 3)),
}


@triton.jit
def int8_matmul_kernel(
    a_ptr,  # (M, K) int8
    a_scales_ptr,  # (groups, M) fp32
    b_ptr,  # (N, K) int8
    b_scales_ptr,  # (groups, N) fp32
    out_ptr,  # (M, N) output dtype
    M,
    N,
    K,
    GROUP_STEPS: tl.constexpr,  # steps along K that share a scale, or None: all do
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = swizzled_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    # The position of a tile is 64-bit, offsets inside it 32-bit.
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M - first_m
    mask_n = offs_n < N - first_n
    a_ptr += first_m * K
    b_ptr += first_n * K
    a_scales_ptr += first_m
    b_scales_ptr += first_n
    # Rows past the end read the tile's first, and are not stored.
    offs_a = tl.where(mask_m, offs_m, 0)[:, None] * K + offs_k[None, :]
    offs_b = tl.where(mask_n, offs_n, 0)[:, None] * K + offs_k[None, :]

    steps = tl.cdiv(K, BLOCK_K)
    zero: tl.constexpr = 0 if GROUP_STEPS is None else ROUNDING_BITS
    acc = tl.full((BLOCK_M, BLOCK_N), zero, tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        if GROUP_STEPS is not None:
            # One loop, and the scales loaded before the matmul that hides their latency: a loop
            # inside another spills.
            ends_group = step % GROUP_STEPS == GROUP_STEPS - 1 or step == steps - 1
            mask_a = offs_m < tl.where(ends_group, M - first_m, 0)
            mask_b = offs_n < tl.where(ends_group, N - first_n, 0)
            a_scale = tl.load(a_scales_ptr + offs_m, mask=mask_a, other=0.0)
            b_scale = tl.load(b_scales_ptr + offs_n, mask=mask_b, other=0.0)
        if EVEN_K:
            a = tl.load(a_ptr + offs_a)
            b = tl.load(b_ptr + offs_b)
        else:
            mask_k = offs_k[None, :] < K - step * BLOCK_K
            a = tl.load(a_ptr + offs_a, mask=mask_k, other=0)
            b = tl.load(b_ptr + offs_b, mask=mask_k, other=0)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K
        if GROUP_STEPS is not None:  # noqa: SIM102  decided when it is compiled
            if ends_group:
                group_sum = acc.to(tl.float32, bitcast=True) - ROUNDING
                total += group_sum * a_scale[:, None] * b_scale[None, :]
                acc = tl.full((BLOCK_M, BLOCK_N), zero, tl.int32)
                a_scales_ptr += M
                b_scales_ptr += N
    if GROUP_STEPS is None:
        a_scale = tl.load(a_scales_ptr + offs_m, mask=mask_m, other=0.0)
        b_scale = tl.load(b_scales_ptr + offs_n, mask=mask_n, other=0.0)
        total = acc.to(tl.float32) * a_scale[:, None] * b_scale[None, :]

    offs = (first_m + offs_m)[:, None] * N + (first_n + offs_n)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("hamner::int8_matmul", mutates_args=())
def _int8_matmul_op(
    a_values: Tensor, a_scales: Tensor, b_values: Tensor, b_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    (rows, length), columns = a_values.shape, len(b_values)
    out = a_values.new_empty(rows, columns, dtype=dtype)
    if out.numel() == 0:
        return out
    grouped = len(a_scales) > 1
    config = CONFIGS[capability(a_values.device)]
    tile = config.grouped if grouped else config.rows
    programs = triton.cdiv(rows, tile.BLOCK_M) * triton.cdiv(columns, tile.BLOCK_N)
    with torch.cuda.device_of(a_values):
        int8_matmul_kernel[(programs,)](
            a_values, a_scales, b_values, b_scales, out, rows, columns, length,
            GROUP_STEPS=GROUP.value // tile.BLOCK_K if grouped else None,
            EVEN_K=length % tile.BLOCK_K == 0,
            **tile._asdict(), enable_fp_fusion=False,
        )  # fmt: skip
    return out


@_int8_matmul_op.register_fake
def _(a_values, a_scales, b_values, b_scales, dtype):
    return a_values.new_empty(len(a_values), len(b_values), dtype=dtype)


def _check_operand(name: str, operand: Int8Matrix, length: int | str) -> None:
    values, scales = operand
    check_dtype(f"{name}.values", values, (torch.int8,))
    check_shape(f"{name}.values", values.shape, ("rows", length))
    check_contiguous(f"{name}.values", values)
    check_dtype(f"{name}.scales", scales, (torch.float32,))
    check_shape(f"{name}.scales", scales.shape, ("groups", len(values)))
    check_contiguous(f"{name}.scales", scales)
    check_same_device(f"{name}.scales", scales, f"{name}.values", values)


def int8_matmul(a: Int8Matrix, b: Int8Matrix, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The op computes a b^T of quantised matrices.

    Args:
        a: (M, K), from `quantize_int8`, contiguous. A K that 16 does not divide is right and slow:
            rows then begin anywhere, are loaded byte by byte, and registers spill on sm_86.
        b: (N, K), as a; both have one scale a row, or both one each 256 of K.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        (M, N), summed in int32 as far as scales reach, scaled and added up in float32, rounded
        once. No gradient goes through it.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    _check_operand("a", a, "K")
    length = a.values.shape[1]
    _check_operand("b", b, length)
    check_same_device("b.values", b.values, "a.values", a.values)
    groups = len(a.scales)
    if groups not in (1, num_groups(length, True)):
        raise ValueError(
            f"a.scales has {groups} groups; K {length} has 1 or {num_groups(length, True)}"
        )
    check_shape("b.scales", b.scales.shape, (groups, len(b.values)))
    if groups == 1 and length > MAX_SUM:
        raise ValueError(
            f"a.values has K {length:,}; int32 adds up {MAX_SUM:,} products, so longer rows take "
            "grouped scales"
        )
    if dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"dtype is {dtype}; it must be float32, float16 or bfloat16")
    return _int8_matmul_op(*a, *b, dtype=dtype)


def int8_matmul_reference(
    a: Int8Matrix, b: Int8Matrix, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """This is `int8_matmul` in plain torch, to the bit.

    Integers are summed in float64, which holds them exactly to 2^53 and has a matmul on every
    device.
    """
    groups, length = len(a.scales), a.values.shape[1]
    width = GROUP.value if groups > 1 else max(1, length)
    total = a.scales.new_zeros(len(a.values), len(b.values))
    for group in range(groups):
        columns = slice(group * width, (group + 1) * width)
        sums = a.values[:, columns].double() @ b.values[:, columns].double().T
        total += sums.float() * a.scales[group][:, None] * b.scales[group]
    return total.to(dtype)
