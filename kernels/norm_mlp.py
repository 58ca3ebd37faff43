"""A dense MLP is one op: norm, gate_up matmul, SwiGLU and down matmul.

    gate_up, new_residual = add_rms_norm_linear(x, residual, ...)
    out = swiglu_linear(gate_up, ...)

Where the gradient of gate_up's operand is an int8 matmul, its operands have a scale each 256
elements, and the kernel of SwiGLU's backward quantises the gradient of gate_up as it writes it: the
matmul after it need not read it for that. Saved are a kernel and

    2 N I e bytes

For bf16, N 24,576, I 2816 that is 277 MB a layer: 0.09 ms at 3.0 TB/s, 0.33 ms at 850 GB/s. What is
kept for backward is what the two ops keep, and else they are called one after the other; also where
256 does not divide I, as then some elements of gate share a scale with some of up.
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
from hamner.kernels.int8_linear import Matmul, check_matmul, products
from hamner.kernels.int8_quantize import GROUP
from hamner.kernels.rms_norm import check_norm_arguments


class _NormMlp(torch.autograd.Function):
    """It composes registered ops, so that each is seen by the profiler and by torch.compile."""

    @staticmethod
    def forward(
        ctx, x, residual, norm_weight, gate_up_weight, down_weight, eps, recompute,
        gate_up_matmul, gate_up_errors, down_matmul, down_errors,
    ):  # fmt: skip
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
            return d_x, d_x if ctx.has_residual else None, *(None,) * 3, *no_gradients, *(None,) * 4
        *norm, gate_up, h, down_weight = ctx.saved_tensors
        d_gate_up, d_down_weight, d_down_errors, values, scales = (
            torch.ops.hamner.swiglu_linear_backward(
                d_out, gate_up, h, down_weight, **ctx.down, quantises=True
            )
        )
        d_x, *d_weights, d_gate_up_errors = torch.ops.hamner.rms_norm_linear_backward(
            d_gate_up, d_residual, *norm, **ctx.gate_up,
            grouped_gradient=True, values=values, scales=scales,
        )  # fmt: skip
        d_residual = d_x if ctx.has_residual else None
        d_gate_up_errors = d_gate_up_errors if ctx.gate_up["measures"] else None
        d_down_errors = d_down_errors if ctx.down["measures"] else None
        errors = None, d_gate_up_errors, None, d_down_errors
        return d_x, d_residual, *d_weights, d_down_weight, *no_gradients, *errors


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
) -> tuple[Tensor, Tensor]:
    """The op is `add_rms_norm_linear` with `grouped_gradient`, then `swiglu_linear`.

    Args:
        x, residual, norm_weight, eps, recompute: as in `add_rms_norm_linear`.
        gate_up_weight: (2I, D), dtype of x, gate first.
        down_weight: (D, I), dtype of x.
        gate_up_matmul, gate_up_errors: as `matmul` and `errors` of `add_rms_norm_linear`.
        down_matmul, down_errors: likewise of `swiglu_linear`.

    Returns:
        (out, new_residual): (..., D) in the dtype of x each; new_residual is `x` itself, or a view
        of it, if residual is None.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    joins = "data_gradient" in products(gate_up_matmul)
    if not joins or down_weight.shape[-1] % GROUP.value:
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
