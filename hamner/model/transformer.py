"""The transformer has one screen per idea: attention, dense MLP, MoE MLP, block, model.

Llama's layout (arXiv:2302.13971): RMSNorm before each sub-layer and at the end, RoPE, grouped-query
attention, SwiGLU, no biases. Each sub-layer starts by adding the previous one's output to the
residual stream and normalising the sum, so that both are one pass (`add_rms_norm`); a block thus
takes and returns the pair (branch output, residual).

Every operation that has a kernel comes from `hamner.model.ops.Ops`; nothing here knows which
implementation runs. Labels are never shifted here: `targets[:, t]` is what `inputs[:, t]` should
predict, and only the data loader makes them.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hamner.config.model import ModelConfig
from hamner.kernels.moe_routing import Routing
from hamner.model.attention import (
    differential_attention,
    document_positions,
    sdpa,
    split_halves,
)
from hamner.model.int8 import Int8Linears
from hamner.model.kv_cache import KVCache
from hamner.model.ops import Ops
from hamner.model.recompute import run_block
from hamner.model.rotary import rotary_tables
from hamner.parallel.tensors import fill
from hamner.plan.memory import NONE, Policy


class Context(NamedTuple):
    """A context is what all blocks share in one forward pass."""

    rope: dict[str, Any]
    """RoPE (arXiv:2104.09864), half-rotation as in Llama, as `Ops.norm_qkv_rope` takes it: the
    numbers of heads; cos and sin, (T, head_size / 2) fp32; positions, (B, T) int32 rows of both or
    None for 0, 1, 2 ..."""
    document_ids: Tensor | None
    """(B, T) int32 when documents may not attend to each other"""
    cache: KVCache | None
    """keys and values of the tokens before these, when decoding"""
    int8: Mapping[str, dict[str, Any]] = {}
    """of the block at hand: how linear layers multiply in int8, see `Int8Linears.settings`; those
    it lacks do not"""


class RouterStatistics(NamedTuple):
    """The statistics say what all layers' routers did, for loss and metrics; all are fp32."""

    load_balancing_loss: Tensor
    """mean over layers"""
    z_loss: Tensor
    """mean over layers"""
    load: Tensor
    """(layers, experts) share of the routed assignments"""
    entropy: Tensor
    """(layers,) mean entropy of the routing distribution, nats"""


class Output(NamedTuple):
    """The model computes logits when no targets are given, losses otherwise."""

    logits: Tensor | None
    """(B, T, vocab_size) in the compute dtype; (B, 1, vocab_size), the last one, with a cache"""
    loss: Tensor | None
    """fp32, what to differentiate: cross-entropy plus weighted router losses"""
    cross_entropy: Tensor | None
    """fp32, mean over the kept targets"""
    router: RouterStatistics | None


