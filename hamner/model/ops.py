"""The one place where the trainer picks implementations: `--kernels` and `--attention`.

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

from hamner.data.batch import IGNORED_TARGET
from hamner.kernels.adamw import adamw_, global_grad_norm, global_grad_norm_reference
from hamner.kernels.cross_entropy import linear_cross_entropy
from hamner.kernels.embedding import tied_embedding, tied_embedding_reference
from hamner.kernels.fused_linear import (
    add_rms_norm_linear,
    add_rms_norm_qkv_rope,
    rms_norm_linear_reference,
    swiglu_linear,
    swiglu_linear_reference,
)
from hamner.kernels.grouped_matmul import moe_mlp, moe_mlp_reference
from hamner.kernels.moe_routing import Routing, moe_route, moe_route_reference
from hamner.kernels.norm_attention import add_rms_norm_attention
from hamner.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from hamner.kernels.rope import rope_packed_reference
from hamner.kernels.router_linear import router_linear, router_linear_reference
from hamner.model.attention import AttentionBackend, differential_attention
from hamner.model.recompute import rebuilt_in_backward


@dataclass(frozen=True)
class Ops:
    """The fused operations of a training step.

    Shapes: B batch, T time, D width, N = B T tokens, H query heads, KV key and value heads, V
    vocabulary, E experts, I intermediate size. A `residual` of None means that `x` itself is the
    residual stream. `rebuild` trades bandwidth for memory: the matmul's operand is computed again
    in backward instead of kept.
    """

    tied_embedding: Callable[..., tuple[Tensor, Tensor]]
    """(tokens (...), weight (V, D)) -> (x (..., D), weight as the output head is to use it)"""
    rms_norm: Callable[..., Tensor]
    """(x (..., D), weight (D,), eps) -> y"""
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    """(x, residual, weight, eps) -> (y, new residual)"""
    norm_linear: Callable[..., tuple[Tensor, Tensor]]
    """(x, residual, norm_weight, weight, *, eps, rebuild) -> (out, new residual)"""
    norm_qkv_rope: Callable[..., tuple[Tensor, Tensor]]
    """(x, residual, norm_weight, qkv_weight, *, cos, sin, num_heads, num_kv_heads, positions, eps,
    rebuild) -> (packed qkv (B, T, (H + 2 KV) head_size), new residual)"""
    norm_attention: Callable[..., tuple[Tensor, Tensor]]
    """(x, residual, norm_weight, qkv_weight, *, document_ids, and the same) -> (causal attention of
    what `norm_qkv_rope` gives (B, T, H head_size), new residual)"""
    swiglu_linear: Callable[..., Tensor]
    """(gate_up (..., 2I), weight (D, I), *, rebuild) -> (..., D)"""
    linear_cross_entropy: Callable[..., Tensor]
    """(hidden (N, D), weight (V, D), targets (N,)) -> mean over kept targets, fp32"""
    router_linear: Callable[..., Tensor]
    """(x (N, D), weight (E, D)) -> router logits (N, E), fp32"""
    moe_route: Callable[..., Routing]
    """(router_logits (N, E), experts per token, *, bias (E,) fp32 or None) -> Routing"""
    moe_mlp: Callable[..., Tensor]
    """(x (N, D), routing, gate_up_weight (E, 2I, D), down_weight (E, D, I), *, recompute)
    -> (N, D)"""
    rebuilding: Callable[..., AbstractContextManager]
    """(tensor, rebuild) -> context in which operations that save `tensor` call `rebuild` in
    backward instead"""
    adamw_: Callable[..., None]
    """see hamner.kernels.adamw.adamw_"""
    splits_masters: bool
    """`adamw_` takes a bf16 parameter's master split: see hamner.kernels.adamw.split_master"""
    global_grad_norm: Callable[..., Tensor]
    """(gradients) -> () fp32"""
    attention_backend: AttentionBackend

    def differential_attention(
        self,
        qkv: Tensor,
        weight: Tensor,
        num_heads: int,
        num_kv_heads: int,
        document_ids: Tensor | None,
    ) -> Tensor:
        """Two causal attention maps on packed qkv, the second subtracted `weight` times:
        (B, T, (H + 2 KV) head_size) -> (B, T, H head_size)."""
        return differential_attention(
            qkv,
            weight,
            num_heads,
            num_kv_heads,
            document_ids=document_ids,
            backend=self.attention_backend,
        )


