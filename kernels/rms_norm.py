"""This is RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), the residual addition before it.

    new_residual = x + residual
    y = new_residual / sqrt(mean(new_residual^2) + eps) * weight

Fused forward: the addition, the statistics, the scaling. Fused backward: the norm's own gradient,
the gradient that arrives at new_residual, and the partial sums of the weight's gradient; on
request also y again, for whoever did not keep it (fused_linear.py). Forward can give y as int8 and
scales, beside y or in its place, backward d_x beside it. d_x and d_residual are equal, so one
tensor is written and serves as both.

Bytes that must move, e = bytes an element of x, an (N, D) input:

    forward     reads x, residual, writes y, new_residual    4 N D e    (rms_norm alone: 2 N D e)
    backward    reads d_y, d_residual, x, writes d_x         4 N D e    (with y: 5 N D e)

and 4 bytes a row for rstd. The floor is bytes / bandwidth: the arithmetic, under 20 FLOPs an
element, never shows. For bf16, N 24,576, D 1024 that is 201 MB: 0.067 ms at 3.0 TB/s, 0.24 ms at
850 GB/s.

The weight's gradient sums over all rows: each of a fixed number of programs sums its own rows in
registers, a second pass (launch.py) adds those in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import check_dtype, check_like, check_same_device, check_shape
from hamner.kernels.int8_quantize import (
    Int8Matrix,
    int8_pointers,
    magnitude_bits,
    scale_and_inverse,
    to_int8,
)
from hamner.kernels.launch import capability, sum_partials, tile_shape

MAX_WIDTH = 8192  # a row is held in registers


class Config(NamedTuple):
    """A config says how many elements a program holds at once and its warps, by direction.

    Rows narrower than the tile share a program; a wider row takes a program with more warps.
    """

    forward_tile: int
    forward_warps: int
    backward_tile: int
    backward_warps: int
    backward_programs_per_sm: int
    backward_stages: int
    """rows of tiles that are under way to shared memory at once; 1 loads each when it is needed"""


# As measured (`python -m bench.tune rms_norm`, profiles/LOG.md), 9.0 on an H100, the others as what
# an H200 that executes sm_86's code runs fastest: 16 elements a thread are two 16-byte loads of
# bf16 from each input in flight, and backward, which also accumulates the weight's gradient, has
# the next rows under way meanwhile.
CONFIGS = {
    "8.6": Config(2048, 4, 2048, 4, 2, 3),
    "8.0": Config(2048, 4, 2048, 4, 2, 3),
    "9.0": Config(2048, 2, 2048, 4, 2, 3),
}


@triton.jit
def rms_norm_forward_kernel(
    x_ptr,  # (N, D) input dtype
    residual_ptr,  # (N, D) input dtype, or None
    weight_ptr,  # (D,) fp32 or input dtype
    y_ptr,  # (N, D) input dtype, or None
    values_ptr,  # (N, D) int8: y quantised, or None
    scales_ptr,  # (N,) fp32: its scales, or None
    new_residual_ptr,  # (N, D) input dtype, written where there is a residual
    rstd_ptr,  # (N,) fp32: 1 / root mean square
    N,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < N
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    offs = offs_m[:, None] * D + offs_d[None, :]

    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
        # Rounded before it is normed: backward sees only the stored sum, and recomputes y from it.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(new_residual_ptr + offs, x, mask=mask)
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    y = (x * rstd[:, None] * weight[None, :]).to(x_ptr.dtype.element_ty)
    if y_ptr is not None:
        tl.store(y_ptr + offs, y, mask=mask)
    if values_ptr is not None:
        scale, inverse = scale_and_inverse(tl.max(magnitude_bits(y), axis=1))
        tl.store(scales_ptr + offs_m, scale, mask=mask_m)
        tl.store(int8_pointers(values_ptr, offs, y), to_int8(y, inverse[:, None]), mask=mask)


@triton.jit
def rms_norm_backward_kernel(
    d_y_ptr,  # (N, D) input dtype
    d_residual_ptr,  # (N, D) input dtype: gradient that arrives at new_residual, or None
    x_ptr,  # (N, D) input dtype: what was normed
    weight_ptr,  # (D,) fp32 or input dtype
    rstd_ptr,  # (N,) fp32
    d_x_ptr,  # (N, D) input dtype
    d_weight_ptr,  # (programs, D) fp32 partial sums
    y_ptr,  # (N, D) input dtype: forward's result again, or None; may be d_y_ptr
    values_ptr,  # (N, D) int8: d_x quantised, or None
    scales_ptr,  # (N,) fp32: its scales, or None
    N,
    rows_per_program,  # a multiple of BLOCK_M
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    first_row = pid * rows_per_program
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    for step in tl.range(rows_per_program // BLOCK_M, num_stages=STAGES):
        offs_m = first_row + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        mask = mask_m[:, None] & mask_d[None, :]
        offs = offs_m[:, None] * D + offs_d[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)

        x_hat = x * rstd[:, None]
        d_weight += d_y * x_hat
        d_x_hat = d_y * weight[None, :]
        correlation = tl.sum(d_x_hat * x_hat, axis=1) / D
        d_x = (d_x_hat - x_hat * correlation[:, None]) * rstd[:, None]
        if d_residual_ptr is not None:
            d_x += tl.load(d_residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        d_x = d_x.to(d_x_ptr.dtype.element_ty)
        tl.store(d_x_ptr + offs, d_x, mask=mask)
        if values_ptr is not None:
            scale, inverse = scale_and_inverse(tl.max(magnitude_bits(d_x), axis=1))
            tl.store(scales_ptr + offs_m, scale, mask=mask_m)
            values = to_int8(d_x, inverse[:, None])
            tl.store(int8_pointers(values_ptr, offs, d_x), values, mask=mask)
        if y_ptr is not None:
            # Safe over d_y: same offsets and dtype, so the thread that writes an element is the
            # one that has read it.
            y = x_hat * weight[None, :]
            tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)

    tl.store(d_weight_ptr + pid * D + offs_d, tl.sum(d_weight, axis=0), mask=mask_d)


def empty_results(
    x: Tensor, residual: Tensor | None, writes_y: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The function allocates what `launch_rms_norm` returns."""
    y = x.new_empty(x.shape if writes_y else 0)
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return y, x.new_empty(0 if residual is None else x.shape), rstd