class RMSNorm(nn.Module):
    """The module holds the weight of a norm (arXiv:1910.07467); ops that fuse it do the work."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.eps = eps


class Linear(nn.Linear):
    """A linear layer without bias multiplies as `Ops.linear` does."""

    def __init__(self, inputs: int, outputs: int, ops: Ops) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.ops = ops

    def forward(self, x: Tensor, **int8) -> Tensor:
        return self.ops.linear(x, self.weight, **int8)


class Attention(nn.Module):
    """Attention has grouped queries (arXiv:2305.13245) and one packed qkv projection.

    With `qk_norm`, every head of q and of k is normed before RoPE (Qwen3, arXiv:2505.09388). With
    `use_differential_attention`, two softmax maps are subtracted with a learned lambda and
    each head's output is normalised (DIFF Transformer, arXiv:2410.05258; heads laid out as in
    Hugging Face's DiffLlama).
    """

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.config, self.layer, self.ops = config, layer, ops
        d = config.hidden_size
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.qkv_proj = nn.Linear(d, config.qkv_size, bias=False)
        self.o_proj = Linear(d, d, ops)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps)
        if config.use_differential_attention:
            # 0.8 - 0.6 exp(-0.3 l): early layers subtract less.
            self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                vector = torch.empty(config.head_size, dtype=torch.float32)
                self.register_parameter(name, nn.Parameter(vector))

    def forward(
        self, x: Tensor, residual: Tensor | None, context: Context, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        """The module maps (B, T, D) branch and residual in, branch and residual out."""
        config, ops = self.config, self.ops
        inputs = x, residual, self.norm.weight, self.qkv_proj.weight
        settings = {**context.rope, "eps": self.norm.eps, "recompute": recompute}
        if config.qk_norm:
            settings["qk_norm"] = self.q_norm.weight, self.k_norm.weight
        settings |= context.int8.get("qkv", {})
        o_settings = context.int8.get("o", {})
        if context.cache is None and not config.use_differential_attention:
            out, residual = ops.norm_attention(
                *inputs, document_ids=context.document_ids, **settings
            )
            return self.o_proj(out, **o_settings), residual
        qkv, residual = ops.norm_qkv_rope(*inputs, **settings)
        if config.use_differential_attention:
            out = self.subtract_maps(qkv, context)
        else:
            out = sdpa(*context.cache.extend(self.layer, qkv)).flatten(-2)
        return self.o_proj(out, **o_settings), residual

    def subtract_maps(self, qkv: Tensor, context: Context) -> Tensor:
        """Map 1 minus lambda times map 2 is the differential attention of (B, T, qkv_size)."""
        config = self.config
        weight = (
            torch.exp(torch.dot(self.lambda_q1, self.lambda_k1))
            - torch.exp(torch.dot(self.lambda_q2, self.lambda_k2))
            + self.lambda_init
        )
        heads = config.num_attention_heads
        if context.cache is not None:
            attend = sdpa
            halves = (x.chunk(2, dim=2) for x in context.cache.extend(self.layer, qkv))
        else:
            attend = partial(self.ops.attention, document_ids=context.document_ids)
            halves = split_halves(qkv, heads, config.num_kv_heads)
        out = differential_attention(attend, *halves, weight)
        # The norm per pair of heads has no weight; (1 - lambda_init) keeps the gradient's scale.
        pairs = out.unflatten(-1, (heads // 2, 2 * config.head_size))
        scale = torch.full((2 * config.head_size,), 1 - self.lambda_init, device=out.device)
        return self.ops.rms_norm(pairs, scale, config.rms_norm_eps).flatten(-2)


class DenseMLP(nn.Module):
    """The MLP is SwiGLU (arXiv:2002.05202) on one packed gate_up projection, gate first."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        d, width = config.hidden_size, config.expert_intermediate_size
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.gate_up_proj = nn.Linear(d, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, d, bias=False)

    def forward(
        self, x: Tensor, residual: Tensor | None, context: Context, recompute: bool
    ) -> tuple[Tensor, Tensor, None]:
        weights = self.norm.weight, self.gate_up_proj.weight, self.down_proj.weight
        int8 = {
            f"{linear}_{name}": value
            for linear in ("gate_up", "down")
            for name, value in context.int8.get(linear, {}).items()
        }
        out, residual = self.ops.norm_mlp(
            x, residual, *weights, eps=self.norm.eps, recompute=recompute, **int8
        )
        return out, residual, None


