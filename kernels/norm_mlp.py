"""A dense MLP is one op: norm, gate_up matmul, SwiGLU and down matmul.

    gate_up, new_residual = add_rms_norm_linear(x, residual, ...)
    out = swiglu_linear(gate_up, ...)

Where the gradient of gate_up's operand is an int8 matmul, its operands have a scale each 256
elements, and the kernel of SwiGLU's backward quantises the gradient of gate_up as it writes it: the
matmul after it need not read it for that. Saved are a kernel and

    2 N I e bytes

For bf16, N 24,576, I 2816 that is 277 MB a layer: 0.09 ms at 3.0 TB/s, 0.33 ms at 850 GB/s. Not so
where 256 does not divide I, as then some elements of gate share a scale with some of up. The norm's
backward can quantise the gradient of x as well, for the linear layer before it, and down's gradient
may come quantised from the norm after it (int8_handover.py). What is kept for backward is what the
two ops keep, and where nothing is quantised so they are called one after the other.
"""

import torch
from torch import Tensor

from hamner.kernels.checks import check_like, check_shape
from hamner.kernels.fused_linear import (
    add_rms_norm_linear,
    add_rms_norm_linear_reference,
    swiglu_linear,
    swiglu_linear_reference,
)
from hamner.kernels.int8_handover import Handover
from hamner.kernels.int8_linear import Matmul, check_matmul, named, products
from hamner.kernels.int8_quantize import GROUP, Int8Matrix
from hamner.kernels.rms_norm import check_norm_arguments


class _NormMlp(torch.autograd.Function):
    """It composes registered ops, so that each is seen by the profiler and by torch.compile."""

    @staticmethod
    def forward(
        ctx, x, residual, norm_weight, gate_up_weight, down_weight, eps, recompute,
        gate_up_matmul, gate_up_errors, down_matmul, down_errors, joins, hands_to, takes_from,
    ):  # fmt: skip
        ctx.joins, ctx.hands_to, ctx.takes_from = joins, hands_to, takes_from
        ctx.gate_up = {"matmul": gate_up_matmul, "measures": gate_up_errors is not None}
        ctx.down = {"matmul": down_matmul, "measures": down_errors is not None}
        gate_up, new_residual, rstd, normed = torch.ops.hamner.rms_norm_linear(
            x, residual, norm_weight, gate_up_weight,
            eps=eps, recompute=recompute, matmul=gate_up_matmul,
        )  # fmt: skip
        out, h = torch.ops.hamner.swiglu_linear(gate_up, down_weight, recompute, matmul=down_matmul)
        ctx.has_residual = residual is not None
        ctx.set_materialize_grads(False)
        if not ctx.has_residual:
            # Through here all the same: backward then adds the stream's gradient in its one pass.
            new_residual = x.view_as(x)
        ctx.save_for_backward(
            new_residual if ctx.has_residual else x, rstd, None if recompute else normed,
            norm_weight, gate_up_weight, gate_up, None if recompute else h, down_weight,
        )  # fmt: skip
        return out, new_residual

    @staticmethod
    def backward(ctx, d_out, d_residual):
        no_gradients = (None, None)
        if d_out is None:
            d_x = d_residual
            return d_x, d_x if ctx.has_residual else None, *(None,) * 3, *no_gradients, *(None,) * 7
        *norm, gate_up, h, down_weight = ctx.saved_tensors
        rows = None if ctx.takes_from is None else ctx.takes_from.take(d_out)
        d_gate_up, d_down_weight, d_down_errors, *quantised = (
            torch.ops.hamner.swiglu_linear_backward(
                d_out, gate_up, h, down_weight, **ctx.down, quantises=ctx.joins, **named(rows)
            )
        )
        rows = Int8Matrix(*quantised) if ctx.joins else None
        hands = ctx.hands_to is not None
        d_x, *d_weights, d_gate_up_errors, values, scales = (
            torch.ops.hamner.rms_norm_linear_backward(
                d_gate_up, d_residual, *norm, **ctx.gate_up,
                grouped_gradient=True, quantises=hands, **named(rows),
            )
        )  # fmt: skip
        if hands:
            ctx.hands_to.leave(d_x, Int8Matrix(values, scales))
        d_residual = d_x if ctx.has_residual else None
        d_gate_up_errors = d_gate_up_errors if ctx.gate_up["measures"] else None
        d_down_errors = d_down_errors if ctx.down["measures"] else None
        errors = None, d_gate_up_errors, None, d_down_errors
        return d_x, d_residual, *d_weights, d_down_weight, *no_gradients, *errors, *(None,) * 3


