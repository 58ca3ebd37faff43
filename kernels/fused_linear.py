"""A cheap op and the matmul that consumes it make a pair, which keeps the cheap op's input.

    add_rms_norm_linear       out = rms_norm(x + residual) @ weight^T
    add_rms_norm_qkv_rope     the same, q and k of the packed result rotated
    swiglu_linear             out = swiglu(gate_up) @ weight^T

A matmul needs its operand again for its weight's gradient, so plain autograd keeps both the cheap
op's input and its result. These ops keep only the input (recompute=True) and write the operand a
second time in the one pass that backward makes over the input anyway:

    d_operand = d_out @ weight                            matmul
    d_input, operand = cheap op's backward(input)         one pass; operand overwrites d_operand
    d_weight = d_out^T @ operand                          matmul

So it costs one extra write of the operand to recompute it: no second forward, no extra memory, and
the same with or without torch.compile. With recompute=False it is kept and that write is saved.

Kept and moved, for bf16 at N 24,576 with D 1024 and I 2816 (the floor is bytes / bandwidth beside
the matmuls, whose FLOPs are the usual 2 N in out forward and 4 N in out backward):

    norm + linear     recompute=True keeps  2 N D  =  50 MB less, and writes them in backward
    swiglu + linear   recompute=True keeps  2 N I  = 138 MB less, and writes them in backward

In `add_rms_norm_qkv_rope` the fresh matmul result is rotated in place, and backward rotates the
gradient back before its matmuls: no split, copy or concatenation of q, k and v remains. With
qk-norm it is kept as it was, and its heads are normed and rotated into a new tensor (qk_norm.py).
The matmuls are torch's (cuBLAS) or those of int8_linear.py; rms_norm.py, swiglu.py and rope.py have
the kernels around them.
"""

import torch
from torch import Tensor

from hamner.kernels.checks import check_like, check_shape
from hamner.kernels.int8_linear import (
    Matmul,
    check_matmul,
    data_gradient,
    empty_errors,
    forward_int8,
    measure_errors,
    products,
    weight_gradient,
)
from hamner.kernels.int8_quantize import empty_int8
from hamner.kernels.qk_norm import check_qk_norm, qk_norm_rope, qk_norm_rope_reference
from hamner.kernels.rms_norm import (
    check_norm_arguments,
    empty_results,
    launch_rms_norm,
    launch_rms_norm_backward,
    rms_norm_reference,
)
from hamner.kernels.rope import (
    check_packed_arguments,
    launch_packed_rotation,
    rope_packed_reference,
)
from hamner.kernels.swiglu import (
    check_gate_up,
    launch_swiglu,
    launch_swiglu_backward,
    swiglu_reference,
)

# An op returns the same number of tensors whatever its flags; an empty one stands for "not kept".