class MoEMLP(nn.Module):
    """Tokens go to their top-k routed experts, none dropped, with renormalised weights (Mixtral,
    arXiv:2401.04088), and to all shared ones, as one wide SwiGLU (DeepSeekMoE, arXiv:2401.06066).
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        experts, d, width = config.num_experts, config.hidden_size, config.expert_intermediate_size
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.router = nn.Linear(d, experts, bias=False)
        bias = torch.empty(experts, dtype=torch.float32)
        self.register_buffer("router_bias", bias if config.router_balance == "bias" else None)
        self.gate_up_weight = nn.Parameter(torch.empty(experts, 2 * width, d))
        self.down_weight = nn.Parameter(torch.empty(experts, d, width))
        self.shared = None
        if config.num_shared_experts:
            shared_width = config.num_shared_experts * width
            up = nn.Linear(d, 2 * shared_width, bias=False)
            down = nn.Linear(shared_width, d, bias=False)
            self.shared = nn.ModuleDict({"gate_up_proj": up, "down_proj": down})

    def forward(
        self, x: Tensor, residual: Tensor | None, context: Context, recompute: bool
    ) -> tuple[Tensor, Tensor, Routing]:
        norm, ops = self.norm, self.ops
        normed, residual = ops.add_rms_norm(x, residual, norm.weight, norm.eps)
        keeping = contextlib.nullcontext()
        if recompute:
            stream, norm_weight = residual.detach(), norm.weight.detach()
            keeping = ops.recomputing(normed, lambda: ops.rms_norm(stream, norm_weight, norm.eps))
        with keeping:
            tokens = normed.flatten(0, 1)
            logits = ops.router_linear(tokens, self.router.weight)
            routing = ops.moe_route(
                logits, self.config.num_experts_per_token, bias=self.router_bias
            )
            weights = self.gate_up_weight, self.down_weight
            out = ops.moe_mlp(tokens, routing, *weights, recompute=recompute)
            # Not a view: FSDP2 warns of blocks that return one, as if it were worked on in place.
            out = torch.ops.aten._unsafe_view(out, normed.shape)
            if self.shared is not None:
                gate_up = self.shared.gate_up_proj(normed)
                weight = self.shared.down_proj.weight
                out = out + ops.swiglu_linear(gate_up, weight, recompute=recompute)
        return out, residual, routing


class Block(nn.Module):
    """A block runs attention, then the MLP."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.attention = Attention(config, layer, ops)
        self.mlp = MoEMLP(config, ops) if config.is_moe else DenseMLP(config, ops)

    def forward(self, x: Tensor, residual: Tensor | None, context: Context, *, recompute: bool):
        """The module maps (B, T, D) branch and residual in; branch, residual and `Routing` (or
        None) out."""
        x, residual = self.attention(x, residual, context, recompute)
        return self.mlp(x, residual, context, recompute)


