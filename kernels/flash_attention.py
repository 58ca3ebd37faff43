"""FlashAttention with grouped-query attention, forward and backward, for training.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): fused are both matmuls, the scale, the mask and the
softmax. Scores live in registers, one tile at a time; forward keeps the log-sum-exp of each row
(4 bytes), from which backward builds the scores again. The kernels are in
flash_attention_kernels.py; here are their launches, the registered ops and the reference.
norm_attention.py has them rotate dq and dk back by RoPE's angles right before they are stored.

    forward     out, lse                        2 matmuls
    dq          delta = sum(out * d_out), dq    3 matmuls, two of them for p and d_p
    dk, dv      dk, dv                          4 matmuls, two of them for p and d_p

dk and dv sum over the query heads of a group inside one program, and dq has a pass of its own: two
matmuls more than an accumulation of dq with atomics would need, but two runs give the same bits,
and no fp32 copy of dq is kept.

A matmul is 2 B H T^2 hd FLOPs, half of that under a causal mask. For option A (B 24, T 1024, H 16,
KV 4, hd 64, causal) it is 26 GFLOP, so forward does 52 and backward 180. Bytes that must move, e
bytes an element:

    forward     q, k, v, out                            B T (2 H + 2 KV) hd e
    backward    q, k, v, out, d_out, dq, dk, dv         B T (4 H + 4 KV) hd e

which is 126 MB and 252 MB: 0.15 and 0.30 ms at 850 GB/s. The floor is the arithmetic: at the 71.2
TFLOP/s of an RTX 3090, 0.72 ms forward and 2.5 ms backward. Documents shorten both, since tiles
without a pair of the same document are skipped.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hamner.kernels.flash_attention_kernels import (
    flash_attention_dk_dv_kernel,
    flash_attention_dq_kernel,
    flash_attention_forward_kernel,
)
from hamner.kernels.launch import capability
from hamner.kernels.rope import launch_packed_rotation

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 128
LOG2_E = math.log2(math.e)
INTERPRETED = not isinstance(flash_attention_forward_kernel, triton.JITFunction)


class Tile(NamedTuple):
    """Queries and keys a program holds at once, with its warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """a thread may use, so that more programs are resident; None leaves it to the compiler"""


class Config(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dk_dv: Tile


# By capability, then by (head size, value head size) rounded up to 64 or 128. `python -m
# bench.tune_flash_attention` measures on the GPU at hand and prints a row. 8.6 is chosen by
# reasoning and by what ptxas says of registers, not measured.
#
# sm_86 does 256 fused multiply-adds a clock and multiprocessor in bf16, so the matmuls are what
# costs, and a short tile in the inner loop (block_n; block_m in dk_dv) is cheap. What matters is to
# have eight warps resident, in two blocks of four or one of eight, that fill the tensor cores in
# each other's softmax: of 255 registers a thread, they take all 65,536. With four warps, 128 x 64
# tiles spill in forward at head size 64. Share of 101,376 bytes of shared memory, registers a
# thread (the most that Triton 3.6 or 3.9 takes, documents and RoPE or not), blocks resident:
#
#                 forward                  dq                       dk_dv
#     64, 64      32%  222  2 of 4 warps   48%  242  2 of 4 warps   33%  193  2 of 4 warps
#     64, 128     65%  246  1 of 8         48%  168  2 of 4         61%  250  1 of 8
#     128, 128    97%  253  1 of 8         81%  189  1 of 8         81%  228  1 of 8
_SM86 = {
    (64, 64): Config(
        forward=Tile(128, 32, 4, 3),
        dq=Tile(64, 64, 4, 3),
        dk_dv=Tile(32, 64, 4, 3),
    ),
    (64, 128): Config(
        forward=Tile(128, 64, 8, 3),
        dq=Tile(64, 32, 4, 3),
        dk_dv=Tile(32, 128, 8, 2),
    ),
    (128, 128): Config(
        forward=Tile(128, 64, 8, 3),
        dq=Tile(128, 32, 8, 2),
        dk_dv=Tile(16, 128, 8, 3),
    ),
}
# The fastest on an H100 (profiles/LOG.md) of those that do not spill. 64 rows to four warps is the
# shape of Hopper's warpgroup matmul; several such blocks on a multiprocessor beat one large tile,
# and a fourth one in forward is worth holding its registers down.
# Not measured: dk_dv at 128, 128, which had four stages until it spilled with RoPE on Triton 3.6.
_SM90 = {
    (64, 64): Config(
        forward=Tile(64, 64, 4, 3, max_registers=128),
        dq=Tile(64, 64, 4, 3),
        dk_dv=Tile(64, 64, 4, 3),
    ),
    (64, 128): Config(
        forward=Tile(128, 64, 8, 3),
        dq=Tile(64, 64, 4, 2),
        dk_dv=Tile(64, 128, 8, 2),
    ),
    (128, 128): Config(
        forward=Tile(64, 64, 4, 3),
        dq=Tile(64, 64, 4, 2),
        dk_dv=Tile(32, 64, 4, 3),
    ),
}
CONFIGS = {"8.6": _SM86, "8.0": _SM86, "9.0": _SM90}

# float32 is for debugging: exact products, without tensor cores.
FLOAT32_CONFIG = Config(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))


