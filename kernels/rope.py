"""This is rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves as in Llama.

    first, second = x[..., :hd/2], x[..., hd/2:]
    x[..., :hd/2] = first * cos[position] - second * sin[position]
    x[..., hd/2:] = second * cos[position] + first * sin[position]

The same kernel rotates q and k one by one (`rope`) and both inside a packed qkv, whose rows hold
H query heads, then KV key heads, then KV value heads (`rope_packed_`). In place, only q and k are
touched; v costs nothing. The inverse, which is also the gradient, is the rotation by -sin.

Bytes that must move, e = bytes an element: reads and writes q and k, 2 N (H + KV) hd e; cos and
sin stay in cache. The floor is bytes / bandwidth. For bf16, N 24,576, 16 + 4 heads of 64 that is
126 MB: 0.042 ms at 3.0 TB/s, 0.15 ms at 850 GB/s.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import (
    check_contiguous,
    check_dtype,
    check_like,
    check_positive,
    check_same_device,
    check_shape,
)
from hamner.kernels.launch import capability


class Config(NamedTuple):
    """A config is a program's rows (tokens), the most heads it rotates at once, and its warps."""

    block_m: int
    block_h: int
    warps: int


# Small programs in the order of memory: all heads of one row, which share its cos and sin. At head
# size 64 a thread's 8 pairs are 16-byte loads of bf16 from each half. 9.0 as measured on an H200,
# the others as what it runs fastest of sm_86's code (profiles/LOG.md).
CONFIGS = {
    "8.6": Config(1, 32, 4),
    "8.0": Config(1, 32, 4),
    "9.0": Config(1, 32, 4),
}


@triton.jit
def row_positions(positions_ptr, offs_m, mask_m, seq_len, num_positions):
    """The result is the row of cos and sin of each row `offs_m`, (BLOCK_M,)."""
    if positions_ptr is not None:
        position = tl.load(positions_ptr + offs_m, mask=mask_m, other=0)
        # Without a host sync a bad position cannot be reported, so it must not read out of bounds.
        position = tl.minimum(tl.maximum(position, 0), num_positions - 1)
    else:
        # In 32 bits, which hold any batch's tokens: a 64-bit remainder costs as much as the memory.
        position = offs_m.to(tl.int32) % seq_len
    return position


