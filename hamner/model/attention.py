"""The module chooses the attention of a run: `--attention {auto,triton,flash-attn,sdpa}`.

Every backend has the same two causal functions: one on packed qkv, as the model calls it, and one
on separate q, k and v, on which differential attention is built.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from hamner.errors import UserError
from hamner.kernels.flash_attention import (
    INTERPRETED,
    MAX_HEAD_SIZE,
    document_bounds,
    flash_attention,
    flash_attention_qkv,
    split_qkv,
)
from hamner.model.attention_timing import AttentionShape, fastest

MAX_MASK_GIB = 2.0


class AttentionBackend(NamedTuple):
    """A backend is one implementation of attention; it can be sent to other ranks."""

    name: str
    """triton, flash-attn or sdpa"""
    function: Callable[..., Tensor]
    """(qkv (B, T, (H + 2 KV) hd), H, KV, *, document_ids=None) -> (B, T, H hd)"""
    unpacked: Callable[..., Tensor]
    """(q (B, T, H, hd), k (B, T, KV, hd), v (B, T, KV, hd_v), *, document_ids=None)
    -> (B, T, H, hd_v), hd_v a multiple of hd"""
    reason: str
    """why it was chosen, for the log, e.g. "0.93 ms forward + backward per layer against sdpa
    1.10" """


def get_attention(name: str, shape: AttentionShape) -> AttentionBackend:
    """The function chooses the attention of a run.

    Args:
        name: triton, flash-attn, sdpa, or auto: sdpa on the CPU, on a GPU the fastest of those that
            can, measured forward and backward once per shape and remembered.

    Raises:
        UserError: the backend cannot do what is asked; names those that can.
    """
    reasons = {backend: reason(shape) for backend, reason in _UNSUPPORTED_REASONS.items()}
    able = [backend for backend, reason in reasons.items() if reason is None]
    if name not in ("auto", *reasons):
        raise UserError(f"--attention {name} is unknown; choose from auto, {', '.join(reasons)}")
    on_cpu = shape.device.type == "cpu"
    required = "sdpa" if name == "auto" and (on_cpu or not able) else name
    if reasons.get(required) is not None:
        mend = "lower --micro-batch-size or --seq-len, or do without the document mask"
        if able and name != "auto":
            mend = f"use --attention {' or '.join(able)}"
        raise UserError(f"--attention {name}: {reasons[required]}; {mend}")
    if name != "auto":
        return AttentionBackend(name, *_FUNCTIONS[name], "as asked")
    if on_cpu:
        return AttentionBackend("sdpa", *_FUNCTIONS["sdpa"], "runs on the CPU")
    name, why = able[0], "the only one that can"
    if len(able) > 1:
        name, why = fastest(shape, {backend: _FUNCTIONS[backend][0] for backend in able})
    others = [f"not {backend} ({reason})" for backend, reason in reasons.items() if reason]
    return AttentionBackend(name, *_FUNCTIONS[name], ", ".join([why, *others]))


def _triton_unsupported_reason(shape: AttentionShape) -> str | None:
    if shape.device.type != "cuda" and not INTERPRETED:
        return "it needs a CUDA GPU"
    if shape.device.type == "cuda" and torch.cuda.get_device_capability(shape.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if shape.device.type != "cuda" and shape.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if shape.head_size > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}, not {shape.head_size}"
    return None


