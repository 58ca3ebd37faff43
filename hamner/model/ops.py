"""Only this module picks the implementations of operations, by `--kernels` and `--attention`.

`triton` runs the kernels, `torch` their plain references, `liger` liger-kernel's. All have the same
signatures, so the model and the optimizer never know which runs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.optim import adamw as torch_adamw
from torch.utils.checkpoint import checkpoint

from hamner import kernels as fused
from hamner.data.batch import IGNORED_TARGET
from hamner.kernels.adamw import global_grad_norm_reference
from hamner.kernels.embedding import tied_embedding_reference
from hamner.kernels.fused_linear import rms_norm_linear_reference, swiglu_linear_reference
from hamner.kernels.grouped_matmul import moe_mlp_reference
from hamner.kernels.moe_routing import moe_route_reference
from hamner.kernels.muon import (
    muon_apply_reference_,
    muon_momentum_reference_,
    symmetric_product_reference,
)
from hamner.kernels.qk_norm import qk_norm_reference
from hamner.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from hamner.kernels.rope import rope_packed_reference
from hamner.kernels.router_linear import router_linear_reference
from hamner.model.attention import AttentionBackend
from hamner.model.recompute import recomputed_in_backward


@dataclass(frozen=True)
class Ops:
    """`Ops` holds the fused operations of a training step.

    Shapes: B batch, T time, D width, N = B T tokens, H query heads, KV key and value heads, V
    vocabulary, E experts, I intermediate size. A `residual` of None means that `x` itself is the
    residual stream. The Triton ops with a linear layer also take what `Int8Linears.settings` gives
    for it, `norm_mlp` with the layer's name before. `recompute` trades bandwidth for memory: the
    matmul's operand is computed again in backward instead of kept.
    """

    tied_embedding: Callable[..., tuple[Tensor, Tensor]]
    """(tokens (...), weight (V, D)) -> (x (..., D), weight as the output head is to use it)"""
    rms_norm: Callable[..., Tensor]
    """(x (..., D), weight (D,), eps) -> y"""
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    """(x, residual, weight, eps) -> (y, new residual)"""
    norm_qkv_rope: Callable[..., tuple[Tensor, Tensor]]
    """(x, residual, norm_weight, qkv_weight, *, cos, sin, num_heads, num_kv_heads, positions, eps,
    recompute, qk_norm=None) -> (packed qkv (B, T, (H + 2 KV) head_size), new residual); qk_norm is
    the weights (head_size,) of the norms of q and of k"""
    norm_attention: Callable[..., tuple[Tensor, Tensor]]
    """(x, residual, norm_weight, qkv_weight, *, document_ids, and the same) -> (causal attention of
    what `norm_qkv_rope` gives (B, T, H head_size), new residual)"""
    attention: Callable[..., Tensor]
    """see hamner.model.attention.AttentionBackend.unpacked"""
    linear: Callable[..., Tensor]
    """(x (..., inputs), weight (outputs, inputs)) -> (..., outputs)"""
    swiglu_linear: Callable[..., Tensor]
    """(gate_up (..., 2I), weight (D, I), *, recompute) -> (..., D)"""
    norm_mlp: Callable[..., tuple[Tensor, Tensor]]
    """(x, residual, norm_weight, gate_up_weight, down_weight, *, eps, recompute) -> (what
    `add_rms_norm`, a matmul and `swiglu_linear` give (..., D), new residual)"""
    linear_cross_entropy: Callable[..., Tensor]
    """(hidden (N, D), weight (V, D), targets (N,)) -> mean over kept targets, fp32"""
    router_linear: Callable[..., Tensor]
    """(x (N, D), weight (E, D)) -> router logits (N, E), fp32"""
    moe_route: Callable[..., fused.Routing]
    """(router_logits (N, E), experts per token, *, bias (E,) fp32 or None) -> Routing"""
    moe_mlp: Callable[..., Tensor]
    """(x (N, D), routing, gate_up_weight (E, 2I, D), down_weight (E, D, I), *, recompute)
    -> (N, D)"""
    recomputing: Callable[..., AbstractContextManager]
    """(tensor, recompute) -> context in which operations that save `tensor` call `recompute` in
    backward instead"""
    adamw_: Callable[..., None]
    """see hamner.kernels.adamw.adamw_"""
    splits_masters: bool
    """`adamw_` takes a bf16 parameter's master split: see hamner.kernels.adamw.split_master"""
    global_grad_norm: Callable[..., Tensor]
    """(gradients) -> () fp32"""
    muon_momentum_: Callable[..., None]
    """see hamner.kernels.muon.muon_momentum_"""
    orthogonalize_: Callable[..., None]
    """([updates (B, R, C)], [rows of the logical matrices]): see hamner.kernels.muon"""
    muon_apply_: Callable[..., None]
    """see hamner.kernels.muon.muon_apply_"""