def select_config(
    device: torch.device, dtype: torch.dtype, head_size: int, v_head_size: int
) -> Config:
    """The launch configuration for these head sizes."""
    if dtype == torch.float32:
        return FLOAT32_CONFIG
    size = 64 if head_size <= 64 else 128
    v_size = 64 if size == 64 and v_head_size <= 64 else 128
    return CONFIGS[capability(device)][size, v_size]


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token's document begins and ends, without waiting for the GPU.

    Args:
        document_ids: (B, T) int32, non-decreasing along T.

    Returns:
        (starts, ends), both (B, T) int32: the token's document is [starts, ends) of its row.
    """
    document_ids = document_ids.contiguous()
    starts = torch.searchsorted(document_ids, document_ids, out_int32=True)
    ends = torch.searchsorted(document_ids, document_ids, right=True, out_int32=True)
    return starts, ends


def _padded(head_size: int) -> int:
    """Width of a tile that holds heads of this size."""
    return max(16, triton.next_power_of_2(head_size))


def _constexprs(
    q: Tensor, k: Tensor, v: Tensor, document_starts: Tensor | None, causal: bool, tile: Tile
) -> dict[str, object]:
    """What all three kernels are specialised on, and their launch options."""
    seq_len, num_heads, head_size = q.shape[1:]
    v_head_size = v.shape[-1]
    return {
        "GROUP": num_heads // k.shape[2],
        "CAUSAL": causal,
        "HAS_DOCUMENTS": document_starts is not None,
        "EVEN_T": seq_len % tile.block_m == 0 and seq_len % tile.block_n == 0,
        "HEAD_SIZE": head_size,
        "V_HEAD_SIZE": v_head_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": _padded(head_size),
        "BLOCK_DV": _padded(v_head_size),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q, k, v: (B, T, H, hd), (B, T, KV, hd), (B, T, KV, hd_v), any strides but the last.
        document_starts, document_ends: of `document_bounds`, or None.
        causal: whether a query sees only keys up to its own position.
        scale: of the scores.

    Returns:
        out (B, T, H, hd_v), and lse (B, H, T) fp32: the log-sum-exp of each row of scores, base 2.
    """
    batch_size, seq_len, num_heads, head_size = q.shape
    out = q.new_empty(batch_size, seq_len, num_heads, v.shape[-1])
    lse = q.new_empty(batch_size, num_heads, seq_len, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tile = select_config(q.device, q.dtype, head_size, v.shape[-1]).forward
    grid = (triton.cdiv(seq_len, tile.block_m) * num_heads * batch_size,)
    with torch.cuda.device_of(q):
        flash_attention_forward_kernel[grid](
            q, k, v, out, lse, document_starts, document_ends,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            seq_len, num_heads, scale * LOG2_E,
            **_constexprs(q, k, v, document_starts, causal, tile),
        )  # fmt: skip
    return out, lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Differentiate, into dq, dk and dv: shaped as q, k and v, any strides but the last.

    The other arguments are those of `launch_forward`, with its results and the gradient of out.
    With cos, sin and positions, by which q and k were rotated (rope.py), dq and dk are rotated back
    before they are stored; q's head size must be one that is not padded.
    """
    if out.numel() == 0:
        return
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    batch_size, seq_len, num_heads, head_size = q.shape
    num_kv_heads = k.shape[2]
    config = select_config(q.device, q.dtype, head_size, v.shape[-1])
    delta = torch.empty_like(lse)
    cos, sin, positions = (x if x is None else x.contiguous() for x in (cos, sin, positions))
    num_positions = 0 if cos is None else cos.shape[0]
    with torch.cuda.device_of(q):
        grid = (triton.cdiv(seq_len, config.dq.block_m) * num_heads * batch_size,)
        flash_attention_dq_kernel[grid](
            q, k, v, out, d_out, lse, delta, dq, document_starts, document_ends,
            cos, sin, positions,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *d_out.stride()[:3], *dq.stride()[:3],
            seq_len, num_heads, num_positions, scale, scale * LOG2_E,
            **_constexprs(q, k, v, document_starts, causal, config.dq),
        )  # fmt: skip
        grid = (triton.cdiv(seq_len, config.dk_dv.block_n) * num_kv_heads * batch_size,)
        flash_attention_dk_dv_kernel[grid](
            q, k, v, d_out, lse, delta, dk, dv, document_starts, document_ends,
            cos, sin, positions,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *d_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            seq_len, num_kv_heads, num_positions, scale, scale * LOG2_E,
            **_constexprs(q, k, v, document_starts, causal, config.dk_dv),
        )  # fmt: skip


@torch.library.custom_op("hamner::flash_attention", mutates_args=())
def _flash_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, document_starts, document_ends, causal, scale)


@_flash_attention_op.register_fake
def _(q, k, v, document_starts, document_ends, causal, scale):
    batch_size, seq_len, num_heads, _ = q.shape
    out = q.new_empty(batch_size, seq_len, num_heads, v.shape[-1])
    return out, q.new_empty(batch_size, num_heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("hamner::flash_attention_backward", mutates_args=())
def _flash_attention_backward_op(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    launch_backward(
        d_out, q, k, v, out, lse, document_starts, document_ends, causal, scale, dq, dk, dv
    )
    return dq, dk, dv


@_flash_attention_backward_op.register_fake
def _(d_out, q, k, v, out, lse, document_starts, document_ends, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, document_starts, document_ends, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, document_starts, document_ends)


def _backward(ctx, d_out, _d_lse):
    d_qkv = _flash_attention_backward_op(d_out, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *d_qkv, None, None, None, None


_flash_attention_op.register_autograd(_backward, setup_context=_setup_context)


def split_qkv(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of packed (..., (H + 2 KV) hd) as q (..., H, hd), k and v (..., KV, hd)."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    return heads.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)


@torch.library.custom_op("hamner::flash_attention_qkv", mutates_args=())
def _flash_attention_qkv_op(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    out, lse = launch_forward(q, k, v, document_starts, document_ends, causal, scale)
    return out.flatten(-2), lse


@_flash_attention_qkv_op.register_fake
def _(qkv, num_heads, num_kv_heads, document_starts, document_ends, causal, scale):
    batch_size, seq_len, width = qkv.shape
    head_size = width // (num_heads + 2 * num_kv_heads)
    out = qkv.new_empty(batch_size, seq_len, num_heads * head_size)
    return out, qkv.new_empty(batch_size, num_heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("hamner::flash_attention_qkv_backward", mutates_args=())
def _flash_attention_qkv_backward_op(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    causal: bool,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    d_qkv = qkv.new_empty(qkv.shape)
    head_size = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    # The halves of a padded head are not those of its tile: it is rotated back in a second pass.
    is_padded = head_size != _padded(head_size)
    launch_backward(
        d_out.unflatten(-1, (num_heads, -1)),
        *split_qkv(qkv, num_heads, num_kv_heads),
        out.unflatten(-1, (num_heads, -1)),
        lse, document_starts, document_ends, causal, scale,
        *split_qkv(d_qkv, num_heads, num_kv_heads),
        *((None, None, None) if is_padded else (cos, sin, positions)),
    )  # fmt: skip
    if is_padded and cos is not None:
        launch_packed_rotation(
            d_qkv, cos, sin, num_heads, num_kv_heads, positions, inverse=True, in_place=True
        )
    return d_qkv


@_flash_attention_qkv_backward_op.register_fake
def _(
    d_out, qkv, out, lse, starts, ends, num_heads, num_kv_heads, causal, scale, cos, sin, positions
):
    return qkv.new_empty(qkv.shape)


def _qkv_setup_context(ctx, inputs, output):
    qkv, num_heads, num_kv_heads, document_starts, document_ends, causal, scale = inputs
    out, lse = output
    ctx.arguments = num_heads, num_kv_heads, causal, scale
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, document_starts, document_ends)


def _qkv_backward(ctx, d_out, _d_lse):
    d_qkv = _flash_attention_qkv_backward_op(
        d_out, *ctx.saved_tensors, *ctx.arguments, None, None, None
    )
    return d_qkv, None, None, None, None, None, None


_flash_attention_qkv_op.register_autograd(_qkv_backward, setup_context=_qkv_setup_context)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}; it must be float32, float16 or bfloat16")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its last must be 1")
    check_device(name, tensor)


def check_device(name: str, tensor: Tensor) -> None:
    """Check that the kernels can run where `tensor` is.

    Raises:
        TypeError, ValueError: they cannot.
    """
    if tensor.is_cuda:
        return
    if not INTERPRETED:
        raise ValueError(
            f"{name} is on {tensor.device}; the kernel needs a CUDA device "
            "(or Triton's interpreter, TRITON_INTERPRET=1)"
        )
    if tensor.dtype == torch.bfloat16:
        raise TypeError(f"{name} is bfloat16, which Triton's interpreter computes wrongly")


def _check_head_size(name: str, head_size: int) -> None:
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"{name} has head size {head_size}; it must be 1 to {MAX_HEAD_SIZE}")


def _check_num_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads {num_heads} must be a positive multiple of num_kv_heads {num_kv_heads}"
        )


def check_packed_width(width: int, num_heads: int, num_kv_heads: int) -> int:
    """The head size of packed rows (H + 2 KV) hd, checked.

    Raises:
        ValueError: no such heads, or of a size that the kernels do not take.
    """
    _check_num_heads(num_heads, num_kv_heads)
    head_size, rest = divmod(width, num_heads + 2 * num_kv_heads)
    if rest:
        raise ValueError(
            f"qkv has width {width}; it must be a multiple of num_heads + 2 num_kv_heads "
            f"= {num_heads + 2 * num_kv_heads}"
        )
    _check_head_size("qkv", head_size)
    return head_size


def _scale(scale: float | None, head_size: int) -> float:
    if scale is None:
        return head_size**-0.5
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    return float(scale)


def optional_document_bounds(
    document_ids: Tensor | None, tokens: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`document_bounds` of ids that are checked against `tokens` (B, T, ...), if there are any.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    if document_ids is None:
        return None, None
    if document_ids.dtype != torch.int32:
        raise TypeError(f"document_ids is {document_ids.dtype}; it must be int32")
    if document_ids.shape != tokens.shape[:2]:
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)}; "
            f"it must be (B, T) = {tuple(tokens.shape[:2])}"
        )
    if document_ids.device != tokens.device:
        raise ValueError(f"document_ids is on {document_ids.device}, not on {tokens.device}")
    return document_bounds(document_ids)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask) v, with grouped-query heads.

    Args:
        q: (B, T, H, hd) float32, float16 or bfloat16, hd up to 128 (64 and 128 waste nothing).
            Strides are free but the last, which is 1: q, k and v may be views of one tensor.
        k: (B, T, KV, hd): as many keys as queries, KV a divisor of H. Query head h sees
            key/value head h // (H / KV).
        v: (B, T, KV, hd_v), hd_v up to 128.
        causal: whether a query sees only keys up to its own position.
        document_ids: (B, T) int32, non-decreasing along T: a query sees only keys of its own
            document.
        scale: of the scores, positive; 1 / sqrt(hd) when None.

    Returns:
        (B, T, H, hd_v) in the dtype of q. The softmax is computed in float32, the weights are
        rounded to the dtype of v before they meet it.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; it must be (B, T, heads, head size)"
            )
        _check_tensor(name, tensor)
        _check_head_size(name, tensor.shape[-1])
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, q is {q.dtype}; they must agree")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
        if tensor.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} has (B, T) {tuple(tensor.shape[:2])}, q {tuple(q.shape[:2])}; "
                "they must agree"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head size {k.shape[-1]}, q {q.shape[-1]}; they must agree")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads, k {k.shape[2]}; they must agree")
    _check_num_heads(q.shape[2], k.shape[2])
    bounds = optional_document_bounds(document_ids, q)
    return _flash_attention_op(q, k, v, *bounds, causal, _scale(scale, q.shape[-1]))[0]


def flash_attention_qkv(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` on packed heads; backward writes one packed gradient, without a copy.

    Args:
        qkv: (B, T, (H + 2 KV) hd): the heads of q, then of k, then of v. The last stride is 1.
        num_heads: H.
        num_kv_heads: KV.
        causal, document_ids, scale: as in `flash_attention`.

    Returns:
        (B, T, H hd) in the dtype of qkv.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    if qkv.dim() != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be (B, T, (H + 2 KV) hd)")
    head_size = check_packed_width(qkv.shape[-1], num_heads, num_kv_heads)
    _check_tensor("qkv", qkv)
    bounds = optional_document_bounds(document_ids, qkv)
    return _flash_attention_qkv_op(
        qkv, num_heads, num_kv_heads, *bounds, causal, _scale(scale, head_size)
    )[0]


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` in plain torch, all scores in memory; softmax in float64 for float64."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * _scale(scale, q.shape[-1])
    positions = torch.arange(q.shape[1], device=q.device)
    visible = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        visible = positions[None, :] <= positions[:, None]
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    p = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v)
