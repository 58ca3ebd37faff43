"""The three matmuls of a linear layer are computed as `matmul` says: in int8 or by torch.

                        "bf16"     "int8"                           "int8-all"
    out                 torch      x and weight by rows             the same
    gradient of x       torch      d_out and weight^T by rows       the same
    gradient of weight  torch      torch                            d_out^T and x^T by 256 tokens

"bf16" stands for torch's matmul in the operands' own dtype. The three can also be chosen one by one
(`PRODUCTS`), and an input `errors` gets, as its gradient, how much of each operand quantisation
loses (int8_error.py). A quantised operand has a scale a row or, where the caller says so, one each
256 of the reduced axis (int8_quantize.py): SwiGLU's result and the gradient of its operand have
outliers that would spoil a whole row, and a token's gradients differ too much from another's for
one scale over all tokens.

Norm and SwiGLU quantise what they write for the next matmul (fused_linear.py), SwiGLU's backward
the gradient of gate_up (norm_mlp.py), a norm's that of the layer before it (int8_handover.py). All
else takes a pass of its own: attention's result, and the gradient that comes from attention.
Weights are quantised where they are used, in the layout that is needed there, not kept: for option
a that moves 1.9 GB a micro-batch, 2.0 ms at 936 GB/s beside some 700 ms, and both layouts would
take 0.5 GiB. Nothing quantised outlives its matmul, so backward keeps what it keeps with "bf16".
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from hamner.kernels.checks import check_dtype, check_like, check_same_device, check_shape
from hamner.kernels.int8_error import SPOTS, launch_quantization_error
from hamner.kernels.int8_handover import Handover
from hamner.kernels.int8_matmul import int8_matmul, int8_matmul_reference
from hamner.kernels.int8_quantize import (
    MAX_ROW,
    Int8Matrix,
    quantize_int8,
    quantize_int8_reference,
)

Matmul = Literal["bf16", "int8", "int8-all"]
PRODUCTS = "forward", "data_gradient", "weight_gradient"
OPERANDS = {
    "input": "forward",
    "weight": "forward",
    "gradient": "data_gradient",
    "weight_transposed": "data_gradient",
    "gradient_transposed": "weight_gradient",
    "input_transposed": "weight_gradient",
}
"""operand: the product it is quantised for; the gradient is that of the result"""
_MATMULS = {"bf16": (), "int8": PRODUCTS[:2], "int8-all": PRODUCTS}


def products(matmul: str) -> tuple[str, ...]:
    """The function gives those of PRODUCTS that `matmul`, or a text of `join_products`, has in
    int8."""
    return _MATMULS[matmul] if matmul in _MATMULS else tuple(matmul.split("+"))


def join_products(chosen: Iterable[str]) -> str:
    """The function gives the `matmul` that has the chosen ones of PRODUCTS in int8."""
    chosen = set(chosen)
    return "+".join(product for product in PRODUCTS if product in chosen) or "bf16"


def forward_int8(x: Int8Matrix, weight: Tensor, shape: Sequence[int]) -> Tensor:
    """The function gives x, quantised from this shape (..., in), times weight (out, in) transposed:
    (..., out) in the dtype of weight, which is quantised as x is."""
    rows = quantize_int8(weight.contiguous(), grouped=len(x.scales) > 1)
    return int8_matmul(x, rows, weight.dtype).view(*shape[:-1], len(weight))


def data_gradient(
    d_out: Tensor,
    weight: Tensor,
    matmul: str,
    *,
    grouped: bool = False,
    values: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """The function gives d_out (N, out) times weight (out, in): (N, in); `values` and `scales` are
    d_out quantised by rows, `grouped` or not, where that is done."""
    if "data_gradient" not in products(matmul):
        return torch.mm(d_out, weight)
    if values is None:
        values, scales = quantize_int8(d_out.contiguous(), grouped=grouped)
    columns = quantize_int8(weight.contiguous(), transposed=True, grouped=grouped)
    return int8_matmul(Int8Matrix(values, scales), columns, d_out.dtype)


def weight_gradient(d_out: Tensor, x: Tensor, matmul: str) -> Tensor:
    """The function gives d_out (N, out), transposed, times x (N, in): (out, in)."""
    if "weight_gradient" not in products(matmul):
        return torch.mm(d_out.t(), x)
    operands = (quantize_int8(y.contiguous(), transposed=True, grouped=True) for y in (d_out, x))
    return int8_matmul(*operands, d_out.dtype)


def empty_errors(like: Tensor, *, measures: bool) -> Tensor:
    """The function gives what `errors` has as its gradient, uninitialised; without it (0,)."""
    shape = (len(OPERANDS), SPOTS, 2) if measures else (0,)
    return like.new_empty(shape, dtype=torch.float32)


def measure_errors(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    matmul: str,
    *,
    measures: bool,
    grouped: str | None = None,
) -> Tensor:
    """The function gives the sums of int8_error.py for the operands of a linear layer.

    Args:
        d_out, x, weight: (N, out), (N, in) and (out, in).
        matmul: operands of what is not in int8 have sums of 0.
        measures: whether they are wanted.
        grouped: "forward" or "data_gradient" if that product has a scale each 256 elements.

    Returns:
        (OPERANDS, SPOTS, 2) fp32, or (0,) if they are not wanted.
    """
    sums = empty_errors(x, measures=measures).zero_()
    if not measures:
        return sums
    how = (
        (x, {"grouped": grouped == "forward"}),
        (weight, {"grouped": grouped == "forward"}),
        (d_out, {"grouped": grouped == "data_gradient"}),
        (weight, {"transposed": True, "grouped": grouped == "data_gradient"}),
        (d_out, {"transposed": True, "grouped": True}),
        (x, {"transposed": True, "grouped": True}),
    )
    with torch.cuda.device_of(x):
        for out, product, (operand, mode) in zip(sums, OPERANDS.values(), how, strict=True):
            if product in products(matmul):
                launch_quantization_error(operand, out, **mode)
    return sums


@torch.library.custom_op("hamner::int8_linear", mutates_args=())
def _int8_linear_op(x: Tensor, weight: Tensor, matmul: str) -> Tensor:
    if "forward" not in products(matmul):
        return torch.nn.functional.linear(x, weight)
    rows = quantize_int8(x.reshape(-1, x.shape[-1]).contiguous())
    return forward_int8(rows, weight, x.shape)


@_int8_linear_op.register_fake
def _(x, weight, matmul):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("hamner::int8_linear_backward", mutates_args=())
def _int8_linear_backward_op(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    matmul: str,
    measures: bool,
    values: Tensor | None = None,  # d_out quantised by rows, and its scales
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, operand = d_out.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
    d_x = data_gradient(d_out, weight, matmul, values=values, scales=scales).view(x.shape)
    errors = measure_errors(d_out, operand, weight, matmul, measures=measures)
    return d_x, weight_gradient(d_out, operand, matmul), errors


@_int8_linear_backward_op.register_fake
def _(d_out, x, weight, matmul, measures, values=None, scales=None):
    gradients = x.new_empty(x.shape), weight.new_empty(weight.shape)
    return *gradients, empty_errors(x, measures=measures)


def named(rows: Int8Matrix | None) -> dict[str, Tensor]:
    """The function gives the arguments of a backward op whose gradient is quantised already."""
    return {} if rows is None else rows._asdict()


class _Int8Linear(torch.autograd.Function):
    """It composes registered ops, so that each is seen by the profiler and by torch.compile."""

    @staticmethod
    def forward(ctx, x, weight, matmul, errors, takes_from):
        ctx.matmul, ctx.measures, ctx.takes_from = matmul, errors is not None, takes_from
        ctx.save_for_backward(x, weight)
        return _int8_linear_op(x, weight, matmul)

    @staticmethod
    def backward(ctx, d_out):
        rows = None if ctx.takes_from is None else ctx.takes_from.take(d_out)
        how = {"matmul": ctx.matmul, "measures": ctx.measures, **named(rows)}
        d_x, d_weight, d_errors = _int8_linear_backward_op(d_out, *ctx.saved_tensors, **how)
        return d_x, d_weight, None, d_errors if ctx.measures else None, None


def check_matmul(
    matmul: str,
    errors: Tensor | None,
    weight: Tensor,
    *,
    weight_name: str = "weight",
    errors_name: str = "errors",
    grouped: str | None = None,
) -> None:
    """The function checks how a linear layer of this weight is to multiply.

    Args:
        matmul, errors, weight: as in `int8_linear`.
        weight_name, errors_name: what the caller calls them.
        grouped: as in `measure_errors`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if matmul not in _MATMULS and not set(products(matmul)) <= set(PRODUCTS):
        raise ValueError(f"matmul is {matmul!r}; it must be one of {', '.join(_MATMULS)}")
    outputs, inputs = weight.shape
    for product, row in (("forward", inputs), ("data_gradient", outputs)):
        if product in products(matmul) and product != grouped and row > MAX_ROW:
            raise ValueError(
                f"{weight_name} has shape {(outputs, inputs)}; int8 has one scale for {row:,} "
                f"elements there, and takes up to {MAX_ROW:,}"
            )
    if errors is not None:
        check_dtype(errors_name, errors, (torch.float32,))
        check_same_device(errors_name, errors, weight_name, weight)
        check_shape(errors_name, errors.shape, (len(OPERANDS), SPOTS, 2))


