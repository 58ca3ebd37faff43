"""The shape of a model is a dataclass: widths, layers, experts, parameter counts.

Counts follow from the shape alone and are tested against the built model.
"""

import math
from dataclasses import dataclass
from typing import Literal

from hamner.errors import UserError

NOT_THE_MODEL = {
    *("gradient_checkpointing", "router_aux_loss_coef", "router_z_loss_coef"),
    "router_bias_update_speed",
}
"""fields of ModelConfig that say how to train, not what the weights are"""
MAX_LAYERS = 1_000
MAX_EXPERTS, MAX_EXPERTS_PER_TOKEN = 64, 8
"""what routing takes (hamner/kernels/moe_routing.py, which needs torch)"""


def flag(field_name: str) -> str:
    """The function names the flag that sets a field, without its dashes."""
    return field_name.replace("_", "-")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class ModelConfig:
    """These flags are the shape of the decoder-only transformer (hamner/model/transformer.py).

    Raises:
        UserError: No model can be built from the combination.
    """

    hidden_size: int = 1024
    """width of the residual stream"""
    num_layers: int = 24
    """transformer blocks"""
    num_attention_heads: int = 16
    """query heads; head size is hidden_size / num_attention_heads"""
    num_kv_heads: int = 4
    """key and value heads, each shared by a group of query heads (GQA)"""
    expert_intermediate_size: int = 2816
    """inner width of the SwiGLU MLP, or of each expert"""
    num_experts: int = 0
    """routed experts per layer; 0 is a dense MLP"""
    num_experts_per_token: int = 0
    """routed experts each token goes through"""
    num_shared_experts: int = 0
    """experts every token goes through, beside the routed ones"""
    max_seq_len: int = 1024
    """longest sequence in tokens"""
    vocab_size: int = 49_152
    """rows of the embedding"""
    rope_theta: float = 10_000.0
    """base of the rotary position frequencies"""
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """how positions are stretched from rope_scaling_from to max_seq_len (hamner/model/rotary.py)"""
    rope_scaling_from: int = 0
    """sequence length that was trained before the stretch; 0 without rope_scaling"""
    rms_norm_eps: float = 1e-5
    """added to the mean square in RMSNorm"""
    tie_word_embeddings: bool = True
    """use the embedding as the output head"""
    use_differential_attention: bool = False
    """subtract two softmax maps (DIFF Transformer, arXiv:2410.05258)"""
    qk_norm: bool = False
    """norm every head of q and of k before RoPE, as Qwen3 does (arXiv:2010.04245, 2505.09388)"""
    gradient_checkpointing: bool = True
    """allow recomputing activations in the backward pass; --recompute says how"""
    router_balance: Literal["aux", "bias"] = "aux"
    """what keeps the experts' load even: a loss, or a bias per expert that only the choice of
    experts sees and that each step moves towards even load, without a loss (DeepSeek-V3,
    arXiv:2408.15664, 2412.19437)"""
    router_aux_loss_coef: float = 0.02
    """weight of the load-balancing loss (Switch Transformer, arXiv:2101.03961; Mixtral's published
    value), with --router-balance aux"""
    router_bias_update_speed: float = 0.001
    """what a step adds to or takes from an expert's bias, with --router-balance bias"""
    router_z_loss_coef: float = 0.001
    """weight of the router z-loss (ST-MoE, arXiv:2202.08906)"""

    def __post_init__(self) -> None:
        self._require_ranges()
        if self.rope_scaling != "none":
            _require(
                0 < self.rope_scaling_from < self.max_seq_len,
                f"--rope-scaling {self.rope_scaling} stretches to --max-seq-len "
                f"{self.max_seq_len}: --rope-scaling-from {self.rope_scaling_from} must be above 0 "
                "and below that",
            )
        heads, kv_heads = self.num_attention_heads, self.num_kv_heads
        _require(
            self.hidden_size % heads == 0,
            f"--hidden-size {self.hidden_size} is not heads x head size: "
            f"make it a multiple of --num-attention-heads {heads}",
        )
        _require(
            self.head_size % 2 == 0,
            f"the head size {self.head_size} (--hidden-size {self.hidden_size} / "
            f"--num-attention-heads {heads}) must be even, because RoPE rotates pairs",
        )
        _require(
            heads % kv_heads == 0,
            f"--num-attention-heads {heads} is not divisible by --num-kv-heads {kv_heads}",
        )
        if self.num_experts:
            _require(
                2 <= self.num_experts <= MAX_EXPERTS,
                f"--num-experts {self.num_experts} must be between 2 and {MAX_EXPERTS}, or 0 for a "
                "dense MLP",
            )
            _require(
                1 <= self.num_experts_per_token <= min(self.num_experts, MAX_EXPERTS_PER_TOKEN),
                f"--num-experts-per-token {self.num_experts_per_token} must be between 1 and "
                f"--num-experts {self.num_experts}, and at most {MAX_EXPERTS_PER_TOKEN}",
            )
        else:
            _require(
                self.num_experts_per_token == 0 and self.num_shared_experts == 0,
                "--num-experts-per-token and --num-shared-experts need --num-experts above 0",
            )
            _require(
                self.router_balance == "aux",
                f"--router-balance {self.router_balance} needs --num-experts above 0",
            )
        if self.use_differential_attention:
            _require(
                kv_heads % 2 == 0,
                f"--use-differential-attention pairs the heads: make --num-kv-heads {kv_heads} "
                "even",
            )
            _require(
                not self.qk_norm,
                "--qk-norm and --use-differential-attention do not go together: no model of "
                "Hugging Face's or llama.cpp's has both; leave one out",
            )

    def _require_ranges(self) -> None:
        """Numbers that no model has are refused."""
        for name in (
            *("hidden_size", "num_layers", "num_attention_heads", "num_kv_heads"),
            *("expert_intermediate_size", "max_seq_len", "vocab_size"),
        ):
            _require(getattr(self, name) >= 1, f"--{flag(name)} must be at least 1")
        for name in ("num_experts", "num_experts_per_token", "num_shared_experts"):
            _require(getattr(self, name) >= 0, f"--{flag(name)} must not be negative")
        for name in ("rope_theta", "rms_norm_eps", "router_bias_update_speed"):
            _require(
                0 < getattr(self, name) < math.inf, f"--{flag(name)} must be above 0 and finite"
            )
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            _require(
                0 <= getattr(self, name) < math.inf,
                f"--{flag(name)} must not be negative, and finite",
            )
        _require(
            self.num_layers <= MAX_LAYERS,
            f"--num-layers {self.num_layers} must be at most {MAX_LAYERS:,}",
        )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_scaling_factor(self) -> float:
        """Sequences are this much longer than those trained before; 1 without scaling."""
        if self.rope_scaling == "none":
            return 1.0
        return self.max_seq_len / self.rope_scaling_from

    @property
    def qkv_size(self) -> int:
        """The packed query, key and value projection has this width."""
        return (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_size

    @property
    def is_moe(self) -> bool:
        """The value says whether the MLPs are mixtures of experts."""
        return self.num_experts > 0

    def matmul_parameters_per_layer(self, *, active: bool) -> int:
        """The method counts a block's matrix parameters; `active` takes one token's experts."""
        attention = self.hidden_size * (self.qkv_size + self.hidden_size)
        mlp = 3 * self.hidden_size * self.expert_intermediate_size
        if not self.is_moe:
            return attention + mlp
        routed = self.num_experts_per_token if active else self.num_experts
        router = self.hidden_size * self.num_experts
        return attention + router + mlp * (routed + self.num_shared_experts)

    def num_parameters_per_layer(self, *, active: bool = False) -> int:
        """The method counts a block's parameters: matrices, norms and lambdas."""
        vectors = 2 * self.hidden_size
        vectors += 4 * self.head_size if self.use_differential_attention else 0
        vectors += 2 * self.head_size if self.qk_norm else 0
        return self.matmul_parameters_per_layer(active=active) + vectors

    def num_parameters(self, *, active: bool = False) -> int:
        """The method counts all parameters, or one token's, the whole embedding among them."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        blocks = self.num_layers * self.num_parameters_per_layer(active=active)
        return blocks + embeddings + self.hidden_size
