"""The router's projection of a mixture of experts: half-precision operands, fp32 logits.

    logits = x @ weight^T

The router's choice is discrete, and logits rounded to bf16 would tie experts that fp32 tells apart.
Products of bf16 numbers are exact in fp32, so a matmul that reads x as it is and accumulates and
writes fp32 gives what casting x to fp32 first would, without the copy of x, (N, D) fp32, and
without keeping it for backward.

Backward's d_logits are fp32, but the matmul wants x's dtype: each is split into the nearest
half-precision number and the rest, again rounded, which are matmul operands side by side. Together
they hold 16 bits of mantissa, more than the gradients of x and weight keep.

Bytes that must move, e = bytes an element: forward reads x, N D e; backward reads it again and
writes d_x, 2 N D e. For bf16, N 24,576, D 768 that is 38 and 75 MB: 0.013 and 0.025 ms at 3.0 TB/s,
0.044 and 0.089 ms at 850 GB/s. cuBLAS does the matmuls; there is no kernel of our own here.
"""

import torch
from torch import Tensor

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32."""
    if a.dtype == torch.float32 or not a.is_cuda:  # torch has no mixed matmul on the CPU
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _split(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of `dtype` that add up to fp32 x as closely as two of them can."""
    if dtype == torch.float32:
        return [x]
    high = x.to(dtype)
    return [high, (x - high.float()).to(dtype)]


@torch.library.custom_op("hamner::router_linear", mutates_args=())
def _router_linear_op(x: Tensor, weight: Tensor) -> Tensor:
    return _mm_float32(x, weight.t())


@_router_linear_op.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@torch.library.custom_op("hamner::router_linear_backward", mutates_args=())
def _router_linear_backward_op(
    d_logits: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    parts = _split(d_logits, x.dtype)
    d_logits = torch.cat(parts, dim=1)
    d_x = torch.mm(d_logits, weight.repeat(len(parts), 1))
    d_weight = _mm_float32(d_logits.t(), x).unflatten(0, (len(parts), -1)).sum(0)
    return d_x, d_weight.to(weight.dtype)


@_router_linear_backward_op.register_fake
def _(d_logits, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_logits):
    return _router_linear_backward_op(d_logits, *ctx.saved_tensors)


_router_linear_op.register_autograd(_backward, setup_context=_setup_context)


def router_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Router logits in fp32.

    Args:
        x: (N, D) float32, float16 or bfloat16.
        weight: (E, D), dtype of x.

    Returns:
        (N, E) float32.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    if x.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"x is {x.dtype}; it must be float32, float16 or bfloat16")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}, x is {x.dtype}; they must agree")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be "
            "(tokens, width) and (experts, width)"
        )
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}")
    return _router_linear_op(x, weight)


def router_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """`router_linear` in plain torch: float64 for float64 input, else float32."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.nn.functional.linear(x.to(compute), weight.to(compute))
