"""The module runs the operations on Liger's kernels (arXiv:2410.10989): `--kernels liger`.

They are there to compare with. Signatures are those of `hamner.model.ops.Ops`. Liger has no kernels
for routing, experts and AdamW: there the plain torch ones run.
"""

import torch
from liger_kernel.transformers import functional as liger
from torch import Tensor
from torch.nn.functional import linear

from hamner.kernels.flash_attention import split_qkv


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The function maps x (..., D) -> y."""
    return liger.liger_rms_norm(x, weight, eps, in_place=False)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The function gives y and the new residual; a residual of None stands for zero."""
    if residual is None:
        return rms_norm(x, weight, eps), x
    return liger.liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)


def rms_norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The matmul reads what the norm writes."""
    return linear(rms_norm(x, norm_weight, eps), weight)


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """The function maps gate_up (..., 2I) -> (..., D)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return linear(liger.liger_swiglu(gate, up), weight)


def rope_packed(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None,
) -> Tensor:
    """The result is q and k of packed qkv (B, T, (H + 2 KV) hd) rotated.

    The tables cos and sin are (T, hd / 2) fp32.
    """
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    # Liger's tables hold each angle twice, for all sequences or for each: (1 or B, T, hd).
    rows = torch.arange(qkv.shape[1], device=qkv.device)[None] if positions is None else positions
    tables = (torch.cat((table, table), dim=-1)[rows] for table in (cos, sin))
    # It rotates in place, which the split's views do not allow.
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    q, k = liger.liger_rope(q, k, *tables)
    return torch.cat((q.transpose(1, 2), k.transpose(1, 2), v), dim=2).flatten(-2)


linear_cross_entropy = liger.liger_fused_linear_cross_entropy
"""It computes the mean over kept targets, fp32, with the logits of one chunk at a time."""