def add_rms_norm_mlp(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    eps: float = 1e-5,
    *,
    recompute: bool = True,
    gate_up_matmul: Matmul | str = "bf16",
    gate_up_errors: Tensor | None = None,
    down_matmul: Matmul | str = "bf16",
    down_errors: Tensor | None = None,
    gate_up_hands_to: Handover | None = None,
    down_takes_from: Handover | None = None,
) -> tuple[Tensor, Tensor]:
    """The op is `add_rms_norm_linear` with `grouped_gradient`, then `swiglu_linear`.

    Args:
        x, residual, norm_weight, eps, recompute: as in `add_rms_norm_linear`.
        gate_up_weight: (2I, D), dtype of x, gate first.
        down_weight: (D, I), dtype of x.
        gate_up_matmul, gate_up_errors: as `matmul` and `errors` of `add_rms_norm_linear`.
        down_matmul, down_errors: likewise of `swiglu_linear`.
        gate_up_hands_to: where to leave the gradient of x quantised, for the layer that made x.
        down_takes_from: as `takes_from` of `int8_linear`.

    Returns:
        (out, new_residual): (..., D) in the dtype of x each; new_residual is `x` itself, or a view
        of it, if residual is None.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    in_int8 = "data_gradient" in products(gate_up_matmul)
    joins = in_int8 and down_weight.shape[-1] % GROUP.value == 0
    if not joins and gate_up_hands_to is None and down_takes_from is None:
        gate_up, new_residual = add_rms_norm_linear(
            x, residual, norm_weight, gate_up_weight,
            eps=eps, recompute=recompute, matmul=gate_up_matmul, errors=gate_up_errors,
            grouped_gradient=True,
        )  # fmt: skip
        how = {"recompute": recompute, "matmul": down_matmul, "errors": down_errors}
        return swiglu_linear(gate_up, down_weight, **how), new_residual
    check_norm_arguments(x, residual, norm_weight, "norm_weight")
    width = x.shape[-1]
    check_shape("down_weight", down_weight.shape, (width, "intermediate"))
    check_shape("gate_up_weight", gate_up_weight.shape, (2 * down_weight.shape[1], width))
    for name, weight, matmul, errors, grouped in (
        ("gate_up", gate_up_weight, gate_up_matmul, gate_up_errors, "data_gradient"),
        ("down", down_weight, down_matmul, down_errors, "forward"),
    ):
        names = {"weight_name": f"{name}_weight", "errors_name": f"{name}_errors"}
        check_like(names["weight_name"], weight, "x", x)
        check_matmul(matmul, errors, weight, **names, grouped=grouped)
    return _NormMlp.apply(
        x, residual, norm_weight, gate_up_weight, down_weight, eps, recompute,
        gate_up_matmul, gate_up_errors, down_matmul, down_errors,
        joins, gate_up_hands_to, down_takes_from,
    )  # fmt: skip


def add_rms_norm_mlp_reference(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """This is `add_rms_norm_mlp` in plain torch."""
    norm = x, residual, norm_weight
    gate_up, new_residual = add_rms_norm_linear_reference(*norm, gate_up_weight, eps=eps)
    return swiglu_linear_reference(gate_up, down_weight), new_residual
