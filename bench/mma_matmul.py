"""A plain Triton matmul is the ceiling of kernels that multiply with the same instructions.

cuBLAS runs a GPU's own code, which for an older GPU's kernels (bench/as_capability.py) is no
measure: on 9.0 it multiplies with wgmma. This matmul has the structure of a textbook: tiles, their
order grouped for the L2, loads ahead in a pipeline.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.launch import swizzled_tile


class MatmulTile(NamedTuple):
    """A program has a tile, BLOCK_K of the reduced dimension at a step, warps and stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


CANDIDATES = [
    MatmulTile(block_m, block_n, block_k, warps, stages)
    for block_m, block_n, warps in (
        *((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)),
        *((64, 256, 4), (256, 64, 4), (64, 128, 4), (128, 64, 4)),
    )
    for block_k in (32, 64)
    for stages in (2, 3, 4, 5)
]


@triton.jit
def matmul_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    out_ptr,  # (M, N)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # All sizes are multiples of the blocks.
    tile_m, tile_n = swizzled_tile(M // BLOCK_M, N // BLOCK_N)
    offs_m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * K + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * N + offs_n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        total = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), total)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out)


def matmul(a: Tensor, b: Tensor, tile: MatmulTile) -> Tensor:
    """The function multiplies (M, K) by (K, N), all multiples of the tile's blocks."""
    (m, k), n = a.shape, b.shape[1]
    if m % tile.block_m or n % tile.block_n or k % tile.block_k:
        raise ValueError(f"({m}, {k}) x ({k}, {n}) is not in whole tiles of {tile}")
    out = a.new_empty(m, n)
    with torch.cuda.device_of(a):
        matmul_kernel[(m // tile.block_m * (n // tile.block_n),)](
            a, b, out, m, n, k,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out