def build_ops(kernels: str, attention_backend: AttentionBackend) -> Ops:
    """`build_ops` gives those of `--kernels {triton,torch,liger}` with the chosen attention."""
    if kernels == "triton":
        return _triton_ops(attention_backend)
    attend = attention_backend.function
    if kernels == "liger":
        from hamner.model import liger as source  # optional extra
    else:
        source = _TORCH
    norm_qkv_rope = partial(_norm_qkv_rope, source)
    norm_linear = partial(_norm_linear, source.rms_norm_linear)
    swiglu_linear = partial(_recomputed, source.swiglu_linear)
    return Ops(
        tied_embedding=tied_embedding_reference,
        rms_norm=source.rms_norm,
        add_rms_norm=source.add_rms_norm,
        norm_qkv_rope=norm_qkv_rope,
        norm_attention=partial(_norm_attention, norm_qkv_rope, attend),
        attention=attention_backend.unpacked,
        linear=torch.nn.functional.linear,
        swiglu_linear=swiglu_linear,
        norm_mlp=partial(_norm_mlp, norm_linear, swiglu_linear),
        linear_cross_entropy=source.linear_cross_entropy,
        router_linear=router_linear_reference,
        moe_route=moe_route_reference,
        moe_mlp=partial(_recomputed, moe_mlp_reference),
        # Its plain experts are checkpointed, which keeps their input.
        recomputing=lambda *_: nullcontext(),
        adamw_=_adamw_torch_,
        splits_masters=False,
        global_grad_norm=global_grad_norm_reference,
        muon_momentum_=muon_momentum_reference_,
        orthogonalize_=partial(fused.orthogonalize_, product=symmetric_product_reference),
        muon_apply_=muon_apply_reference_,
    )


def _triton_ops(attention_backend: AttentionBackend) -> Ops:
    norm_attention = partial(_fused_norm_attention, attention_backend.function)
    if attention_backend.name == "triton":
        norm_attention = fused.add_rms_norm_attention
    return Ops(
        tied_embedding=fused.tied_embedding,
        rms_norm=fused.rms_norm,
        add_rms_norm=fused.add_rms_norm,
        norm_qkv_rope=fused.add_rms_norm_qkv_rope,
        norm_attention=norm_attention,
        attention=attention_backend.unpacked,
        linear=_fused_linear,
        swiglu_linear=fused.swiglu_linear,
        norm_mlp=fused.add_rms_norm_mlp,
        linear_cross_entropy=fused.linear_cross_entropy,
        router_linear=fused.router_linear,
        moe_route=fused.moe_route,
        moe_mlp=fused.moe_mlp,
        recomputing=recomputed_in_backward,
        adamw_=fused.adamw_,
        splits_masters=True,
        global_grad_norm=fused.global_grad_norm,
        muon_momentum_=fused.muon_momentum_,
        orthogonalize_=fused.orthogonalize_,
        muon_apply_=fused.muon_apply_,
    )


def _fused_linear(x: Tensor, weight: Tensor, **int8) -> Tensor:
    return fused.int8_linear(x, weight, **int8) if int8 else torch.nn.functional.linear(x, weight)


