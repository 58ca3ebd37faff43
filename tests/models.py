"""Small models for the tests."""

import torch

from hamner.attention import get_attention
from hamner.model import Transformer
from hamner.ops import Ops, build_ops
from hamner.options import ModelConfig

DENSE = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    expert_intermediate_size=96,
    max_seq_len=64,
    vocab_size=128,
)
MOE = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    expert_intermediate_size=48,
    num_experts=4,
    num_experts_per_token=2,
    max_seq_len=64,
    vocab_size=128,
)


def cpu_ops(kernels: str, attention: str) -> Ops:
    """Operations for the CPU in fp32; the kernels run in Triton's interpreter."""
    backend = get_attention(
        attention,
        device=torch.device("cpu"),
        dtype=torch.float32,
        head_size=16,
        num_heads=4,
        num_kv_heads=2,
        seq_len=64,
        micro_batch_size=1,
        document_mask=False,
    )
    return build_ops(kernels, backend)


def plain_ops() -> Ops:
    """Operations in plain torch."""
    return cpu_ops("torch", "sdpa")


def build(config: ModelConfig, seed: int = 0, **kwargs) -> Transformer:
    """A model with its initial weights."""
    model = Transformer(config, plain_ops(), **kwargs)
    model.initialize(seed)
    return model


def hugging_face_weights(model) -> dict[str, torch.Tensor]:
    """Our weights under Hugging Face's names (Llama, Mixtral, DiffLlama share them)."""
    config = model.config
    q, kv = config.num_attention_heads * config.head_size, config.num_kv_heads * config.head_size
    weights = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head_weight,
    }
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}"
        attention, mlp = layer.attention, layer.mlp
        packed = attention.qkv_proj.weight.split((q, kv, kv))
        for name, part in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
            weights[f"{prefix}.self_attn.{name}.weight"] = part
        weights[f"{prefix}.self_attn.o_proj.weight"] = attention.o_proj.weight
        weights[f"{prefix}.input_layernorm.weight"] = attention.norm.weight
        weights[f"{prefix}.post_attention_layernorm.weight"] = mlp.norm.weight
        if config.use_differential_attention:
            for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                weights[f"{prefix}.self_attn.{name}"] = getattr(attention, name)
        if config.is_moe:
            weights[f"{prefix}.mlp.gate.weight"] = mlp.router.weight
            weights[f"{prefix}.mlp.experts.gate_up_proj"] = mlp.gate_up_weight
            weights[f"{prefix}.mlp.experts.down_proj"] = mlp.down_weight
        else:
            gate, up = mlp.gate_up_proj.weight.chunk(2)
            weights[f"{prefix}.mlp.gate_proj.weight"] = gate
            weights[f"{prefix}.mlp.up_proj.weight"] = up
            weights[f"{prefix}.mlp.down_proj.weight"] = mlp.down_proj.weight
    return weights
