"""A mixture's router projects in fp32, whatever its operands are.

    logits = x.float() @ weight.float()^T

The router's choice is discrete: logits rounded to bf16 would tie experts that fp32 tells apart, and
so, more rarely, would the sums of a tensor core, which keeps fewer bits than fp32 on the way. So
both directions are elementwise fp32 multiplications and additions: with few experts memory is the
limit even so. Fused are the conversions to fp32, and in backward both gradients; x is kept for
backward as it is.

    forward     a program holds whole rows of x and takes their dot product with each expert's row
                of the weight, which all programs share through the caches
    backward    a program holds a tile of x, and for each expert adds to its tile of d_x and writes
                a partial sum of d_weight over its rows; a second pass (launch.py) adds those
                in a fixed order

Bytes that must move, e = bytes an element of x: forward reads x, N D e; backward reads x and writes
d_x, 2 N D e; the logits, 4 N E, beside each. FLOPs: 2 N D E and 4 N D E. For bf16, N 24,576, D 768,
E 4 that is 38 and 76 MB: 0.013 and 0.025 ms at 3.0 TB/s, 0.045 and 0.089 ms at 850 GB/s.
Arithmetic passes memory from about 20 experts on an H100 (67 TFLOP/s of fp32), 40 on a 3090 (36).
Not among those bytes: the partial sums, 4 N D E / backward_block_m, are written and read once, as a
rule in the L2 cache; 6% of x's bytes at E 4, all of them at E 64.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import check_dtype, check_like, check_shape
from hamner.kernels.launch import capability, sum_partials, tile_shape
from hamner.kernels.rms_norm import MAX_WIDTH


class Config(NamedTuple):
    """A forward program holds `forward_tile` elements of x, a backward program a tile of it.

    Rows narrower than the forward tile share a program; a wider row takes a program with more
    warps.
    """

    forward_tile: int
    forward_warps: int
    backward_block_m: int
    backward_block_d: int
    backward_warps: int


# Forward: a warp alone holds two rows of 768 or 1024, so that dot products cross no warps.
# Backward: rows of a tile are runs of 128 bytes. These are the fastest on an H100 and, as sm_86's
# code, on an H200 (`python -m bench.tune router_linear`, profiles/LOG.md).
CONFIGS = {
    "8.6": Config(2048, 1, 64, 64, 2),
    "8.0": Config(2048, 1, 64, 64, 2),
    "9.0": Config(2048, 1, 64, 64, 2),
}


@triton.jit(do_not_specialize=["N"])
def router_linear_forward_kernel(
    x_ptr,  # (N, D) input dtype
    weight_ptr,  # (E, D) input dtype
    logits_ptr,  # (N, E) fp32
    N,
    D: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < N
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    for expert in range(NUM_EXPERTS):
        weight = tl.load(weight_ptr + expert * D + offs_d, mask=mask_d, other=0.0)
        # One expert at a time: of a sum over two broadcast operands Triton makes a tensor-core dot.
        logits = tl.sum(x * weight.to(tl.float32)[None, :], axis=1)
        tl.store(logits_ptr + offs_m * NUM_EXPERTS + expert, logits, mask=mask_m)


@triton.jit(do_not_specialize=["N"])
def router_linear_backward_kernel(
    d_logits_ptr,  # (N, E) fp32
    x_ptr,  # (N, D) input dtype
    weight_ptr,  # (E, D) input dtype
    d_x_ptr,  # (N, D) input dtype
    d_weight_ptr,  # (row blocks, E, D) fp32 partial sums
    N,
    D: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Tiles of the same rows run side by side, and share d_logits through the caches.
    num_d_blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    block_m = (pid // num_d_blocks).to(tl.int64)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid % num_d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m = offs_m < N
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    offs = offs_m[:, None] * D + offs_d[None, :]

    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    # Zeros, x being 0 outside the mask, but in x's layout, which Triton then keeps. Plain zeros get
    # another: converting the sum for the store takes twice the registers.
    d_x = tl.where(mask, 0.0, x)
    for expert in range(NUM_EXPERTS):
        d_logits = tl.load(d_logits_ptr + offs_m * NUM_EXPERTS + expert, mask=mask_m, other=0.0)
        weight = tl.load(weight_ptr + expert * D + offs_d, mask=mask_d, other=0.0)
        d_x += d_logits[:, None] * weight.to(tl.float32)[None, :]
        d_weight = tl.sum(d_logits[:, None] * x, axis=0)
        offs_partial = (block_m * NUM_EXPERTS + expert) * D + offs_d
        tl.store(d_weight_ptr + offs_partial, d_weight, mask=mask_d)
    tl.store(d_x_ptr + offs, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("hamner::router_linear", mutates_args=())
def launch_router_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The launcher projects x (N, D) on each row of weight (E, D): (N, E) fp32."""
    x = x.contiguous()
    num_tokens, width = x.shape
    num_experts = len(weight)
    logits = x.new_empty(num_tokens, num_experts, dtype=torch.float32)
    config = CONFIGS[capability(x.device)]
    block_m, block_d, warps = tile_shape(config.forward_tile, config.forward_warps, width)
    with torch.cuda.device_of(x):
        router_linear_forward_kernel[(triton.cdiv(num_tokens, block_m),)](
            x, weight.contiguous(), logits, num_tokens,
            D=width, NUM_EXPERTS=num_experts, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return logits


@launch_router_linear.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("hamner::router_linear_backward", mutates_args=())
def launch_router_linear_backward(
    d_logits: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The launcher gives (d_x, d_weight), shaped as x (N, D) and weight (E, D), in their dtype."""
    x = x.contiguous()
    num_tokens, width = x.shape
    num_experts = len(weight)
    d_x = torch.empty_like(x)
    config = CONFIGS[capability(x.device)]
    block_m, block_d = config.backward_block_m, config.backward_block_d
    row_blocks = triton.cdiv(num_tokens, block_m)
    partial_sums = x.new_empty(row_blocks, num_experts, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        router_linear_backward_kernel[(row_blocks * triton.cdiv(width, block_d),)](
            d_logits.contiguous(), x, weight.contiguous(), d_x, partial_sums, num_tokens,
            D=width, NUM_EXPERTS=num_experts, BLOCK_M=block_m, BLOCK_D=block_d,
            num_warps=config.backward_warps,
        )  # fmt: skip
    return d_x, sum_partials(partial_sums, weight)


@launch_router_linear_backward.register_fake
def _(d_logits, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_logits):
    return launch_router_linear_backward(d_logits, *ctx.saved_tensors)


launch_router_linear.register_autograd(_backward, setup_context=_setup_context)


def router_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The op gives the router's logits in fp32.

    Args:
        x: (N, D) float32, float16 or bfloat16, D up to 8192.
        weight: (E, D), dtype of x. Time grows with E: meant for a router's few experts.

    Returns:
        (N, E) float32. Products and sums are computed in float32, without tensor cores.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_dtype("x", x)
    check_like("weight", weight, "x", x)
    check_shape("x", x.shape, ("tokens", "width"))
    check_shape("weight", weight.shape, ("experts", x.shape[1]))
    if not 1 <= x.shape[1] <= MAX_WIDTH or len(weight) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; width must be 1 to "
            f"{MAX_WIDTH}, with at least one expert"
        )
    return launch_router_linear(x, weight)


def router_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """It is `router_linear` in plain torch: float64 for float64 input, else float32."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.nn.functional.linear(x.to(compute), weight.to(compute))
