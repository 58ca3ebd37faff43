"""Every head of q and of k gets an RMSNorm and is then rotated: qk-norm in Qwen3's order.

    x_hat = x / sqrt(mean(x^2) + eps)              each head by itself
    out = rope(x_hat * weight)                     one weight (hd,) for all heads of q, one for k's

(Henry et al. 2020, arXiv:2010.04245; Qwen3, arXiv:2505.09388.) A head is in registers for the
rotation anyway, so its statistics cost no further pass over memory, forward or backward. Nothing is
kept but what was normed: backward computes the statistics again where it reads a head, and rotates
the gradient back right there, so that attention need not.

Bytes that must move, e = bytes an element, x = N (H + KV) hd elements of q and k:

    forward     reads q and k, writes them                            2 x e
    backward    reads q, k and the gradients, writes the gradients    3 x e

As in rope.py cos and sin come from cache. The floor is bytes / bandwidth. For bf16, N 24,576, 16 +
4 heads of 64 that is 126 and 189 MB: 0.042 and 0.063 ms at 3.0 TB/s, 0.15 and 0.22 ms at 850 GB/s.
Where the result is packed with v, v is copied along, 2 N KV hd e more.

A weight's gradient sums over all rows and heads: each of a fixed number of programs sums its own
rows in registers, a second pass (launch.py) adds those in a fixed order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import check_dtype, check_same_device, check_shape
from hamner.kernels.launch import capability, define_in_place, sum_partials
from hamner.kernels.rms_norm import rms_norm_reference
from hamner.kernels.rope import check_packed_arguments, rope_packed_reference, row_positions


class Config(NamedTuple):
    """A config says how many pairs of elements a program holds at once and its warps.

    A pair is what RoPE rotates together: an element of either half of a head. Backward's programs
    go on from row to row, `backward_programs_per_sm` of them on a multiprocessor.
    """

    forward_tile: int
    forward_warps: int
    backward_tile: int
    backward_warps: int
    backward_programs_per_sm: int


# Within 5% of what an H200 runs fastest, of its own code and of sm_86's (`python -m bench.tune
# qk_norm`, profiles/LOG.md), and of what spills at no head size: heads whose reductions cross no
# warps.
CONFIGS = {
    "8.6": Config(256, 2, 256, 1, 16),
    "8.0": Config(256, 2, 256, 1, 16),
    "9.0": Config(256, 2, 256, 1, 16),
}


def tile_shape(tile: int, num_heads: int, head_dim: int) -> tuple[int, int, int]:
    """The function gives rows, heads and pairs of a head of a program's tile."""
    block_half = triton.next_power_of_2(head_dim // 2)
    block_h = min(triton.next_power_of_2(num_heads), max(1, tile // block_half))
    return max(1, tile // (block_h * block_half)), block_h, block_half


@triton.jit
def _weight_halves(q_weight_ptr, k_weight_ptr, is_q, offs_i, mask_i, HALF: tl.constexpr):
    """The result is the two halves of each head's weight, (1, BLOCK_H, BLOCK_HALF) fp32."""
    q_first = tl.load(q_weight_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    q_second = tl.load(q_weight_ptr + HALF + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    k_first = tl.load(k_weight_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    k_second = tl.load(k_weight_ptr + HALF + offs_i, mask=mask_i, other=0.0).to(tl.float32)
    is_q = is_q[None, :, None]
    first = tl.where(is_q, q_first[None, None, :], k_first[None, None, :])
    second = tl.where(is_q, q_second[None, None, :], k_second[None, None, :])
    return first, second


@triton.jit
def _load_tables(cos_ptr, sin_ptr, position, mask_m, offs_i, HALF: tl.constexpr):
    """The result is cos and sin of each row, (BLOCK_M, 1, BLOCK_HALF) fp32."""
    offs = position[:, None] * HALF + offs_i[None, :]
    mask = mask_m[:, None] & (offs_i < HALF)[None, :]
    cos = tl.load(cos_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def qk_norm_rope_kernel(
    qkv_ptr,  # (N, row) input dtype: heads of HEAD_DIM one after the other
    out_ptr,  # (N, NUM_HEADS * HEAD_DIM) input dtype
    q_weight_ptr,  # (HEAD_DIM,) fp32 or input dtype
    k_weight_ptr,  # (HEAD_DIM,) fp32 or input dtype
    cos_ptr,  # (num_positions, HEAD_DIM / 2)
    sin_ptr,  # (num_positions, HEAD_DIM / 2)
    positions_ptr,  # (N,) int32, or None: row modulo seq_len
    N,
    seq_len,
    num_positions,
    row_size,
    eps,
    NUM_Q: tl.constexpr,  # query heads, the first ones of a row
    NUM_NORMED: tl.constexpr,  # query and key heads
    NUM_HEADS: tl.constexpr,  # heads to write; those beyond NUM_NORMED are copied
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.arange(0, BLOCK_HALF)
    mask_m = offs_m < N
    mask_i = offs_i < HALF
    position = row_positions(positions_ptr, offs_m, mask_m, seq_len, num_positions)

    for first_head in tl.static_range(0, NUM_HEADS, BLOCK_H):
        offs_h = first_head + tl.arange(0, BLOCK_H)
        offs = offs_h[None, :, None] * HEAD_DIM + offs_i[None, None, :]
        mask = mask_m[:, None, None] & (offs_h < NUM_HEADS)[None, :, None] & mask_i[None, None, :]
        x_offs = offs_m[:, None, None] * row_size + offs
        first = tl.load(qkv_ptr + x_offs, mask=mask, other=0.0)
        second = tl.load(qkv_ptr + x_offs + HALF, mask=mask, other=0.0)
        weight_first, weight_second = _weight_halves(
            q_weight_ptr, k_weight_ptr, offs_h < NUM_Q, offs_i, mask_i, HALF
        )
        cos, sin = _load_tables(cos_ptr, sin_ptr, position, mask_m, offs_i, HALF)
        x1, x2 = first.to(tl.float32), second.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=2) / HEAD_DIM + eps)[:, :, None]
        y1, y2 = x1 * rstd * weight_first, x2 * rstd * weight_second
        new_first = (y1 * cos - y2 * sin).to(first.dtype)
        new_second = (y2 * cos + y1 * sin).to(first.dtype)
        if NUM_NORMED < NUM_HEADS:
            is_normed = (offs_h < NUM_NORMED)[None, :, None]
            new_first = tl.where(is_normed, new_first, first)
            new_second = tl.where(is_normed, new_second, second)
        out_offs = offs_m[:, None, None] * (NUM_HEADS * HEAD_DIM) + offs
        tl.store(out_ptr + out_offs, new_first, mask=mask)
        tl.store(out_ptr + out_offs + HALF, new_second, mask=mask)


@triton.jit
def qk_norm_rope_backward_kernel(
    d_out_ptr,  # (N, row) input dtype
    qkv_ptr,  # (N, row) input dtype: what was normed
    d_qkv_ptr,  # (N, row) input dtype; may be d_out_ptr
    q_weight_ptr,  # (HEAD_DIM,) fp32 or input dtype
    k_weight_ptr,  # (HEAD_DIM,) fp32 or input dtype
    d_weights_ptr,  # (row programs, head programs, 2, HEAD_DIM) fp32 partial sums: q's, k's
    cos_ptr,  # (num_positions, HEAD_DIM / 2)
    sin_ptr,  # (num_positions, HEAD_DIM / 2)
    positions_ptr,  # (N,) int32, or None: row modulo seq_len
    N,
    seq_len,
    num_positions,
    row_size,
    rows_per_program,  # a multiple of BLOCK_M
    eps,
    NUM_Q: tl.constexpr,
    NUM_NORMED: tl.constexpr,
    NUM_HEADS: tl.constexpr,  # heads to write; gradients of those beyond NUM_NORMED are copied
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    row_program = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_i = tl.arange(0, BLOCK_HALF)
    mask_i = offs_i < HALF
    mask_head = (offs_h < NUM_HEADS)[None, :, None] & mask_i[None, None, :]
    is_q = offs_h < NUM_Q
    is_normed = offs_h < NUM_NORMED
    weight_first, weight_second = _weight_halves(
        q_weight_ptr, k_weight_ptr, is_q, offs_i, mask_i, HALF
    )
    d_weight_first = tl.zeros((BLOCK_M, BLOCK_H, BLOCK_HALF), tl.float32)
    d_weight_second = tl.zeros((BLOCK_M, BLOCK_H, BLOCK_HALF), tl.float32)

    for step in range(rows_per_program // BLOCK_M):
        offs_m = row_program * rows_per_program + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        mask = mask_m[:, None, None] & mask_head
        offs = (
            offs_m[:, None, None] * row_size
            + offs_h[None, :, None] * HEAD_DIM
            + offs_i[None, None, :]
        )
        x1 = tl.load(qkv_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(qkv_ptr + offs + HALF, mask=mask, other=0.0).to(tl.float32)
        d_first = tl.load(d_out_ptr + offs, mask=mask, other=0.0)
        d_second = tl.load(d_out_ptr + offs + HALF, mask=mask, other=0.0)
        position = row_positions(positions_ptr, offs_m, mask_m, seq_len, num_positions)
        cos, sin = _load_tables(cos_ptr, sin_ptr, position, mask_m, offs_i, HALF)

        rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=2) / HEAD_DIM + eps)
        # Rows beyond the last count nothing, even with an eps of 0.
        rstd = tl.where(mask_m[:, None], rstd, 0.0)[:, :, None]
        x1, x2 = x1 * rstd, x2 * rstd
        d1, d2 = d_first.to(tl.float32), d_second.to(tl.float32)
        d_y1 = d1 * cos + d2 * sin
        d_y2 = d2 * cos - d1 * sin
        d_weight_first += d_y1 * x1
        d_weight_second += d_y2 * x2
        d_y1, d_y2 = d_y1 * weight_first, d_y2 * weight_second
        correlation = (tl.sum(d_y1 * x1 + d_y2 * x2, axis=2) / HEAD_DIM)[:, :, None]
        new_first = ((d_y1 - x1 * correlation) * rstd).to(d_first.dtype)
        new_second = ((d_y2 - x2 * correlation) * rstd).to(d_first.dtype)
        if NUM_NORMED < NUM_HEADS:
            new_first = tl.where(is_normed[None, :, None], new_first, d_first)
            new_second = tl.where(is_normed[None, :, None], new_second, d_second)
        tl.store(d_qkv_ptr + offs, new_first, mask=mask)
        tl.store(d_qkv_ptr + offs + HALF, new_second, mask=mask)

    d_weight_first = tl.sum(d_weight_first, axis=0)
    d_weight_second = tl.sum(d_weight_second, axis=0)
    program = row_program * tl.num_programs(1) + tl.program_id(1)
    sums_ptr = d_weights_ptr + program * (2 * HEAD_DIM) + offs_i
    is_k = (is_normed & ~is_q)[:, None]
    is_q = is_q[:, None]
    tl.store(sums_ptr, tl.sum(tl.where(is_q, d_weight_first, 0.0), axis=0), mask=mask_i)
    tl.store(sums_ptr + HALF, tl.sum(tl.where(is_q, d_weight_second, 0.0), axis=0), mask=mask_i)
    sums_ptr += HEAD_DIM
    tl.store(sums_ptr, tl.sum(tl.where(is_k, d_weight_first, 0.0), axis=0), mask=mask_i)
    tl.store(sums_ptr + HALF, tl.sum(tl.where(is_k, d_weight_second, 0.0), axis=0), mask=mask_i)


def _heads_written(num_heads: int, num_kv_heads: int, with_v: bool) -> int:
    return num_heads + (2 if with_v else 1) * num_kv_heads


def _result_shape(qkv: Tensor, num_heads: int, num_kv_heads: int, with_v: bool) -> tuple[int, ...]:
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    return *qkv.shape[:-1], _heads_written(num_heads, num_kv_heads, with_v) * head_dim


def _options(
    qkv: Tensor, tile: int, num_heads: int, num_kv_heads: int, with_v: bool
) -> dict[str, int]:
    """The result is what both kernels are specialised on."""
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    written = _heads_written(num_heads, num_kv_heads, with_v)
    block_m, block_h, block_half = tile_shape(tile, written, head_dim)
    return {
        "NUM_Q": num_heads,
        "NUM_NORMED": num_heads + num_kv_heads,
        "NUM_HEADS": written,
        "HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_H": block_h,
        "BLOCK_HALF": block_half,
    }


@torch.library.custom_op("hamner::qk_norm_rope", mutates_args=())
def _qk_norm_rope_op(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    with_v: bool,
) -> Tensor:
    """The result is (B, T, (H + 2 KV) hd), or without v, and then without a gradient,
    (B, T, (H + KV) hd)."""
    out = qkv.new_empty(_result_shape(qkv, num_heads, num_kv_heads, with_v))
    if out.numel() == 0:
        return out
    batch_size, seq_len, row_size = qkv.shape
    config = CONFIGS[capability(qkv.device)]
    options = _options(qkv, config.forward_tile, num_heads, num_kv_heads, with_v=with_v)
    with torch.cuda.device_of(qkv):
        qk_norm_rope_kernel[(triton.cdiv(batch_size * seq_len, options["BLOCK_M"]),)](
            qkv.contiguous(), out, q_weight.contiguous(), k_weight.contiguous(),
            cos.contiguous(), sin.contiguous(),
            None if positions is None else positions.contiguous(),
            batch_size * seq_len, seq_len, cos.shape[0], row_size, eps,
            **options, num_warps=config.forward_warps,
        )  # fmt: skip
    return out


@_qk_norm_rope_op.register_fake
def _(qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, eps, with_v):
    return qkv.new_empty(_result_shape(qkv, num_heads, num_kv_heads, with_v))


def _launch_backward(d_out: Tensor, d_qkv: Tensor, qkv: Tensor, **settings) -> Tensor:
    """The launcher writes d_qkv and gives the gradients of both weights, (2, hd).

    Args:
        d_out: (B, T, (H + 2 KV) hd) contiguous, gradient of the result.
        d_qkv: as d_out; d_out itself, where v's gradient stays, to overwrite it.
        qkv: what was normed.
        settings: the other arguments of `qk_norm_rope`, by name.
    """
    q_weight, k_weight = settings["q_weight"], settings["k_weight"]
    cos, sin, positions = settings["cos"], settings["sin"], settings["positions"]
    batch_size, seq_len, row_size = qkv.shape
    num_rows = batch_size * seq_len
    if num_rows == 0:
        return q_weight.new_zeros(2, len(q_weight))
    config = CONFIGS[capability(qkv.device)]
    heads = {name: settings[name] for name in ("num_heads", "num_kv_heads")}
    options = _options(qkv, config.backward_tile, **heads, with_v=d_qkv is not d_out)
    block_m = options["BLOCK_M"]
    head_programs = triton.cdiv(options["NUM_HEADS"], options["BLOCK_H"])
    multiprocessors = (
        torch.cuda.get_device_properties(qkv.device).multi_processor_count if qkv.is_cuda else 1
    )
    max_programs = max(1, multiprocessors * config.backward_programs_per_sm // head_programs)
    rows_per_program = triton.cdiv(triton.cdiv(num_rows, max_programs), block_m) * block_m
    row_programs = triton.cdiv(num_rows, rows_per_program)
    programs = row_programs * head_programs
    partial_sums = qkv.new_empty(programs, 2, len(q_weight), dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        qk_norm_rope_backward_kernel[(row_programs, head_programs)](
            d_out, qkv.contiguous(), d_qkv, q_weight.contiguous(), k_weight.contiguous(),
            partial_sums, cos.contiguous(), sin.contiguous(),
            None if positions is None else positions.contiguous(),
            num_rows, seq_len, cos.shape[0], row_size, rows_per_program, settings["eps"],
            **options, num_warps=config.backward_warps,
        )  # fmt: skip
    return sum_partials(partial_sums, q_weight.new_empty(2, len(q_weight)))


@torch.library.custom_op("hamner::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward_op(
    d_out: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    # Not in place: the gradient may have other readers.
    d_qkv = qkv.new_empty(qkv.shape)
    d_weights = _launch_backward(
        d_out.contiguous(), d_qkv, qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin,
        positions=positions, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps,
    )  # fmt: skip
    return d_qkv, d_weights


@_qk_norm_rope_backward_op.register_fake
def _(d_out, qkv, q_weight, *_rest):
    return qkv.new_empty(qkv.shape), q_weight.new_empty(2, len(q_weight))


def _qk_norm_rope_backward_(
    d_qkv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> Tensor:
    """The gradient of the result, contiguous, becomes that of qkv; v's stays."""
    return _launch_backward(
        d_qkv, d_qkv, qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin,
        positions=positions, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps,
    )  # fmt: skip


define_in_place(
    "hamner::qk_norm_rope_backward_",
    _qk_norm_rope_backward_,
    mutates=("d_qkv",),
    fake=lambda d_qkv, qkv, q_weight, *_rest: q_weight.new_empty(2, len(q_weight)),
)


def _setup_context(ctx, inputs, output):
    *tensors, num_heads, num_kv_heads, eps, _ = inputs
    ctx.settings = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": eps}
    ctx.save_for_backward(*tensors)


def _backward(ctx, d_out):
    d_qkv, d_weights = _qk_norm_rope_backward_op(d_out, *ctx.saved_tensors, **ctx.settings)
    return d_qkv, *d_weights.unbind(), *(None,) * 7


_qk_norm_rope_op.register_autograd(_backward, setup_context=_setup_context)


def check_qk_norm(q_weight: Tensor, k_weight: Tensor, head_dim: int, x: Tensor) -> None:
    """The function checks both norms' weights, for heads on the device and in the dtype of `x`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_dtype(name, weight, (x.dtype, torch.float32))
        check_shape(name, weight.shape, (head_dim,))
        check_same_device(name, weight, "qkv", x)
    if k_weight.dtype != q_weight.dtype:
        raise TypeError(f"k_weight is {k_weight.dtype}, q_weight {q_weight.dtype}")


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The op norms and rotates every head of q and k in packed qkv, and copies v.

    Args:
        qkv: (B, T, (H + 2 KV) hd) float32, float16 or bfloat16, hd even: query heads, key heads,
            value heads.
        q_weight: (hd,) of all query heads' norms, float32 or the dtype of qkv.
        k_weight: (hd,) of all key heads' norms, dtype of q_weight.
        cos, sin, num_heads, num_kv_heads, positions: as in `rope_packed_`; tables get no gradient.
        eps: added to the mean of squares.

    Returns:
        (B, T, (H + 2 KV) hd) in the dtype of qkv, a new tensor, computed in float32 and rounded
        once.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_dtype("qkv", qkv)
    check_packed_arguments(
        qkv.shape, cos, sin,
        num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions, x=qkv,
    )  # fmt: skip
    check_qk_norm(q_weight, k_weight, qkv.shape[-1] // (num_heads + 2 * num_kv_heads), qkv)
    return _qk_norm_rope_op(
        qkv, q_weight, k_weight, cos, sin=sin, positions=positions,
        num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps, with_v=True,
    )  # fmt: skip


def qk_norm_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float = 1e-5,
    *,
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm_reference,
) -> Tensor:
    """The norms of `qk_norm_rope`, before its rotation, are these in plain torch.

    Args:
        norm: (x (..., hd), weight (hd,), eps) -> as x.
    """
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)
    return torch.cat((norm(q, q_weight, eps), norm(k, k_weight, eps), v), dim=-2).flatten(-2)


def qk_norm_rope_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """This is `qk_norm_rope` in plain torch; float64 for float64, else rounded after the norm."""
    normed = qk_norm_reference(
        qkv, q_weight, k_weight, num_heads, num_kv_heads=num_kv_heads, eps=eps
    )
    return rope_packed_reference(
        normed, cos, sin, num_heads, num_kv_heads=num_kv_heads, positions=positions
    )