@torch.library.custom_op("hamner::rms_norm_linear", mutates_args=())
def _rms_norm_linear_op(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float,
    recompute: bool,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    num_heads: int = 0,
    num_kv_heads: int = 0,
    matmul: str = "bf16",
    errors: Tensor | None = None,
    grouped_gradient: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if "forward" not in products(matmul):
        normed, new_residual, rstd = launch_rms_norm(x, residual, norm_weight, eps)
        out = torch.nn.functional.linear(normed, weight)
    else:
        quantised = empty_int8(x, x.shape, grouped=False)
        normed, new_residual, rstd = launch_rms_norm(
            x, residual, norm_weight, eps, quantised=quantised, writes_y=not recompute
        )
        out = forward_int8(quantised, weight, x.shape)
    if cos is not None:
        launch_packed_rotation(
            out, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions,
            in_place=True,
        )  # fmt: skip
    return out, new_residual, rstd, x.new_empty(0) if recompute else normed


@_rms_norm_linear_op.register_fake
def _(x, residual, norm_weight, weight, eps, recompute, *_rope_and_matmul):
    _, new_residual, rstd = empty_results(x, residual)
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    return out, new_residual, rstd, x.new_empty(0 if recompute else x.shape)


@torch.library.custom_op("hamner::rms_norm_linear_backward", mutates_args=())
def _rms_norm_linear_backward_op(
    d_out: Tensor,
    d_residual: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    normed: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    num_heads: int = 0,
    num_kv_heads: int = 0,
    matmul: str = "bf16",
    measures: bool = False,
    grouped_gradient: bool = False,
    values: Tensor | None = None,  # d_out quantised by rows, where there is no RoPE, and its scales
    scales: Tensor | None = None,
    quantises: bool = False,  # d_x, too
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if cos is not None:
        # Not in place: the gradient may have other readers.
        d_out = launch_packed_rotation(
            d_out, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions,
            inverse=True, in_place=False,
        )  # fmt: skip
    d_out = d_out.reshape(-1, weight.shape[0])
    d_normed = data_gradient(
        d_out, weight, matmul, grouped=grouped_gradient, values=values, scales=scales
    )
    recomputed = d_normed if normed is None else None
    quantised = empty_int8(x, x.shape if quantises else (0, 0), grouped=False)
    d_x, d_norm_weight = launch_rms_norm_backward(
        d_normed, d_residual, x, weight=norm_weight, rstd=rstd, y=recomputed,
        quantised=quantised if quantises else None,
    )  # fmt: skip
    operand = recomputed if normed is None else normed.reshape(-1, weight.shape[1])
    grouped = "data_gradient" if grouped_gradient else None
    errors = measure_errors(d_out, operand, weight, matmul, measures=measures, grouped=grouped)
    return d_x, d_norm_weight, weight_gradient(d_out, operand, matmul), errors, *quantised


@_rms_norm_linear_backward_op.register_fake
def _(
    d_out, d_residual, x, rstd, normed, norm_weight, weight, cos=None, sin=None, positions=None,
    num_heads=0, num_kv_heads=0, matmul="bf16", measures=False, grouped_gradient=False,
    values=None, scales=None, quantises=False,
):  # fmt: skip
    gradients = (like.new_empty(like.shape) for like in (x, norm_weight, weight))
    quantised = empty_int8(x, x.shape if quantises else (0, 0), grouped=False)
    return *gradients, empty_errors(x, measures=measures), *quantised


def _rms_norm_linear_setup_context(ctx, inputs, output):
    x, residual, norm_weight, weight, _, recompute, *rest = inputs
    *tables, num_heads, num_kv_heads, matmul, errors, grouped_gradient = rest
    _, new_residual, rstd, normed = output
    ctx.has_residual = residual is not None
    ctx.settings = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "matmul": matmul,
        "measures": errors is not None,
        "grouped_gradient": grouped_gradient,
    }
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd, normed, *(() if ctx.has_residual else (new_residual,)))
    normed_input = new_residual if ctx.has_residual else x
    kept = None if recompute else normed
    ctx.save_for_backward(normed_input, rstd, kept, norm_weight, weight, *tables)


def _rms_norm_linear_backward(ctx, d_out, d_residual, _d_rstd, _d_normed):
    no_gradients = (None,) * 8
    if d_out is None:
        return d_residual, d_residual, None, None, *no_gradients, None, None
    d_x, d_norm_weight, d_weight, d_errors, *_ = _rms_norm_linear_backward_op(
        d_out, d_residual, *ctx.saved_tensors, **ctx.settings
    )
    d_errors = d_errors if ctx.settings["measures"] else None
    d_residual = d_x if ctx.has_residual else None
    return d_x, d_residual, d_norm_weight, d_weight, *no_gradients, d_errors, None


_rms_norm_linear_op.register_autograd(
    _rms_norm_linear_backward, setup_context=_rms_norm_linear_setup_context
)


