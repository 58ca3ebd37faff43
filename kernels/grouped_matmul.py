"""The experts of a mixture: a SwiGLU MLP per expert over ragged groups of tokens, dropless.

N tokens of width D, each sent to K of E experts of intermediate size I. The M = N * K assignments
are pairs token * K + slot, which `moe_route` sorted by expert (`order`, `offsets`: moe_routing.py).

forward
    gate_up       (M, 2I)   grouped matmul that gathers x by token in its loads; in its epilogue
    hidden        (M, I)    SwiGLU times the routing weight: w * silu(gate) * up
    slots         (M, D)    grouped matmul; row r of the sorted order is stored at its pair order[r]
    out           (N, D)    each token adds up its own K rows of slots
backward
    d_hidden      (M, I)    grouped matmul that gathers d_out by token in its loads
    d_gate_up     (M, 2I)   one pass, which also gives d_weights and, over d_hidden, hidden again
    d_down        (E, D, I) d_out^T hidden over each expert's rows, gathers d_out
    d_gate_up_w   (E, 2I, D) d_gate_up^T x over each expert's rows, gathers x
    d_slots, d_x            grouped matmul stored by pair, then each token adds up its K rows

The routing weight goes on the hidden rows rather than on the expert's output: those are being
written anyway, what is left to combine are plain sums, and the weight's gradient is a dot product
of rows that backward holds: d_weight = <silu(gate) * up, d_hidden>.

x and d_out are never copied M rows long. No atomics. The host never learns a group's size: grids
have the most tiles that M rows can make, ceil(M / BLOCK_M) + E - 1; each program finds its expert
and rows in `offsets`, and those beyond the last tile leave.

Floor: 6 M D I FLOPs forward and 12 M D I backward, those of a dense MLP of intermediate size K * I;
at N 24,576, K 2, D 768, I 1536 that is 0.35 and 0.70 TFLOP, 4.9 and 9.8 ms at 71 TFLOP/s. Beside
the matmuls' own operands these elements move: (K + 1) N D to sum the slots, forward and backward,
and for d_gate_up 6 M I with the rebuild, 5 M I without.
"""

import torch
from torch import Tensor

from hamner.kernels.grouped_matmul_kernels import (
    launch_gate_up,
    launch_grouped_matmul,
    launch_sum_slots,
    launch_swiglu_grad,
    launch_weight_grad,
)
from hamner.kernels.moe_routing import MAX_EXPERTS, Routing

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("hamner::moe_mlp", mutates_args=())
def _moe_mlp(
    x: Tensor,
    routing_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    rebuild: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and what backward keeps: gate_up, and hidden unless it is rebuilt (then empty)."""
    top_k = routing_weights.shape[1]
    if x.shape[0] == 0:
        return torch.empty_like(x), *_empty_kept(x, top_k, gate_up_weight, rebuild)
    gate_up, hidden = launch_gate_up(x, routing_weights, order, offsets, gate_up_weight)
    slots = launch_grouped_matmul(
        hidden, down_weight, order, offsets, top_k, gather=False, transposed=True
    )
    return launch_sum_slots(slots, top_k), gate_up, x.new_empty((0,)) if rebuild else hidden


def _empty_kept(
    x: Tensor, top_k: int, gate_up_weight: Tensor, rebuild: bool
) -> tuple[Tensor, Tensor]:
    num_rows, double_intermediate = x.shape[0] * top_k, gate_up_weight.shape[1]
    hidden_shape = (0,) if rebuild else (num_rows, double_intermediate // 2)
    return x.new_empty((num_rows, double_intermediate)), x.new_empty(hidden_shape)


@_moe_mlp.register_fake
def _(x, routing_weights, order, offsets, gate_up_weight, down_weight, rebuild):
    kept = _empty_kept(x, routing_weights.shape[1], gate_up_weight, rebuild)
    return x.new_empty(x.shape), *kept


@torch.library.custom_op("hamner::moe_mlp_backward", mutates_args=())
def _moe_mlp_backward(
    d_out: Tensor,
    x: Tensor,
    routing_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    hidden: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    rebuild: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the routing weights, gate_up_weight and down_weight."""
    if x.shape[0] == 0:
        return (
            x.new_empty(x.shape),
            torch.empty_like(routing_weights),
            torch.zeros_like(gate_up_weight),
            torch.zeros_like(down_weight),
        )
    top_k = routing_weights.shape[1]
    d_out = d_out.contiguous()
    d_hidden = launch_grouped_matmul(
        d_out, down_weight, order, offsets, top_k, gather=True, transposed=False
    )
    d_gate_up, d_routing_weights = launch_swiglu_grad(
        gate_up, d_hidden, routing_weights, order, rebuild=rebuild
    )
    if rebuild:
        hidden = d_hidden
    d_down_weight = launch_weight_grad(d_out, hidden, order, offsets, top_k, gather_d_out=True)
    d_gate_up_weight = launch_weight_grad(d_gate_up, x, order, offsets, top_k, gather_d_out=False)
    d_slots = launch_grouped_matmul(
        d_gate_up, gate_up_weight, order, offsets, top_k, gather=False, transposed=False
    )
    return launch_sum_slots(d_slots, top_k), d_routing_weights, d_gate_up_weight, d_down_weight


@_moe_mlp_backward.register_fake
def _(
    d_out, x, routing_weights, order, offsets, gate_up, hidden, gate_up_weight, down_weight, rebuild
):
    return (
        x.new_empty(x.shape),
        torch.empty_like(routing_weights),
        torch.empty_like(gate_up_weight),
        torch.empty_like(down_weight),
    )


def _setup_context(ctx, inputs, output):
    x, routing_weights, order, offsets, gate_up_weight, down_weight, ctx.rebuild = inputs
    _, gate_up, hidden = output
    ctx.save_for_backward(
        x, routing_weights, order, offsets, gate_up, hidden, gate_up_weight, down_weight
    )
    ctx.mark_non_differentiable(gate_up, hidden)
    # Or autograd would make zeros of the size of gate_up for a gradient that is never used.
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, _d_gate_up, _d_hidden):
    if d_out is None:
        return (None,) * 7
    d_x, d_routing_weights, d_gate_up_weight, d_down_weight = _moe_mlp_backward(
        d_out, *ctx.saved_tensors, ctx.rebuild
    )
    return d_x, d_routing_weights, None, None, d_gate_up_weight, d_down_weight, None