def int8_linear(
    x: Tensor,
    weight: Tensor,
    matmul: Matmul | str = "int8",
    errors: Tensor | None = None,
    *,
    takes_from: Handover | None = None,
) -> Tensor:
    """The op is a linear layer without bias that multiplies int8 matrices.

    Args:
        x: (..., in) float32, float16 or bfloat16.
        weight: (out, in), dtype of x.
        matmul: "int8": out and the gradient of x; "int8-all": the gradient of weight too; or a text
            of `join_products`.
        errors: (OPERANDS, SPOTS, 2) float32, or None. Its values are not used; its gradient is the
            errors of the operands, see `measure_errors`.
        takes_from: where the gradient of out may be quantised already, left by the backward of the
            norm that reads out.

    Returns:
        (..., out) in the dtype of x. Gradients have the dtype of what they belong to.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_dtype("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must not be empty")
    check_like("weight", weight, "x", x)
    check_shape("weight", weight.shape, ("outputs", x.shape[-1]))
    check_matmul(matmul, errors, weight)
    return _Int8Linear.apply(x, weight, matmul, errors, takes_from)


def int8_linear_reference(
    x: Tensor, weight: Tensor, d_out: Tensor, matmul: Matmul = "int8"
) -> tuple[Tensor, Tensor, Tensor]:
    """This is `int8_linear` in plain torch, to the bit, and its gradients: out, d_x, d_weight.

    x and d_out are (N, in) and (N, out).
    """
    rows, columns = quantize_int8_reference(x), quantize_int8_reference(weight)
    out = int8_matmul_reference(rows, columns, x.dtype)
    rows = quantize_int8_reference(d_out)
    d_x = int8_matmul_reference(rows, quantize_int8_reference(weight, transposed=True), x.dtype)
    if matmul == "int8":
        return out, d_x, d_out.T @ x
    by_tokens = (quantize_int8_reference(y, transposed=True, grouped=True) for y in (d_out, x))
    return out, d_x, int8_matmul_reference(*by_tokens, x.dtype)