def _flash_attn_unsupported_reason(shape: AttentionShape) -> str | None:
    if shape.device.type != "cuda":
        return "it needs a CUDA GPU"
    if torch.cuda.get_device_capability(shape.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return "it does not compute in float32"
    if shape.head_size > 256 or shape.head_size % 8:
        return f"it takes head sizes that are multiples of 8 up to 256, not {shape.head_size}"
    if importlib.util.find_spec("flash_attn") is None:
        return "not installed (pip install -e '.[flash]' --no-build-isolation)"
    return None


def _sdpa_unsupported_reason(shape: AttentionShape) -> str | None:
    if shape.document_mask:
        # A boolean mask, and what torch makes of it in the dtype of the scores.
        mask = shape.micro_batch_size * shape.seq_len**2 * (1 + shape.dtype.itemsize) / 2**30
        if mask > MAX_MASK_GIB:
            return f"it would hold a document mask of {mask:.1f} GiB in every layer"
    return None


def _packed(
    attend: Callable[..., Tensor], qkv: Tensor, num_heads: int, num_kv_heads: int, **documents
) -> Tensor:
    """`attend` is called on the parts of packed qkv."""
    return attend(*split_qkv(qkv, num_heads, num_kv_heads), **documents).flatten(-2)


def _by_value_slices(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **documents
) -> Tensor:
    """`attend`, which takes values as wide as the keys, is called on slices of wider values.

    Building the scores again for each slice is cheaper than what torch does for unequal widths:
    leave its fast kernels.
    """
    slices = v.split(q.shape[-1], dim=-1)
    return torch.cat([attend(q, k, part, **documents) for part in slices], dim=-1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """The last T of S positions attend causally, by torch's own attention.

    Args:
        q: (B, T, H, hd), T <= S; fewer than S in decoding only.
        k: (B, S, KV, hd).
        v: (B, S, KV, hd_v).
        document_ids: (B, T) int32 where T is S, or None.

    Returns:
        (B, T, H, hd_v).
    """
    new, total = q.shape[1], k.shape[1]
    mask = None
    if document_ids is not None:
        mask = (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()
        # Of torch's fused kernels, those that take a mask do not take grouped heads.
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    elif 1 < new < total:
        # Torch's own causal mask is aligned to the first key, ours to the last.
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    out = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=new > 1 and mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


# document_ids -> (its version, cumulative lengths)
_cumulative_lengths_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _cumulative_lengths(document_ids: Tensor) -> Tensor:
    """The function finds where documents of the flattened batch end: (documents + 1,) int32.

    The number of documents is only known on the device, and flash-attn allocates by it (128 rows
    of fp32 gradient per document, so an upper bound of B T would not do). So this waits for the
    GPU, once a batch: all layers share the result.
    """
    version, lengths = _cumulative_lengths_of.get(document_ids, (None, None))
    if version != document_ids._version:
        starts, _ = document_bounds(document_ids)
        is_start = starts == torch.arange(starts.shape[1], device=starts.device)
        bounds = is_start.flatten().nonzero().flatten()
        lengths = pad(bounds, (0, 1), value=starts.numel()).int()
        _cumulative_lengths_of[document_ids] = document_ids._version, lengths
    return lengths


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # optional extra

    options = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if document_ids is None:
        return flash_attn_func(q, k, v, **options)
    lengths = _cumulative_lengths(document_ids)
    batch_size, seq_len = document_ids.shape
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=lengths,
        cu_seqlens_k=lengths,
        max_seqlen_q=seq_len,
        max_seqlen_k=seq_len,
        **options,
    )
    return out.unflatten(0, (batch_size, seq_len))


_UNSUPPORTED_REASONS: dict[str, Callable[[AttentionShape], str | None]] = {
    "triton": _triton_unsupported_reason,
    "flash-attn": _flash_attn_unsupported_reason,
    "sdpa": _sdpa_unsupported_reason,
}
# (on packed qkv, on q, k and v)
_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "triton": (flash_attention_qkv, flash_attention),
    "flash-attn": (partial(_packed, _flash_attn), partial(_by_value_slices, _flash_attn)),
    "sdpa": (partial(_packed, sdpa), partial(_by_value_slices, sdpa)),
}


Halves = tuple[Tensor, Tensor]
"""the first and the second half of the heads"""


def split_halves(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Halves, Halves, Halves]:
    """Packed qkv (B, T, (H + 2 KV) hd) is split into q, k and v for `differential_attention`."""
    half, kv_half = num_heads // 2, num_kv_heads // 2
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    # One split, so that its gradient is one concatenation.
    q1, q2, k1, k2, v1, v2 = heads.split((half, half, *[kv_half] * 4), dim=2)
    return (q1, q2), (k1, k2), (v1, v2)


def differential_attention(
    attend: Callable[..., Tensor], q: Halves, k: Halves, v: Halves, lambda_full: Tensor
) -> Tensor:
    """The second of two attention maps is subtracted lambda times (arXiv:2410.05258).

    Heads are laid out as in Hugging Face's DiffLlama: map 1 is made by the first half of the query
    heads and the first half of the key heads, map 2 by the others; both weigh the same values,
    of pair m the value heads m and m + KV / 2 side by side. The norm that follows is the model's.

    Args:
        attend: (q, k, v) -> out, as `AttentionBackend.unpacked`.
        q: two of (B, T, H / 2, hd).
        k, v: two of (B, S, KV / 2, hd) each.
        lambda_full: one element, any shape.

    Returns:
        (B, T, H hd): H / 2 heads of 2 hd.
    """
    values = torch.cat(v, dim=-1)
    map1, map2 = (attend(q_half, k_half, values) for q_half, k_half in zip(q, k, strict=True))
    # A 0-d lambda does not change the dtype, whatever its own.
    return (map1 - lambda_full.reshape(()) * map2).flatten(-2)


def document_positions(document_ids: Tensor) -> Tensor:
    """The function gives each token's position in its document, without waiting for the GPU.

    Args:
        document_ids: (B, T) int32, non-decreasing along T.

    Returns:
        (B, T) int32.
    """
    starts, _ = document_bounds(document_ids)
    return torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device) - starts