@triton.jit
def rope_kernel(
    x_ptr,  # (N, row) input dtype: heads of HEAD_DIM one after the other
    out_ptr,  # (N, row) input dtype; may be x_ptr
    cos_ptr,  # (num_positions, HEAD_DIM / 2)
    sin_ptr,  # (num_positions, HEAD_DIM / 2)
    positions_ptr,  # (N,) int32, or None: row modulo seq_len
    N,
    seq_len,
    num_positions,
    row_size,
    NUM_ROTATED: tl.constexpr,  # heads to rotate, the first ones of a row
    NUM_HEADS: tl.constexpr,  # heads to write; those beyond NUM_ROTATED are copied
    HEAD_DIM: tl.constexpr,
    INVERSE: tl.constexpr,
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
    offs_table = position[:, None] * HALF + offs_i[None, :]
    mask_table = mask_m[:, None] & mask_i[None, :]

    for first_head in tl.static_range(0, NUM_HEADS, BLOCK_H):
        offs_h = first_head + tl.arange(0, BLOCK_H)
        offs = (
            offs_m[:, None, None] * row_size
            + offs_h[None, :, None] * HEAD_DIM
            + offs_i[None, None, :]
        )
        mask = mask_m[:, None, None] & (offs_h < NUM_HEADS)[None, :, None] & mask_i[None, None, :]
        first = tl.load(x_ptr + offs, mask=mask, other=0.0)
        second = tl.load(x_ptr + offs + HALF, mask=mask, other=0.0)
        # Asked for after x, which is longer on its way: cos and sin come from cache, for each block
        # of heads anew where there are several.
        cos = tl.load(cos_ptr + offs_table, mask=mask_table, other=0.0).to(tl.float32)[:, None, :]
        sin = tl.load(sin_ptr + offs_table, mask=mask_table, other=0.0).to(tl.float32)[:, None, :]
        if INVERSE:
            sin = -sin
        new_first = (first.to(tl.float32) * cos - second.to(tl.float32) * sin).to(first.dtype)
        new_second = (second.to(tl.float32) * cos + first.to(tl.float32) * sin).to(first.dtype)
        if NUM_ROTATED < NUM_HEADS:
            is_rotated = (offs_h < NUM_ROTATED)[None, :, None]
            new_first = tl.where(is_rotated, new_first, first)
            new_second = tl.where(is_rotated, new_second, second)
        tl.store(out_ptr + offs, new_first, mask=mask)
        tl.store(out_ptr + offs + HALF, new_second, mask=mask)


def launch_rotation(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    head_dim: int,
    num_rotated: int,
    num_heads: int,
    inverse: bool,
) -> None:
    """The launcher rotates the first `num_rotated` of `num_heads` heads of each row of x into out.

    Args:
        x: (B, T, at least num_heads * head_dim), contiguous.
        out: as x; x itself to rotate in place.
        cos, sin: (at least T, head_dim / 2), contiguous.
        positions: (B, T) int32, contiguous, or None for 0..T-1 in each sequence.
        head_dim: size of a head.
        num_rotated: heads to rotate.
        num_heads: heads to write; those beyond num_rotated are copied.
        inverse: rotate back.
    """
    num_rows = x.shape[0] * x.shape[1]
    if num_rows == 0:
        return
    config = CONFIGS[capability(x.device)]
    with torch.cuda.device_of(x):
        rope_kernel[(triton.cdiv(num_rows, config.block_m),)](
            x, out, cos, sin, positions,
            num_rows, x.shape[1], cos.shape[0], x.shape[2],
            NUM_ROTATED=num_rotated, NUM_HEADS=num_heads, HEAD_DIM=head_dim, INVERSE=inverse,
            BLOCK_M=config.block_m,
            BLOCK_H=min(config.block_h, triton.next_power_of_2(num_heads)),
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            num_warps=config.warps,
        )  # fmt: skip


def launch_packed_rotation(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None,
    *,
    inverse: bool = False,
    in_place: bool,
) -> Tensor:
    """The launcher rotates q and k of packed qkv, in place or into a new tensor, and returns it."""
    qkv = qkv.contiguous()
    out = qkv if in_place else torch.empty_like(qkv)
    num_rotated = num_heads + num_kv_heads
    launch_rotation(
        qkv, out, cos.contiguous(), sin.contiguous(),
        positions=positions.contiguous() if positions is not None else None,
        head_dim=qkv.shape[-1] // (num_heads + 2 * num_kv_heads),
        num_rotated=num_rotated,
        num_heads=num_rotated if in_place else num_rotated + num_kv_heads,
        inverse=inverse,
    )  # fmt: skip
    return out


@torch.library.custom_op("hamner::rope", mutates_args=())
def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    rotated = []
    for x in (q, k):
        x = x.contiguous()
        out = torch.empty_like(x)
        launch_rotation(
            x.flatten(2), out, cos.contiguous(), sin.contiguous(),
            head_dim=x.shape[3], num_rotated=x.shape[2], num_heads=x.shape[2], inverse=inverse,
        )  # fmt: skip
        rotated.append(out)
    return rotated[0], rotated[1]


@_rope_op.register_fake
def _(q, k, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rope_setup_context(ctx, inputs, output):
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx, d_q, d_k):
    cos, sin = ctx.saved_tensors
    d_q, d_k = _rope_op(d_q, d_k, cos=cos, sin=sin, inverse=not ctx.inverse)
    return d_q, d_k, None, None, None


_rope_op.register_autograd(_rope_backward, setup_context=_rope_setup_context)


@torch.library.custom_op("hamner::rope_packed_", mutates_args={"qkv"})
def _rope_packed_op(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None,
    inverse: bool,
) -> None:
    launch_packed_rotation(
        qkv, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions,
        inverse=inverse, in_place=True,
    )  # fmt: skip


@_rope_packed_op.register_fake
def _(qkv, cos, sin, num_heads, num_kv_heads, positions, inverse):
    return None


def check_tables(cos: Tensor, sin: Tensor, seq_len: int, head_dim: int, x: Tensor) -> None:
    """The function checks cos and sin against the x they rotate.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if head_dim % 2 != 0 or head_dim == 0:
        raise ValueError(f"head size is {head_dim}; rotation needs it even")
    for name, table in (("cos", cos), ("sin", sin)):
        check_dtype(name, table)
        if table.dim() != 2 or table.shape[0] < seq_len or table.shape[1] != head_dim // 2:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; it must be ({seq_len} or more positions, "
                f"{head_dim // 2})"
            )
        check_same_device(name, table, "the heads", x)
    if cos.shape != sin.shape:
        raise ValueError(f"sin has shape {tuple(sin.shape)}, cos {tuple(cos.shape)}")


def packed_head_size(width: int, num_heads: int, num_kv_heads: int) -> int:
    """The function gives the head size of packed rows (H + 2 KV) hd.

    Raises:
        ValueError: there are no such heads.
    """
    check_positive("num_heads", num_heads)
    check_positive("num_kv_heads", num_kv_heads)
    packed_heads = num_heads + 2 * num_kv_heads
    if width % packed_heads:
        raise ValueError(
            f"qkv rows have {width} elements, not a multiple of num_heads + 2 * num_kv_heads = "
            f"{packed_heads}"
        )
    return width // packed_heads


def check_packed_arguments(
    shape: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None,
    x: Tensor,
) -> None:
    """The function checks the rotation of a packed qkv of this shape, on the device of `x`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_shape("qkv", shape, ("batch", "time", "heads * head size"))
    head_dim = packed_head_size(shape[2], num_heads, num_kv_heads)
    check_tables(cos, sin, seq_len=shape[1] if positions is None else 1, head_dim=head_dim, x=x)
    if positions is not None:
        check_dtype("positions", positions, (torch.int32,))
        check_shape("positions", positions.shape, shape[:2])
        check_same_device("positions", positions, "qkv", x)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The op rotates queries and keys by their positions 0..T-1.

    Args:
        q: (B, T, H, hd) float32, float16 or bfloat16, hd even.
        k: (B, T, KV, hd), dtype of q.
        cos: (T, hd / 2) or more rows, any of the three dtypes; gets no gradient.
        sin: as cos.

    Returns:
        (q, k) rotated, new tensors, computed in float32.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_dtype("q", q)
    check_shape("q", q.shape, ("B", "T", "heads", "head size"))
    batch_size, seq_len, _, head_dim = q.shape
    check_like("k", k, "q", q)
    check_shape("k", k.shape, (batch_size, seq_len, "heads", head_dim))
    check_tables(cos, sin, seq_len=seq_len, head_dim=head_dim, x=q)
    return _rope_op(q, k, cos=cos, sin=sin, inverse=False)


def rope_packed_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
    *,
    inverse: bool = False,
) -> Tensor:
    """The op rotates q and k of packed qkv in place; `add_rms_norm_qkv_rope` is differentiable.

    Args:
        qkv: (B, T, (H + 2 KV) hd) contiguous: query heads, key heads, value heads.
        cos: (positions, hd / 2).
        sin: as cos.
        num_heads: H.
        num_kv_heads: KV.
        positions: (B, T) int32 rows of cos and sin, restarting with each document; None for
            0..T-1. A position outside the table takes its nearest row: no bounds are crossed, and
            none are reported, as that would wait for the GPU.
        inverse: rotate back.

    Returns:
        qkv.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_dtype("qkv", qkv)
    check_contiguous("qkv", qkv)
    check_packed_arguments(
        qkv.shape, cos, sin,
        num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions, x=qkv,
    )  # fmt: skip
    _rope_packed_op(
        qkv, cos, sin,
        num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions, inverse=inverse,
    )  # fmt: skip
    return qkv


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The result is x (B, T, heads, hd) rotated by cos and sin (B or 1, T, hd / 2)."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(compute).unsqueeze(2), sin.to(compute).unsqueeze(2)
    first, second = x.to(compute).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """This is `rope` in plain torch; float64 for float64 input, else float32 inside."""
    cos, sin = cos[None, : q.shape[1]], sin[None, : q.shape[1]]
    return _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)


def rope_packed_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
) -> Tensor:
    """This is `rope_packed_` in plain torch, differentiable: returns a new tensor."""
    packed_heads = num_heads + 2 * num_kv_heads
    heads = qkv.unflatten(-1, (packed_heads, qkv.shape[-1] // packed_heads))
    q_and_k, v = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=2)
    if positions is None:
        cos, sin = cos[None, : qkv.shape[1]], sin[None, : qkv.shape[1]]
    else:
        index = positions.long().clamp(0, cos.shape[0] - 1)
        cos, sin = cos[index], sin[index]
    return torch.cat((_rotate_reference(q_and_k, cos, sin), v), dim=2).flatten(2)
