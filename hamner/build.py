"""How a configuration computes here: device, recompute plan, attention, and the model on them."""

from dataclasses import dataclass

import torch

from hamner import device, recompute
from hamner.attention import AttentionBackend, get_attention
from hamner.checkpoint import Checkpoint
from hamner.config import TrainConfig
from hamner.device import Compute
from hamner.model import Transformer
from hamner.ops import Ops, build_ops
from hamner.recompute import MemoryPlan, Policy


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to on this machine."""

    compute: Compute
    plan: MemoryPlan
    attention: AttentionBackend

    @property
    def ops(self) -> Ops:
        """The fused operations."""
        return build_ops(self.compute.kernels, self.attention)

    def model(self, config: TrainConfig, initial: Checkpoint | None = None) -> Transformer:
        """The model on its device in fp32, with the weights of `initial` or random ones."""
        # No weight has a value before it gets ours: torch's own, drawn first, would take seconds.
        with torch.device("meta"):
            model = Transformer(config.model, self.ops, self.plan.policies)
        model.to_empty(device=self.compute.device)
        if initial is None:
            model.initialize(config.seed)
        else:
            initial.load_model(model.state_dict())
        return model


def choose(config: TrainConfig) -> Setup:
    """Choose device, recompute policies, micro-batch and attention.

    Raises:
        UserError: what is asked for does not fit or is not on this machine.
    """
    compute = device.select(config)
    policies = recompute.parse(config.recompute, config.model.num_layers)
    plan = plan_memory(config, compute, compute.budget_bytes, policies)
    attention = get_attention(
        config.attention,
        device=compute.device,
        dtype=compute.dtype,
        head_size=config.model.head_size,
        num_heads=config.model.num_attention_heads,
        num_kv_heads=config.model.num_kv_heads,
        seq_len=config.seq_len,
        micro_batch_size=plan.micro_batch_size,
        document_mask=config.document_mask,
        folds_rope=compute.kernels == "triton" and not config.model.use_differential_attention,
    )
    return Setup(compute, plan, attention)


def plan_memory(
    config: TrainConfig,
    compute: Compute,
    budget: int,
    policies: tuple[Policy, ...] | None = None,
) -> MemoryPlan:
    """Fit the run into `budget` bytes on this device; `recompute.choose` has the rules.

    Raises:
        UserError: it does not fit.
    """
    return recompute.choose(
        config.model,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        precision=compute.precision,
        fused=compute.kernels == "triton",
        budget=budget,
        policies=policies,
        micro_batch_size=config.micro_batch_size,
        max_micro_batch_tokens=compute.max_micro_batch_tokens,
    )
