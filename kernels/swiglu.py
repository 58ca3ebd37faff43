"""This is SwiGLU (Shazeer 2020, arXiv:2002.05202) on one packed projection.

    gate, up = gate_up[..., :I], gate_up[..., I:]
    h = silu(gate) * up

One pass forward, which can give h as int8 and scales, beside h or in its place. One pass backward,
which on request also writes h again, over the gradient it has just read, for whoever did not keep
it (fused_linear.py), and can give the gradient as int8 and scales beside it (norm_mlp.py).

A scale is for 256 columns, and a program that quantises has a tile of so many: the result has
outliers (arXiv:2409.12517) that would spoil a whole row, and so has the gradient.

Bytes that must move, e = bytes an element, h an (N, I) result:

    forward     reads gate_up, writes h                       3 N I e
    backward    reads gate_up, d_h, writes d_gate_up          5 N I e    (with h: 6 N I e)

The floor is bytes / bandwidth: the arithmetic, under 30 FLOPs an element, never shows. For bf16,
N 24,576, I 2816 that is 415 MB and 692 MB: 0.14 and 0.23 ms at 3.0 TB/s, 0.49 and 0.81 ms at
850 GB/s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import check_dtype
from hamner.kernels.int8_quantize import (
    GROUP,
    Int8Matrix,
    int8_pointers,
    magnitude_bits,
    scale_and_inverse,
    to_int8,
)
from hamner.kernels.launch import capability


class Config(NamedTuple):
    """A config is a program's tile of h and its warps, for each direction, and with int8, where a
    tile has 256 columns, its rows and warps."""

    forward_block_m: int
    forward_block_i: int
    forward_warps: int
    backward_block_m: int
    backward_block_i: int
    backward_warps: int
    int8_forward_block_m: int
    int8_forward_warps: int
    int8_backward_block_m: int
    int8_backward_warps: int


# As measured (`python -m bench.tune swiglu`, profiles/LOG.md): 9.0's forward on an H100, the rest
# of 9.0 on an H200, the others as what an H200 that executes sm_86's code runs fastest: whole rows,
# though a quarter of the lanes idles at I 2816.
CONFIGS = {
    "8.6": Config(2, 4096, 16, 1, 4096, 4, 8, 4, 8, 8),
    "8.0": Config(2, 4096, 16, 1, 4096, 4, 8, 4, 8, 8),
    "9.0": Config(1, 4096, 16, 1, 4096, 4, 8, 4, 8, 8),
}


def forward_tile(config: Config, intermediate: int, *, quantises: bool) -> tuple[int, int, int]:
    """The function gives rows and columns of forward's tile, and its warps."""
    if quantises:
        return config.int8_forward_block_m, GROUP.value, config.int8_forward_warps
    shape = _tile_shape(config.forward_block_m, config.forward_block_i, intermediate)
    return *shape, config.forward_warps


def backward_tile(config: Config, intermediate: int, *, quantises: bool) -> tuple[int, int, int]:
    """The function gives rows and columns of backward's tile, and its warps."""
    if quantises:
        return config.int8_backward_block_m, GROUP.value, config.int8_backward_warps
    shape = _tile_shape(config.backward_block_m, config.backward_block_i, intermediate)
    return *shape, config.backward_warps


