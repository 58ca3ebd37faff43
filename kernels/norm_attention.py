"""All before a layer's output projection is one op: norm, qkv matmul, RoPE and FlashAttention.

    qkv, new_residual = add_rms_norm_qkv_rope(x, residual, ...)
    out = flash_attention_qkv(qkv, ...)

Forward is these two ops, and what is kept for backward is what they keep. In their backward the
gradient of the rotated qkv would go from one to the other, for a kernel that reads it, rotates dq
and dk back and writes it again; here attention's kernels rotate what they have accumulated in fp32,
right before they store it. Saved are that kernel, a temporary as large as qkv and a rounding:

    2 N (H + 2 KV) hd e bytes

For bf16, N 24,576, 16 + 2 * 4 heads of 64 that is 151 MB a layer: 0.05 ms at 3.0 TB/s, 0.18 ms at
850 GB/s. Heads that are padded in attention's tiles (hd not a power of two, or below 16) are still
rotated back by rope.py's kernel, in place.

With qk-norm (qk_norm.py) q and k of the matmul's result are normed and rotated beside it, and
attention reads v where it is. Kept is what the matmul gave; backward norms and rotates it again
(recompute=True) or has kept that too, 2 N (H + KV) hd bytes in bf16. The norms' backward must read
dq and dk in any case: it rotates them back, and attention's kernels do not.
"""

import torch
from torch import Tensor

from hamner.kernels.flash_attention import (
    check_device,
    check_packed_width,
    flash_attention_reference,
    optional_document_bounds,
    split_qk,
    split_qkv,
)
from hamner.kernels.fused_linear import add_rms_norm_qkv_rope_reference, check_qkv_rope_arguments
from hamner.kernels.int8_handover import Handover
from hamner.kernels.int8_linear import Matmul, check_matmul
from hamner.kernels.int8_quantize import Int8Matrix


class _NormAttention(torch.autograd.Function):
    """It composes registered ops, so that each is seen by the profiler and by torch.compile."""

    @staticmethod
    def forward(
        ctx, x, residual, norm_weight, qkv_weight, q_norm_weight, k_norm_weight, cos, sin,
        num_heads, num_kv_heads, positions, documents, eps, recompute, matmul, errors, hands_to,
    ):  # fmt: skip
        ctx.heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
        ctx.eps, ctx.has_qk_norm = eps, q_norm_weight is not None
        rope = {"cos": cos, "sin": sin, "positions": positions}
        qkv, new_residual, rstd, normed = torch.ops.hamner.rms_norm_linear(
            x, residual, norm_weight, qkv_weight, eps=eps, recompute=recompute, matmul=matmul,
            **({} if ctx.has_qk_norm else rope | ctx.heads),
        )  # fmt: skip
        q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
        ctx.scale = q.shape[-1] ** -0.5
        normed_qk = None
        if ctx.has_qk_norm:
            normed_qk = _norm_and_rotate(ctx, qkv, q_norm_weight, k_norm_weight, **rope)
            q, k = split_qk(normed_qk, num_heads, num_kv_heads)
        out, lse = torch.ops.hamner.flash_attention(
            q, k, v, documents, causal=True, scale=ctx.scale
        )
        ctx.has_residual, ctx.matmul = residual is not None, matmul
        ctx.measures, ctx.hands_to = errors is not None, hands_to
        ctx.set_materialize_grads(False)
        if not ctx.has_residual:
            # Through here all the same: backward then adds the stream's gradient in its one pass.
            new_residual = x.view_as(x)
        ctx.save_for_backward(
            new_residual if ctx.has_residual else x, rstd, None if recompute else normed,
            norm_weight, qkv_weight, qkv, None if recompute else normed_qk,
            q_norm_weight, k_norm_weight, out, lse, documents, cos, sin, positions,
        )  # fmt: skip
        return out.flatten(-2), new_residual

    @staticmethod
    def backward(ctx, d_out, d_residual):
        no_gradients = (None,) * 9
        if d_out is None:
            d_x = d_residual
            return d_x, d_x if ctx.has_residual else None, *(None,) * 4, *no_gradients, None, None
        *norm, qkv, normed_qk, q_weight, k_weight, out, lse, documents, cos, sin, positions = (
            ctx.saved_tensors
        )
        rope = {"cos": cos, "sin": sin, "positions": positions}
        d_qk_weights = None, None
        if ctx.has_qk_norm and normed_qk is None:
            normed_qk = _norm_and_rotate(ctx, qkv, q_weight, k_weight, **rope)
        d_qkv = torch.ops.hamner.flash_attention_qkv_backward(
            d_out, qkv, out, lse, documents=documents, causal=True, scale=ctx.scale,
            **(dict.fromkeys(rope) if ctx.has_qk_norm else rope), normed_qk=normed_qk,
        )  # fmt: skip
        del normed_qk
        if ctx.has_qk_norm:
            d_qk_weights = torch.ops.hamner.qk_norm_rope_backward_(
                d_qkv, qkv, q_weight, k_weight, **rope, **ctx.heads, eps=ctx.eps
            ).unbind()
        hands = ctx.hands_to is not None
        d_x, *d_weights, d_errors, values, scales = torch.ops.hamner.rms_norm_linear_backward(
            d_qkv, d_residual, *norm, matmul=ctx.matmul, measures=ctx.measures, quantises=hands
        )
        if hands:
            ctx.hands_to.leave(d_x, Int8Matrix(values, scales))
        d_residual, d_errors = d_x if ctx.has_residual else None, d_errors if ctx.measures else None
        return d_x, d_residual, *d_weights, *d_qk_weights, *no_gradients, d_errors, None


