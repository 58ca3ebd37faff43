"""The second pass of sums over rows: partial sums of programs, added in a fixed order.

Where a gradient sums over all rows, each program of the backward sums its own rows and writes a row
of partial sums; this adds those. No atomics, so two runs on the same GPU give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Narrow columns of all rows at once: what costs is the latency of a load, so there should be one
# after the other as seldom as possible (profiles/LOG.md: 6 us, where 64 x 32 took 9).
BLOCK_P, BLOCK_D, NUM_WARPS = 256, 8, 16


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # (P, D) fp32
    out_ptr,  # (D,) fp32 or input dtype
    P,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        offs = offs_p.to(tl.int64)[:, None] * D + offs_d[None, :]
        mask = (offs_p < P)[:, None] & mask_d[None, :]
        total += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


def sum_partials(partials: Tensor, like: Tensor) -> Tensor:
    """Sum over the first axis.

    Args:
        partials: (P, *shape) float32, contiguous.
        like: of that shape, and of the result's dtype.

    Returns:
        The sum, contiguous.
    """
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(partials):
        sum_partials_kernel[(triton.cdiv(out.numel(), BLOCK_D),)](
            partials, out, len(partials),
            D=out.numel(), BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out