def _tile_shape(block_m: int, block_i: int, intermediate: int) -> tuple[int, int]:
    """The function gives rows and columns of a tile: no wider than h, with as many elements."""
    columns = min(block_i, triton.next_power_of_2(intermediate))
    return block_m * (block_i // columns), columns


@triton.jit
def _load_gate_and_up(
    gate_up_ptr, N, INTERMEDIATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr
):
    """A program gets its tile of gate and up, the offsets in gate_up and in h, and the mask."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (offs_m < N)[:, None] & (offs_i < INTERMEDIATE)[None, :]
    offs_gate = offs_m[:, None] * (2 * INTERMEDIATE) + offs_i[None, :]
    offs_h = offs_m[:, None] * INTERMEDIATE + offs_i[None, :]

    gate = tl.load(gate_up_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offs_gate + INTERMEDIATE, mask=mask, other=0.0).to(tl.float32)
    return gate, up, offs_gate, offs_h, mask


@triton.jit
def _store_int8(
    x,  # (BLOCK_M, 256)
    values_ptr,  # (N, K) int8
    scales_ptr,  # (groups, N) fp32
    offs,  # of x in values
    mask,
    group,
    N,
    BLOCK_M: tl.constexpr,
):
    """A program quantises its tile of rows, all of one group."""
    scale, inverse = scale_and_inverse(tl.max(magnitude_bits(x), axis=1))
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(scales_ptr + group.to(tl.int64) * N + offs_m, scale, mask=offs_m < N)
    tl.store(int8_pointers(values_ptr, offs, x), to_int8(x, inverse[:, None]), mask=mask)


@triton.jit
def swiglu_forward_kernel(
    gate_up_ptr,  # (N, 2I) input dtype
    h_ptr,  # (N, I) input dtype, or None
    values_ptr,  # (N, I) int8: h quantised, or None
    scales_ptr,  # (groups, N) fp32: its scales, each of BLOCK_I elements, or None
    N,
    INTERMEDIATE: tl.constexpr,  # I
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    gate, up, offs_gate, offs_h, mask = _load_gate_and_up(
        gate_up_ptr, N, INTERMEDIATE, BLOCK_M, BLOCK_I
    )
    h = (gate * tl.sigmoid(gate) * up).to(gate_up_ptr.dtype.element_ty)
    if h_ptr is not None:
        tl.store(h_ptr + offs_h, h, mask=mask)
    if values_ptr is not None:
        _store_int8(h, values_ptr, scales_ptr, offs_h, mask, tl.program_id(1), N, BLOCK_M)


@triton.jit
def swiglu_backward_kernel(
    d_h_ptr,  # (N, I) input dtype
    gate_up_ptr,  # (N, 2I) input dtype
    d_gate_up_ptr,  # (N, 2I) input dtype
    values_ptr,  # (N, 2I) int8: d_gate_up quantised, where BLOCK_I divides I; or None
    scales_ptr,  # (groups, N) fp32: its scales, each of BLOCK_I elements, or None
    h_ptr,  # (N, I) input dtype: forward's result again, or None; may be d_h_ptr
    N,
    INTERMEDIATE: tl.constexpr,  # I
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    gate, up, offs_gate, offs_h, mask = _load_gate_and_up(
        gate_up_ptr, N, INTERMEDIATE, BLOCK_M, BLOCK_I
    )
    d_h = tl.load(d_h_ptr + offs_h, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    element = d_gate_up_ptr.dtype.element_ty
    d_gate = (d_h * up * (sigmoid + silu * (1.0 - sigmoid))).to(element)
    d_up = (d_h * silu).to(element)
    tl.store(d_gate_up_ptr + offs_gate, d_gate, mask=mask)
    tl.store(d_gate_up_ptr + offs_gate + INTERMEDIATE, d_up, mask=mask)
    if values_ptr is not None:
        group = tl.program_id(1)
        _store_int8(d_gate, values_ptr, scales_ptr, offs_gate, mask, group, N, BLOCK_M)
        values_ptr += INTERMEDIATE
        group += INTERMEDIATE // BLOCK_I
        _store_int8(d_up, values_ptr, scales_ptr, offs_gate, mask, group, N, BLOCK_M)
    if h_ptr is not None:
        # Safe over d_h: same offsets and dtype, so the thread that writes an element is the one
        # that has read it.
        tl.store(h_ptr + offs_h, (silu * up).to(element), mask=mask)


def launch_swiglu(
    gate_up: Tensor, *, quantised: Int8Matrix | None = None, writes_h: bool = True
) -> Tensor:
    """The launcher computes h, (..., I), from gate_up, (..., 2I).

    Args:
        gate_up: (..., 2I).
        quantised: where to write h as `quantize_int8` gives it, a scale each 256 elements, too.
        writes_h: whether h itself is wanted; else the result is empty.
    """
    gate_up = gate_up.contiguous()
    intermediate = gate_up.shape[-1] // 2
    h = gate_up.new_empty((*gate_up.shape[:-1], intermediate) if writes_h else 0)
    if gate_up.numel() == 0:
        return h
    num_rows = gate_up.numel() // (2 * intermediate)
    config, quantises = CONFIGS[capability(gate_up.device)], quantised is not None
    block_m, block_i, warps = forward_tile(config, intermediate, quantises=quantises)
    values, scales = quantised if quantises else (None, None)
    grid = (triton.cdiv(num_rows, block_m), triton.cdiv(intermediate, block_i))
    with torch.cuda.device_of(gate_up):
        swiglu_forward_kernel[grid](
            gate_up, h if writes_h else None, values, scales, num_rows,
            INTERMEDIATE=intermediate, BLOCK_M=block_m, BLOCK_I=block_i, num_warps=warps,
        )  # fmt: skip
    return h


def launch_swiglu_backward(
    d_h: Tensor, gate_up: Tensor, *, h: Tensor | None = None, quantised: Int8Matrix | None = None
) -> Tensor:
    """The launcher computes d_gate_up, (..., 2I).

    Args:
        d_h: (..., I).
        gate_up: (..., 2I).
        h: where to write forward's result again; `d_h` itself, to write it over d_h.
        quantised: where to write d_gate_up as `quantize_int8` gives it, a scale each 256 elements,
            too; 256 divides I.
    """
    gate_up = gate_up.contiguous()
    d_h = d_h.contiguous()
    intermediate = gate_up.shape[-1] // 2
    d_gate_up = torch.empty_like(gate_up)
    if d_h.numel() == 0:
        return d_gate_up
    num_rows = d_h.numel() // intermediate
    config, quantises = CONFIGS[capability(gate_up.device)], quantised is not None
    block_m, block_i, warps = backward_tile(config, intermediate, quantises=quantises)
    values, scales = quantised if quantises else (None, None)
    grid = (triton.cdiv(num_rows, block_m), triton.cdiv(intermediate, block_i))
    with torch.cuda.device_of(gate_up):
        swiglu_backward_kernel[grid](
            d_h, gate_up, d_gate_up, values, scales, h, num_rows,
            INTERMEDIATE=intermediate, BLOCK_M=block_m, BLOCK_I=block_i, num_warps=warps,
        )  # fmt: skip
    return d_gate_up


@torch.library.custom_op("hamner::swiglu", mutates_args=())
def _swiglu_op(gate_up: Tensor) -> Tensor:
    return launch_swiglu(gate_up)


@_swiglu_op.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("hamner::swiglu_backward", mutates_args=())
def _swiglu_backward_op(d_h: Tensor, gate_up: Tensor) -> Tensor:
    return launch_swiglu_backward(d_h, gate_up)


@_swiglu_backward_op.register_fake
def _(d_h, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _swiglu_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, d_h):
    return _swiglu_backward_op(d_h, *ctx.saved_tensors)


_swiglu_op.register_autograd(_swiglu_backward, setup_context=_swiglu_setup_context)


def check_gate_up(gate_up: Tensor) -> None:
    """The function checks the packed gate and up projection.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_dtype("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 != 0 or gate_up.shape[-1] == 0:
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)}; its last axis must hold gate and up, "
            "so be even and not empty"
        )


def swiglu(gate_up: Tensor) -> Tensor:
    """The op computes silu(gate) * up, of gate and up packed in the last axis, gate first.

    Args:
        gate_up: (..., 2I) float32, float16 or bfloat16.

    Returns:
        (..., I) in the dtype of gate_up, computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_gate_up(gate_up)
    return _swiglu_op(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """This is `swiglu` in plain torch; float64 for float64 input, else float32 inside."""
    compute = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
    gate, up = gate_up.to(compute).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
