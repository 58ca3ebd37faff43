"""Launches share the choice of an op's table row by device, tiles of whole rows, the order of a
matmul's tiles, and the sum of partial sums.

Every op keeps a small table ``{"8.6": ..., "8.0": ..., "9.0": ...}``; tuning is a command, never a
surprise at step one. Rows must fit the smallest card that uses them:

- ``"8.6"``: RTX 30 series; 101,376 bytes of shared memory a block, 6 MB of L2 on a 3090.
- ``"8.0"``: A100 and, with the 8.6 limit of 101,376 bytes, 8.9 and 12.x (RTX 40 and 50 series).
- ``"9.0"``: H100, H200 and 10.x (B200); 232,448 bytes.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

CAPABILITIES = ("8.6", "8.0", "9.0")
# Of sum_partials: narrow columns of all rows at once. What costs is the latency of a load, so there
# should be one after the other as seldom as possible (profiles/LOG.md: 6 us, where 64 x 32 took 9).
BLOCK_P, BLOCK_D, NUM_WARPS = tl.constexpr(256), tl.constexpr(8), 16
# Row tiles that run over the same columns before moving on, so that both stay in the L2 cache.
GROUP_M = tl.constexpr(8)


def capability(device: torch.device) -> str:
    """The function names the launch table row for `device`.

    The CPU (Triton's interpreter) uses the 3090's row, so that the tests run what that card runs.
    """
    if device.type != "cuda":
        return "8.6"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return "9.0"
    return "8.6" if (major, minor) in ((8, 6), (8, 7)) else "8.0"


def tile_shape(tile: int, warps: int, width: int) -> tuple[int, int, int]:
    """The function gives rows and columns of a program's tile at this row width, and its warps."""
    block_d = triton.next_power_of_2(width)
    return max(1, tile // block_d), block_d, warps * max(1, block_d // tile)


@triton.jit
def swizzled_tile(num_m, num_n):
    """A program's tile is (m, n): GROUP_M row tiles share their column tiles before moving on."""
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_n)
    first_m = group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    within = pid - group * (GROUP_M * num_n)
    return first_m + within % rows, within // rows


@triton.jit
def sum_partials_kernel(
    partial_ptr,  # (P, D) fp32
    out_ptr,  # (D,) fp32 or input dtype
    P,
    D: tl.constexpr,
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
    """The function sums over the first axis, the second pass of a gradient's sum over all rows.

    Each program of the backward sums its own rows and writes a row of partial sums; this adds those
    in a fixed order. No atomics, so two runs on the same GPU give the same bits.

    Args:
        partials: (P, *shape) float32, contiguous.
        like: of that shape, and of the result's dtype.

    Returns:
        The sum, contiguous.
    """
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(partials):
        sum_partials_kernel[(triton.cdiv(out.numel(), BLOCK_D.value),)](
            partials, out, len(partials), D=out.numel(), num_warps=NUM_WARPS
        )
    return out


def define_in_place(
    name: str,
    launcher: Callable[..., Tensor | None],
    mutates: tuple[str, ...],
    fake: Callable[..., Tensor | None] = lambda *args: None,
) -> None:
    """The function registers an op that writes into these arguments and returns what `fake` does.

    Defined by hand: custom_op's handling of mutated arguments costs the host ten times as much.
    """
    schema = torch.library.infer_schema(launcher, mutates_args=mutates)
    torch.library.define(name, schema)
    torch.library.impl(name, "default", launcher)
    torch.library.register_fake(name, fake)