_moe_mlp.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, routing: Routing, gate_up_weight: Tensor, down_weight: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be (N, D), got a shape of {tuple(x.shape)}")
    num_tokens, width = x.shape
    if gate_up_weight.ndim != 3 or gate_up_weight.shape[1] % 2 or gate_up_weight.shape[2] != width:
        raise ValueError(
            f"gate_up_weight must be (E, 2I, {width}), got {tuple(gate_up_weight.shape)}"
        )
    num_experts, double_intermediate, _ = gate_up_weight.shape
    if num_experts > MAX_EXPERTS:
        raise ValueError(
            f"gate_up_weight must have at most {MAX_EXPERTS} experts, got {num_experts}"
        )
    down_shape = (num_experts, width, double_intermediate // 2)
    if down_weight.shape != down_shape:
        raise ValueError(f"down_weight must be {down_shape}, got {tuple(down_weight.shape)}")
    if routing.weights.ndim != 2 or routing.weights.shape[0] != num_tokens:
        raise ValueError(
            f"routing.weights must be ({num_tokens}, K), got {tuple(routing.weights.shape)}"
        )
    if routing.order.shape != (routing.weights.numel(),):
        raise ValueError(
            f"routing.order must be ({routing.weights.numel()},), got {tuple(routing.order.shape)}"
        )
    if routing.offsets.shape != (num_experts + 1,):
        raise ValueError(
            f"routing.offsets must be ({num_experts + 1},) for {num_experts} experts, "
            f"got {tuple(routing.offsets.shape)}"
        )
    for name, tensor in (
        ("routing.weights", routing.weights),
        ("routing.order", routing.order),
        ("routing.offsets", routing.offsets),
        ("gate_up_weight", gate_up_weight),
        ("down_weight", down_weight),
    ):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    for name, weight in (("gate_up_weight", gate_up_weight), ("down_weight", down_weight)):
        if weight.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} like x, got {weight.dtype}")


def moe_mlp(
    x: Tensor,
    routing: Routing,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    *,
    rebuild: bool = True,
) -> Tensor:
    """Run each token through its experts' SwiGLU MLPs and add up what they say, by weight.

    `out[n] = sum_k weights[n, k] * down[e] @ (silu(gate[e] @ x[n]) * (up[e] @ x[n]))`, where `e` is
    `experts[n, k]`. No token is dropped. Differentiable in x, both weights and `routing.weights`.

    Args:
        x: (N, D) fp32, bf16 or fp16.
        routing: from `moe_route` for the same N tokens and E experts.
        gate_up_weight: (E, 2I, D), contiguous, gate first; dtype of x.
        down_weight: (E, D, I), contiguous; dtype of x.
        rebuild: keep gate_up (N * K, 2I) for backward and rebuild the SwiGLU's output from it, in
            the pass that differentiates it; False keeps that output (N * K, I) too. Same bits.

    Returns:
        (N, D), dtype of x.

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: a shape, stride or device that is not supported.
    """
    _check(x, routing, gate_up_weight, down_weight)
    if x.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if routing.weights.dtype != torch.float32:
        raise TypeError(f"routing.weights must be float32, got {routing.weights.dtype}")
    for name, index in (("routing.order", routing.order), ("routing.offsets", routing.offsets)):
        if index.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {index.dtype}")
    for name, weight in (("gate_up_weight", gate_up_weight), ("down_weight", down_weight)):
        if not weight.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {weight.stride()}")
    if x.stride(1) != 1:
        x = x.contiguous()
    out, _, _ = _moe_mlp(
        x,
        routing.weights.contiguous(),
        routing.order,
        routing.offsets,
        gate_up_weight,
        down_weight,
        rebuild,
    )
    return out


def moe_mlp_reference(
    x: Tensor, routing: Routing, gate_up_weight: Tensor, down_weight: Tensor
) -> Tensor:
    """`moe_mlp` in plain torch, a loop over experts, on any device; also fp64.

    Reads `routing.weights` and `routing.experts`. The host waits for each group's size.
    """
    _check(x, routing, gate_up_weight, down_weight)
    compute = x.dtype if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(x.shape, dtype=compute, device=x.device)
    for expert in range(gate_up_weight.shape[0]):
        token, slot = torch.where(routing.experts == expert)
        gate, up = torch.nn.functional.linear(x[token], gate_up_weight[expert]).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate.to(compute)) * up.to(compute)
        hidden = hidden * routing.weights[token, slot, None].to(compute)
        rows = torch.nn.functional.linear(hidden.to(x.dtype), down_weight[expert])
        out = out.index_add(0, token, rows.to(compute))
    return out.to(x.dtype)