@torch.library.custom_op("hamner::swiglu_linear", mutates_args=())
def _swiglu_linear_op(
    gate_up: Tensor,
    weight: Tensor,
    recompute: bool,
    matmul: str = "bf16",
    errors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if "forward" not in products(matmul):
        h = launch_swiglu(gate_up)
        out = torch.nn.functional.linear(h, weight)
    else:
        shape = *gate_up.shape[:-1], gate_up.shape[-1] // 2
        quantised = empty_int8(gate_up, shape, grouped=True)
        h = launch_swiglu(gate_up, quantised=quantised, writes_h=not recompute)
        out = forward_int8(quantised, weight, shape)
    return out, h.new_empty(0) if recompute else h


@_swiglu_linear_op.register_fake
def _(gate_up, weight, recompute, matmul="bf16", errors=None):
    out = gate_up.new_empty(*gate_up.shape[:-1], weight.shape[0])
    h_shape = (*gate_up.shape[:-1], weight.shape[1])
    return out, gate_up.new_empty(0 if recompute else h_shape)


@torch.library.custom_op("hamner::swiglu_linear_backward", mutates_args=())
def _swiglu_linear_backward_op(
    d_out: Tensor,
    gate_up: Tensor,
    h: Tensor | None,
    weight: Tensor,
    matmul: str = "bf16",
    measures: bool = False,
    quantises: bool = False,  # d_gate_up, too
    values: Tensor | None = None,  # d_out quantised by rows, and its scales
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_out = d_out.reshape(-1, weight.shape[0])
    d_h = data_gradient(d_out, weight, matmul, values=values, scales=scales)
    recomputed = d_h if h is None else None
    quantised = empty_int8(gate_up, gate_up.shape if quantises else (0, 0), grouped=True)
    d_gate_up = launch_swiglu_backward(
        d_h, gate_up, h=recomputed, quantised=quantised if quantises else None
    )
    operand = recomputed if h is None else h.reshape(-1, weight.shape[1])
    how = {"measures": measures, "grouped": "forward"}
    errors = measure_errors(d_out, operand, weight, matmul, **how)
    return d_gate_up, weight_gradient(d_out, operand, matmul), errors, *quantised


@_swiglu_linear_backward_op.register_fake
def _(
    d_out, gate_up, h, weight, matmul="bf16", measures=False, quantises=False,
    values=None, scales=None,
):  # fmt: skip
    gradients = gate_up.new_empty(gate_up.shape), weight.new_empty(weight.shape)
    quantised = empty_int8(gate_up, gate_up.shape if quantises else (0, 0), grouped=True)
    return *gradients, empty_errors(gate_up, measures=measures), *quantised


def _swiglu_linear_setup_context(ctx, inputs, output):
    gate_up, weight, recompute, ctx.matmul, errors = inputs
    ctx.measures = errors is not None
    _, h = output
    ctx.mark_non_differentiable(h)
    # Or autograd would make zeros of the size of h for a gradient that is never used.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gate_up, None if recompute else h, weight)


def _swiglu_linear_backward(ctx, d_out, _d_h):
    if d_out is None:
        return (None,) * 5
    d_gate_up, d_weight, d_errors, *_ = _swiglu_linear_backward_op(
        d_out, *ctx.saved_tensors, matmul=ctx.matmul, measures=ctx.measures
    )
    return d_gate_up, d_weight, None, None, d_errors if ctx.measures else None


_swiglu_linear_op.register_autograd(
    _swiglu_linear_backward, setup_context=_swiglu_linear_setup_context
)


def _check_matmul_weight(name: str, weight: Tensor, x_name: str, x: Tensor, *, width: int) -> None:
    check_like(name, weight, x_name, x)
    check_shape(name, weight.shape, ("outputs", width))


def check_qkv_rope_arguments(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    *,
    qk_norm: tuple[Tensor, Tensor] | None,
    **rope,
) -> None:
    """The function checks the arguments of `add_rms_norm_qkv_rope`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_norm_arguments(x, residual, norm_weight, "norm_weight")
    _check_matmul_weight("qkv_weight", qkv_weight, "x", x, width=x.shape[-1])
    check_packed_arguments((*x.shape[:-1], qkv_weight.shape[0]), **rope, x=x)
    if qk_norm is not None:
        heads = rope["num_heads"] + 2 * rope["num_kv_heads"]
        check_qk_norm(*qk_norm, head_dim=qkv_weight.shape[0] // heads, x=x)


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    recompute: bool = True,
    matmul: Matmul | str = "bf16",
    errors: Tensor | None = None,
) -> Tensor:
    """The op is `rms_norm`, then a matmul.

    Args:
        x: (..., D) float32, float16 or bfloat16, D up to 8192.
        norm_weight: (D,) float32 or the dtype of x.
        weight: (outputs, D), dtype of x.
        eps: added to the mean of squares.
        recompute: keep x only and write the normed x again in backward; else keep both.
        matmul: how to multiply, see int8_linear.py; "bf16" is torch in the dtype of x.
        errors: as in `int8_linear`.

    Returns:
        (..., outputs) in the dtype of x.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    settings = {"eps": eps, "recompute": recompute, "matmul": matmul, "errors": errors}
    return add_rms_norm_linear(x, None, norm_weight, weight, **settings)[0]


def add_rms_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    recompute: bool = True,
    matmul: Matmul | str = "bf16",
    errors: Tensor | None = None,
    grouped_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op is `add_rms_norm`, then a matmul.

    Args:
        x, norm_weight, weight, eps, matmul, errors: as in `rms_norm_linear`.
        residual: as x, or None where the residual stream begins.
        recompute: keep new_residual only and write the normed one again in backward, or keep both.
        grouped_gradient: in int8, the gradient of out, and the weight that it is multiplied with,
            have a scale each 256 outputs instead of one a row.

    Returns:
        (out, new_residual): out (..., outputs), new_residual (..., D) in the dtype of x. Without
        a residual new_residual is x itself.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_norm_arguments(x, residual, norm_weight, "norm_weight")
    _check_matmul_weight("weight", weight, "x", x, width=x.shape[-1])
    check_matmul(matmul, errors, weight, grouped="data_gradient" if grouped_gradient else None)
    out, new_residual, _, _ = _rms_norm_linear_op(
        x, residual, norm_weight, weight,
        eps=eps, recompute=recompute, matmul=matmul, errors=errors,
        grouped_gradient=grouped_gradient,
    )  # fmt: skip
    return out, x if residual is None else new_residual


def add_rms_norm_qkv_rope(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
    eps: float = 1e-5,
    *,
    recompute: bool = True,
    matmul: Matmul | str = "bf16",
    errors: Tensor | None = None,
    qk_norm: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The op is `add_rms_norm`, the packed qkv matmul, and the rotation of q and k in its result.

    Args:
        x: (B, T, D) float32, float16 or bfloat16, D up to 8192.
        residual, norm_weight, eps, recompute, matmul, errors: as in `add_rms_norm_linear`.
        qkv_weight: ((H + 2 KV) hd, D), dtype of x: query heads, key heads, value heads.
        cos, sin, num_heads, num_kv_heads, positions: as in `rope_packed_`, tables of at least T
            positions; they get no gradient.
        qk_norm: weights (hd,) of the norms of all heads of q and of all heads of k, before the
            rotation (`qk_norm_rope`), float32 or the dtype of x; None for no such norms.

    Returns:
        (qkv, new_residual): qkv (B, T, (H + 2 KV) hd) with q and k rotated, new_residual
        (B, T, D), both in the dtype of x. Without a residual new_residual is x itself.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    rope = {
        "cos": cos, "sin": sin, "positions": positions,
        "num_heads": num_heads, "num_kv_heads": num_kv_heads,
    }  # fmt: skip
    check_qkv_rope_arguments(x, residual, norm_weight, qkv_weight, qk_norm=qk_norm, **rope)
    check_matmul(matmul, errors, qkv_weight, weight_name="qkv_weight")
    qkv, new_residual, _, _ = _rms_norm_linear_op(
        x, residual, norm_weight, qkv_weight,
        eps=eps, recompute=recompute, matmul=matmul, errors=errors,
        **({} if qk_norm else rope),
    )  # fmt: skip
    if qk_norm is not None:
        qkv = qk_norm_rope(qkv, *qk_norm, **rope, eps=eps)
    return qkv, x if residual is None else new_residual


def swiglu_linear(
    gate_up: Tensor,
    weight: Tensor,
    *,
    recompute: bool = True,
    matmul: Matmul | str = "bf16",
    errors: Tensor | None = None,
) -> Tensor:
    """The op is `swiglu`, then a matmul.

    Args:
        gate_up: (..., 2I) float32, float16 or bfloat16, gate first.
        weight: (outputs, I), dtype of gate_up.
        recompute: keep gate_up only and write swiglu's result again in backward; else keep both.
        matmul, errors: as in `rms_norm_linear`; in int8 swiglu's result has a scale each 256
            elements.

    Returns:
        (..., outputs) in the dtype of gate_up.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_gate_up(gate_up)
    _check_matmul_weight("weight", weight, "gate_up", gate_up, width=gate_up.shape[-1] // 2)
    check_matmul(matmul, errors, weight, grouped="forward")
    return _swiglu_linear_op(gate_up, weight, recompute, matmul=matmul, errors=errors)[0]


def rms_norm_linear_reference(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5
) -> Tensor:
    """This is `rms_norm_linear` in plain torch."""
    return torch.nn.functional.linear(rms_norm_reference(x, norm_weight, eps), weight)


def add_rms_norm_linear_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """This is `add_rms_norm_linear` in plain torch."""
    new_residual = x if residual is None else x + residual
    return rms_norm_linear_reference(new_residual, norm_weight, weight, eps), new_residual


def add_rms_norm_qkv_rope_reference(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    *rope: Tensor | int | None,
    eps: float = 1e-5,
    qk_norm: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """This is `add_rms_norm_qkv_rope` in plain torch; `rope` is what `rope_packed_` takes."""
    qkv, new_residual = add_rms_norm_linear_reference(x, residual, norm_weight, qkv_weight, eps=eps)
    if qk_norm is not None:
        return qk_norm_rope_reference(qkv, *qk_norm, *rope, eps=eps), new_residual
    return rope_packed_reference(qkv, *rope), new_residual


def swiglu_linear_reference(gate_up: Tensor, weight: Tensor) -> Tensor:
    """This is `swiglu_linear` in plain torch."""
    return torch.nn.functional.linear(swiglu_reference(gate_up), weight)