def launch_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    quantised: Int8Matrix | None = None,
    writes_y: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher norms x + residual.

    Args:
        x, residual, weight, eps: as in `add_rms_norm`.
        quantised: where to write y as `quantize_int8` gives it, too.
        writes_y: whether y itself is wanted.

    Returns:
        (y, new_residual, rstd): y shaped as x or empty, new_residual too or empty where there is no
        residual, rstd (N,) fp32.
    """
    x = x.contiguous()
    y, new_residual, rstd = empty_results(x, residual, writes_y)
    values, scales = (None, None) if quantised is None else quantised
    width, num_rows = x.shape[-1], len(rstd)
    if num_rows == 0:
        return y, new_residual, rstd
    if residual is not None:
        residual = residual.contiguous()
    config = CONFIGS[capability(x.device)]
    block_m, block_d, warps = tile_shape(config.forward_tile, config.forward_warps, width)
    with torch.cuda.device_of(x):
        rms_norm_forward_kernel[(triton.cdiv(num_rows, block_m),)](
            x, residual, weight.contiguous(), y if writes_y else None, values, scales,
            new_residual, rstd, num_rows, eps,
            D=width, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return y, new_residual, rstd


def launch_rms_norm_backward(
    d_y: Tensor,
    d_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    y: Tensor | None = None,
    quantised: Int8Matrix | None = None,
) -> tuple[Tensor, Tensor]:
    """The launcher differentiates the norm.

    Args:
        d_y: gradient of y, shaped as x.
        d_residual: gradient that arrives at new_residual from elsewhere, to be added to d_x.
        x: what was normed (new_residual, where there was a residual).
        weight: (D,).
        rstd: (N,) fp32, from forward.
        y: where to write forward's y again; `d_y` itself, to write it over d_y.
        quantised: where to write d_x as `quantize_int8` gives it, too.

    Returns:
        (d_x shaped as x, d_weight (D,) in the weight's dtype).
    """
    x = x.contiguous()
    d_y = d_y.contiguous()
    width = x.shape[-1]
    num_rows = x.numel() // width
    d_x = torch.empty_like(x)
    if num_rows == 0:
        return d_x, torch.zeros_like(weight)
    values, scales = (None, None) if quantised is None else quantised
    if d_residual is not None:
        d_residual = d_residual.contiguous()
    config = CONFIGS[capability(x.device)]
    block_m, block_d, warps = tile_shape(config.backward_tile, config.backward_warps, width)
    multiprocessors = (
        torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    )
    max_programs = multiprocessors * config.backward_programs_per_sm
    rows_per_program = triton.cdiv(triton.cdiv(num_rows, max_programs), block_m) * block_m
    num_programs = triton.cdiv(num_rows, rows_per_program)
    partial_sums = x.new_empty(num_programs, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(num_programs,)](
            d_y, d_residual, x, weight.contiguous(), rstd, d_x, partial_sums, y, values, scales,
            num_rows, rows_per_program,
            D=width, BLOCK_M=block_m, BLOCK_D=block_d, STAGES=config.backward_stages,
            num_warps=warps,
        )  # fmt: skip
    return d_x, sum_partials(partial_sums, weight)


@torch.library.custom_op("hamner::rms_norm", mutates_args=())
def _rms_norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_rms_norm(x, residual, weight, eps)


@_rms_norm_op.register_fake
def _(x, residual, weight, eps):
    return empty_results(x, residual)


@torch.library.custom_op("hamner::rms_norm_backward", mutates_args=())
def _rms_norm_backward_op(
    d_y: Tensor, d_residual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return launch_rms_norm_backward(d_y, d_residual, x, weight=weight, rstd=rstd)


@_rms_norm_backward_op.register_fake
def _(d_y, d_residual, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _ = inputs
    _, new_residual, rstd = output
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd, *(() if ctx.has_residual else (new_residual,)))
    ctx.save_for_backward(new_residual if ctx.has_residual else x, weight, rstd)


def _backward(ctx, d_y, d_residual, _d_rstd):
    if d_y is None:
        return d_residual, d_residual, None, None
    d_x, d_weight = _rms_norm_backward_op(d_y, d_residual, *ctx.saved_tensors)
    return d_x, d_x if ctx.has_residual else None, d_weight, None


_rms_norm_op.register_autograd(_backward, setup_context=_setup_context)


def check_norm_arguments(
    x: Tensor, residual: Tensor | None, weight: Tensor, weight_name: str = "weight"
) -> None:
    """The function checks what every op that begins with a norm is given.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_dtype("x", x)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be 1 to {MAX_WIDTH}")
    check_dtype(weight_name, weight, (x.dtype, torch.float32))
    check_shape(weight_name, weight.shape, x.shape[-1:])
    check_same_device(weight_name, weight, "x", x)
    if residual is not None:
        check_like("residual", residual, "x", x)
        check_shape("residual", residual.shape, x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The op norms the last axis by its root mean square.

    Args:
        x: (..., D) float32, float16 or bfloat16, D up to 8192.
        weight: (D,) float32 or the dtype of x.
        eps: added to the mean of squares.

    Returns:
        (..., D) in the dtype of x. Statistics and products are computed in float32.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_norm_arguments(x, None, weight)
    return _rms_norm_op(x, None, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The op adds to the residual stream and norms the sum.

    Args:
        x, weight, eps: as in `rms_norm`.
        residual: as x.

    Returns:
        (y, new_residual), both (..., D) in the dtype of x: new_residual = x + residual rounded to
        that dtype, y the norm of it.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_norm_arguments(x, residual, weight)
    return _rms_norm_op(x, residual, weight, eps)[:2]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """This is `rms_norm` in plain torch; float64 throughout for float64 x, else float32 inside."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_compute = x.to(compute)
    rstd = torch.rsqrt(x_compute.square().mean(dim=-1, keepdim=True) + eps)
    return (x_compute * rstd * weight.to(compute)).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """This is `add_rms_norm` in plain torch."""
    new_residual = x + residual
    return rms_norm_reference(new_residual, weight, eps), new_residual