def _norm_and_rotate(ctx, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **rope) -> Tensor:
    """The result is q and k of qkv as attention takes them, (B, T, (H + KV) hd)."""
    return torch.ops.hamner.qk_norm_rope(
        qkv, q_weight, k_weight, **rope, **ctx.heads, eps=ctx.eps, with_v=False
    )


def add_rms_norm_attention(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    eps: float = 1e-5,
    *,
    recompute: bool = True,
    matmul: Matmul | str = "bf16",
    errors: Tensor | None = None,
    qk_norm: tuple[Tensor, Tensor] | None = None,
    hands_to: Handover | None = None,
) -> tuple[Tensor, Tensor]:
    """The op is `add_rms_norm_qkv_rope`, then causal `flash_attention_qkv` of scale 1 / sqrt(hd).

    Args:
        x, residual, norm_weight, qkv_weight, cos, sin, positions, eps, recompute, matmul,
            errors, qk_norm: as in `add_rms_norm_qkv_rope`, hd even, up to 128.
        num_heads: H, a multiple of KV.
        num_kv_heads: KV.
        document_ids: as in `flash_attention`.
        hands_to: where to leave the gradient of x quantised, for the layer that made x.

    Returns:
        (out, new_residual): out (B, T, H hd), new_residual (B, T, D), both in the dtype of x.
        Without a residual new_residual is a view of x.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_qkv_rope_arguments(
        x, residual, norm_weight, qkv_weight, cos=cos, sin=sin,
        num_heads=num_heads, num_kv_heads=num_kv_heads, positions=positions, qk_norm=qk_norm,
    )  # fmt: skip
    check_matmul(matmul, errors, qkv_weight, weight_name="qkv_weight")
    check_packed_width(qkv_weight.shape[0], num_heads, num_kv_heads)
    check_device("x", x)
    documents = optional_document_bounds(document_ids, x)
    return _NormAttention.apply(
        x, residual, norm_weight, qkv_weight, *(qk_norm or (None, None)), cos, sin,
        num_heads, num_kv_heads, positions, documents, eps, recompute, matmul, errors, hands_to,
    )  # fmt: skip


def add_rms_norm_attention_reference(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
    document_ids: Tensor | None = None,
    eps: float = 1e-5,
    qk_norm: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """This is `add_rms_norm_attention` in plain torch."""
    inputs = x, residual, norm_weight, qkv_weight
    rope = cos, sin, num_heads, num_kv_heads, positions
    qkv, new_residual = add_rms_norm_qkv_rope_reference(*inputs, *rope, eps=eps, qk_norm=qk_norm)
    heads = split_qkv(qkv, num_heads, num_kv_heads)
    return flash_attention_reference(*heads, document_ids=document_ids).flatten(-2), new_residual