def build_ops(kernels: str, attention_backend: AttentionBackend) -> Ops:
    """The operations of `--kernels {triton,torch,liger}` with the chosen attention."""
    attend = attention_backend.function
    if kernels == "triton":
        norm_attention = partial(_norm_attention, add_rms_norm_qkv_rope, attend)
        if attention_backend.name == "triton":
            norm_attention = add_rms_norm_attention
        return Ops(
            tied_embedding=tied_embedding,
            rms_norm=rms_norm,
            add_rms_norm=add_rms_norm,
            norm_linear=add_rms_norm_linear,
            norm_qkv_rope=add_rms_norm_qkv_rope,
            norm_attention=norm_attention,
            swiglu_linear=swiglu_linear,
            linear_cross_entropy=linear_cross_entropy,
            router_linear=router_linear,
            moe_route=moe_route,
            moe_mlp=moe_mlp,
            rebuilding=rebuilt_in_backward,
            adamw_=adamw_,
            splits_masters=True,
            global_grad_norm=global_grad_norm,
            attention_backend=attention_backend,
        )
    if kernels == "liger":
        from hamner.model import liger as source  # optional extra
    else:
        source = _TORCH
    norm_qkv_rope = partial(_norm_qkv_rope, source.rms_norm_linear, source.rope_packed)
    return Ops(
        tied_embedding=tied_embedding_reference,
        rms_norm=source.rms_norm,
        add_rms_norm=source.add_rms_norm,
        norm_linear=partial(_norm_linear, source.rms_norm_linear),
        norm_qkv_rope=norm_qkv_rope,
        norm_attention=partial(_norm_attention, norm_qkv_rope, attend),
        swiglu_linear=partial(_swiglu_linear, source.swiglu_linear),
        linear_cross_entropy=source.linear_cross_entropy,
        router_linear=router_linear_reference,
        moe_route=moe_route_reference,
        moe_mlp=_moe_mlp_torch,
        # Its plain experts are checkpointed, which keeps their input.
        rebuilding=lambda *_: nullcontext(),
        adamw_=_adamw_torch_,
        splits_masters=False,
        global_grad_norm=global_grad_norm_reference,
        attention_backend=attention_backend,
    )


def _rebuilt(rebuild: bool, function: Callable, *args):
    """Run `function`, keeping only its inputs if `rebuild`.

    Torch's checkpoint stops recomputing as soon as the last saved tensor is back, which is before
    the matmul that ends each pair: the matmul itself is not run twice.
    """
    if rebuild and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def _norm_linear(pair, x, residual, norm_weight, weight, *, eps, rebuild):
    # The sum stays outside the pair because it is kept: it is the next residual.
    stream = x if residual is None else x + residual
    return _rebuilt(rebuild, pair, stream, norm_weight, weight, eps), stream


def _norm_qkv_rope(
    pair, rope_packed, x, residual, norm_weight, qkv_weight, *, eps, rebuild, **rope
):
    qkv, stream = _norm_linear(
        pair, x, residual, norm_weight=norm_weight, weight=qkv_weight, eps=eps, rebuild=rebuild
    )
    return rope_packed(qkv, **rope), stream


def _norm_attention(
    norm_qkv_rope, attend, *inputs, document_ids, num_heads, num_kv_heads, **settings
):
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    qkv, stream = norm_qkv_rope(*inputs, **heads, **settings)
    return attend(qkv, num_heads, num_kv_heads, document_ids=document_ids), stream


def _swiglu_linear(pair, gate_up, weight, *, rebuild):
    return _rebuilt(rebuild, pair, gate_up, weight)


def _moe_mlp_torch(x, routing, gate_up_weight, down_weight, *, recompute):
    return _rebuilt(recompute, moe_mlp_reference, x, routing, gate_up_weight, down_weight)


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
    params, masters, grads, exp_avgs, exp_avg_sqs, *, lr, betas, eps, weight_decay, step, clip_coef
):
    """`hamner.kernels.adamw.adamw_` by PyTorch's own fused AdamW, on whole fp32 masters.

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
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
        if param.data_ptr() != master.data_ptr():
            param.copy_(master)