def _recomputed(function: Callable, *args, recompute: bool):
    """`function` runs, keeping only its inputs if `recompute`.

    Torch's checkpoint stops recomputing as soon as the last saved tensor is back, which is before
    the matmul that ends each pair: the matmul itself is not run twice.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def _norm_linear(pair, x, residual, norm_weight, weight, *, eps, recompute):
    # The sum stays outside the pair because it is kept: it is the next residual.
    stream = x if residual is None else x + residual
    return _recomputed(pair, stream, norm_weight, weight, eps, recompute=recompute), stream


def _norm_qkv_rope(source, *inputs, eps, recompute, qk_norm=None, **rope):
    qkv, stream = _norm_linear(source.rms_norm_linear, *inputs, eps=eps, recompute=recompute)
    rotate = partial(source.rope_packed, **rope)
    if qk_norm is None:
        return rotate(qkv), stream

    def norm_and_rotate(qkv, *weights):
        heads = rope["num_heads"], rope["num_kv_heads"]
        return rotate(qk_norm_reference(qkv, *weights, *heads, eps=eps, norm=source.rms_norm))

    return _recomputed(norm_and_rotate, qkv, *qk_norm, recompute=recompute), stream


def _norm_mlp(norm_linear, swiglu_linear, *inputs, eps, recompute):
    *norm, down_weight = inputs
    gate_up, stream = norm_linear(*norm, eps=eps, recompute=recompute)
    return swiglu_linear(gate_up, down_weight, recompute=recompute), stream


def _norm_attention(norm_qkv_rope, attend, *inputs, document_ids, **settings):
    qkv, stream = norm_qkv_rope(*inputs, **settings)
    heads = settings["num_heads"], settings["num_kv_heads"]
    return attend(qkv, *heads, document_ids=document_ids), stream


def _fused_norm_attention(attend, *inputs, document_ids, hands_to=None, **settings):
    """The kernels run around an attention that is not theirs; nothing is left in `hands_to` then.

    With qk-norm, that would keep q, k and v beside what was normed: where it is to recompute, they
    are made from that again.
    """
    if not (settings["recompute"] and settings.get("qk_norm")):
        norm_qkv_rope = fused.add_rms_norm_qkv_rope
        return _norm_attention(
            norm_qkv_rope, attend, *inputs, document_ids=document_ids, **settings
        )
    eps, weights = settings.pop("eps"), settings.pop("qk_norm")
    names = {"recompute", "matmul", "errors"} & settings.keys()
    how = {name: settings.pop(name) for name in names}
    qkv, stream = fused.add_rms_norm_linear(*inputs, eps=eps, **how)
    arguments = (qkv, *weights)
    normed = fused.qk_norm_rope(*arguments, **settings, eps=eps)
    detached = [x.detach() for x in arguments]
    with recomputed_in_backward(normed, lambda: fused.qk_norm_rope(*detached, **settings, eps=eps)):
        heads = settings["num_heads"], settings["num_kv_heads"]
        return attend(normed, *heads, document_ids=document_ids), stream


def _linear_cross_entropy_torch(hidden, weight, targets):
    logits = torch.nn.functional.linear(hidden, weight).float()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return losses / (targets != IGNORED_TARGET).sum().clamp(min=1)


_TORCH = SimpleNamespace(
    rms_norm=rms_norm_reference,
    add_rms_norm=add_rms_norm_reference,
    rms_norm_linear=rms_norm_linear_reference,
    rope_packed=rope_packed_reference,
    swiglu_linear=swiglu_linear_reference,
    linear_cross_entropy=_linear_cross_entropy_torch,
)


@torch.no_grad()
def _adamw_torch_(
    params, masters, grads, exp_avgs, exp_avg_sqs, *, betas, step, clip_coef, **settings
):
    """PyTorch's own fused AdamW does as `hamner.kernels.adamw_`, on whole fp32 masters.

    Its gradient scaling does the clipping, and its overflow flag skips the step on the device. One
    parameter after the other: together, they would need fp32 copies of all gradients at once.
    """
    for param, master, grad, exp_avg, exp_avg_sq in zip(
        params, masters, grads, exp_avgs, exp_avg_sqs, strict=True
    ):
        torch_adamw.adamw(
            [master],
            [grad.to(master.dtype)],
            [exp_avg],
            [exp_avg_sq],
            [],
            # It counts up before it reads the step.
            [torch.full((), step - 1.0, device=master.device)],
            fused=True,
            grad_scale=clip_coef.reciprocal(),
            found_inf=(~clip_coef.isfinite()).float(),
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            maximize=False,
            **settings,
        )
        if param.data_ptr() != master.data_ptr():
            param.copy_(master)