class Transformer(nn.Module):
    """A transformer is the model of every option.

    Args:
        policies: one recompute policy per layer; default keeps everything.

    Parameters are fp32 as built; `hamner.train.optimizer` casts the matrices to the compute dtype.
    """

    def __init__(
        self, config: ModelConfig, ops: Ops, policies: Sequence[Policy] | None = None
    ) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.policies = tuple(policies) if policies else (NONE,) * config.num_layers
        # torch's own initial values, on a "meta" device, import its compiler: seconds a start.
        size = (config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding(*size, _weight=torch.empty(size))
        self.layers = nn.ModuleList(Block(config, i, ops) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.int8: Int8Linears | None = None
        """how forward passes with gradients multiply; those without do as if there were none"""
        self.rotary_tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Matrices come from normal(0, 0.02), lambda vectors from normal(0, 0.1); norm weights are
        1, router biases 0.

        All are drawn on the CPU in the order of the parameters: devices start from equal weights.
        """
        generator = torch.Generator().manual_seed(seed % 2**64)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            std = 0.1 if "lambda" in name else 0.02
            values = torch.empty(parameter.shape, dtype=torch.float32)
            fill(parameter, values.normal_(0.0, std, generator=generator))
        for bias in self.buffers():
            bias.zero_()

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Output:
        """The model gives logits, or the loss against `targets`.

        Args:
            inputs: (B, T) int64 tokens.
            targets: (B, T) int64, what each input should predict; -100 is ignored.
            document_ids: (B, T) int32, non-decreasing in a row: documents do not attend to each
                other and positions restart with each. None: the row is one context.
            cache: `inputs` go on from the tokens it holds, and are added to it; then there are
                neither targets nor documents, and only the last position's logits are computed.
        """
        if self.config.tie_word_embeddings:
            x, head_weight = self.ops.tied_embedding(inputs, self.embed.weight)
        else:
            x, head_weight = self.embed(inputs), self.lm_head.weight
        residual = None
        context = self.context(inputs, document_ids, cache)
        int8 = ({},) * len(self.layers)
        if self.int8 is not None and torch.is_grad_enabled():
            int8 = self.int8.settings()
        routings = []
        for layer, policy, how in zip(self.layers, self.policies, int8, strict=True):
            context = context._replace(int8=how)
            x, residual, routing = run_block(policy, layer, x, residual, context)
            routings.append(routing)
        hidden, _ = self.ops.add_rms_norm(x, residual, self.norm.weight, self.norm.eps)
        del x, residual, _  # the loss is where memory peaks
        if cache is not None:
            cache.length += inputs.shape[1]
            hidden = hidden[:, -1:]
        router = summarize_routers(routings) if self.config.is_moe else None
        if targets is None:
            logits = nn.functional.linear(hidden, head_weight)
            return Output(logits, None, None, router)
        cross_entropy = self.ops.linear_cross_entropy(
            hidden.flatten(0, 1), head_weight, targets.flatten()
        )
        loss = cross_entropy
        if router is not None:
            if self.config.router_balance == "aux":
                loss = loss + self.config.router_aux_loss_coef * router.load_balancing_loss
            loss = loss + self.config.router_z_loss_coef * router.z_loss
        return Output(None, loss, cross_entropy, router)

    def context(
        self, inputs: Tensor, document_ids: Tensor | None, cache: KVCache | None
    ) -> Context:
        """The blocks share it for `inputs` (B, T)."""
        length = inputs.shape[1] if cache is None else cache.capacity
        key = length, inputs.device
        if key not in self.rotary_tables:
            # One host-to-device copy per length; later steps find the tables here.
            cos, sin = rotary_tables(self.config, length)
            self.rotary_tables[key] = cos.to(inputs.device), sin.to(inputs.device)
        cos, sin = self.rotary_tables[key]
        if cache is not None:
            rows = slice(cache.length, cache.length + inputs.shape[1])
            cos, sin = cos[rows], sin[rows]
        rope = {
            "cos": cos,
            "sin": sin,
            "positions": None if document_ids is None else document_positions(document_ids),
            "num_heads": self.config.num_attention_heads,
            "num_kv_heads": self.config.num_kv_heads,
        }
        return Context(rope, document_ids, cache)

    @torch.no_grad()
    def balance_routers(self, load: Tensor, is_good: Tensor) -> None:
        """Every router's biases move a step towards even load (arXiv:2408.15664, algorithm 1).

            b_e += speed * sign(mean load - load_e)

        They move in place: a CUDA graph reads them where they are. Only with `router_balance` bias.

        Args:
            load: (layers, experts) of the whole step.
            is_good: () bool, on the device; false leaves the biases as they are.
        """
        direction = (load.mean(dim=1, keepdim=True) - load).sign()
        steps = torch.where(is_good, direction * self.config.router_bias_update_speed, 0.0)
        for layer, step in zip(self.layers, steps, strict=True):
            layer.mlp.router_bias.add_(step)

    def matrices(self) -> Iterator[nn.Parameter]:
        """Matmuls read these parameters: bf16 and decayed, unlike the vectors."""
        return (parameter for parameter in self.parameters() if parameter.ndim >= 2)


def summarize_routers(routings: Sequence) -> RouterStatistics:
    """The layers' `Routing`s are combined."""
    return RouterStatistics(
        load_balancing_loss=torch.stack([r.load_balancing_loss for r in routings]).mean(),
        z_loss=torch.stack([r.z_loss for r in routings]).mean(),
        load=torch.stack([r.load for r in routings]).detach(),
        entropy=torch.stack([r.entropy for r in routings]).detach(),
    )
