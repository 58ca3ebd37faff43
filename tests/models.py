"""Small models for the tests."""

import torch

from hamner.config.model import ModelConfig
from hamner.model.attention import AttentionShape, get_attention
from hamner.model.ops import Ops, build_ops
from hamner.model.transformer import Transformer

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
    shape = AttentionShape(
        device=torch.device("cpu"),
        dtype=torch.float32,
        head_size=16,
        num_heads=4,
        num_kv_heads=2,
        seq_len=64,
        micro_batch_size=1,
    )
    return build_ops(kernels, get_attention(attention, shape))


def plain_ops() -> Ops:
    """Operations in plain torch."""
    return cpu_ops("torch", "sdpa")


def build(config: ModelConfig, seed: int = 0, **kwargs) -> Transformer:
    """A model with its initial weights."""
    model = Transformer(config, plain_ops(), **kwargs)
    model.initialize(seed)
    return model
