"""Which activations a step keeps, which it computes again in the backward pass, and what both cost.

A policy runs one block and knows how many bytes that block keeps. `choose` fits a run into a memory
budget by that account alone, so `hamner.plan` can say beforehand what a run will take; torch is
imported only when a block runs.

Names: `none` keeps every operand, `selective` rebuilds the cheap operands (the normed inputs and
the SwiGLU output) inside the backward of the matmul that reads them, `full` keeps the block's input
and runs the block again (Chen et al. 2016, arXiv:1604.06174).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hamner.errors import UserError
from hamner.options import ModelConfig

if TYPE_CHECKING:
    import torch

GIB = 2**30
RESERVE_GIB = 2.0
"""of a GPU's memory left to the CUDA context, to fragmentation and to the desktop"""
_DTYPE_BYTES = {"bf16": 2, "fp32": 4}


class Policy(Protocol):
    """How one block is run, and the activations it keeps until its backward pass."""

    name: str

    def run(self, block: Callable, x: "torch.Tensor", residual: "torch.Tensor | None", *args):
        """Run `block(x, residual, *args, rebuild=...)`; returns what the block returns."""
        ...

    def kept_elements(self, model: ModelConfig) -> int:
        """Elements of the compute dtype kept per token and layer."""
        ...


def _attention_elements(model: ModelConfig) -> int:
    """qkv and the attention output, with what differential attention adds to them."""
    d, kv = model.hidden_size, model.num_kv_heads * model.head_size
    elements = (d + 2 * kv) + d
    if model.use_differential_attention:
        # Values of both halves side by side, and the two maps' outputs before they are subtracted.
        elements += kv + 2 * d
    return elements


def _gate_up_elements(model: ModelConfig) -> int:
    """gate_up of the dense MLP, or of every expert a token goes through."""
    experts = model.num_experts_per_token + model.num_shared_experts if model.is_moe else 1
    return 2 * model.expert_intermediate_size * experts


@dataclass(frozen=True)
class KeepAll:
    """Keep every operand: the fastest where memory is no limit."""

    name: str = "none"

    def run(self, block, x, residual, *args):
        """Run the block with every matmul operand kept."""
        return block(x, residual, *args, rebuild=False)

    def kept_elements(self, model: ModelConfig) -> int:
        """2 residuals, 2 normed inputs, qkv, attention out, gate_up, swiglu out."""
        gate_up = _gate_up_elements(model)
        return 4 * model.hidden_size + _attention_elements(model) + gate_up + gate_up // 2


@dataclass(frozen=True)
class Selective:
    """Rebuild norms and SwiGLU in backward: memory-bound work, no matmul twice."""

    name: str = "selective"

    def run(self, block, x, residual, *args):
        """Run the block with its cheap operands rebuilt in backward."""
        return block(x, residual, *args, rebuild=True)

    def kept_elements(self, model: ModelConfig) -> int:
        """2 residuals, qkv, attention out, gate_up; routing also keeps its normed input."""
        routed_input = model.hidden_size if model.is_moe else 0
        return (
            2 * model.hidden_size
            + routed_input
            + _attention_elements(model)
            + _gate_up_elements(model)
        )


@dataclass(frozen=True)
class Full:
    """Keep the block's input only and run the whole block again: +28% arithmetic for option a."""

    name: str = "full"

    def run(self, block, x, residual, *args):
        """Run the block under torch's non-reentrant checkpoint."""
        from torch.utils.checkpoint import checkpoint

        # One summed stream is kept instead of the branch and the residual apart.
        stream = x if residual is None else x + residual
        return checkpoint(
            block, stream, None, *args, rebuild=True, use_reentrant=False, preserve_rng_state=False
        )

    def kept_elements(self, model: ModelConfig) -> int:
        """The block's input."""
        return model.hidden_size


NONE, SELECTIVE, FULL = KeepAll(), Selective(), Full()


def parse(text: str, num_layers: int) -> tuple[Policy, ...] | None:
    """Read `--recompute`: one policy per layer, or None for `auto`.

    `none`, `selective`, `full`, or `full:N`: the first N layers full, the rest selective.

    Raises:
        UserError: an unknown name, or more layers than the model has.
    """
    if text == "auto":
        return None
    name, _, count = text.partition(":")
    policies = {policy.name: policy for policy in (NONE, SELECTIVE, FULL)}
    if name not in policies or (count and name != "full"):
        raise UserError(
            f"--recompute {text} is not one of auto, none, selective, full, "
            "or full:N (N layers full, the rest selective)"
        )
    if not count:
        return (policies[name],) * num_layers
    if not count.isdecimal() or int(count) > num_layers:
        raise UserError(f"--recompute {text}: N must be between 0 and --num-layers {num_layers}")
    return mixed(int(count), num_layers)


def mixed(full_layers: int, num_layers: int) -> tuple[Policy, ...]:
    """The first `full_layers` layers full, the rest selective."""
    return (FULL,) * full_layers + (SELECTIVE,) * (num_layers - full_layers)


def describe(policies: Sequence[Policy]) -> str:
    """`selective`, or for a mix the form that `parse` reads."""
    names = {policy.name for policy in policies}
    if len(names) == 1:
        return policies[0].name
    return f"full:{sum(policy.name == 'full' for policy in policies)}"


@dataclass(frozen=True)
class MemoryAccount:
    """Bytes a training step holds at its peak, by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """kept from forward to backward, all layers"""
    working_set: int
    """of the block whose backward runs: what it rebuilds and the gradients it forms"""
    loss: int

    @property
    def total(self) -> int:
        """Peak bytes: the loss and the blocks' backward never hold their working set together."""
        resident = self.weights + self.gradients + self.optimizer + self.activations
        return resident + max(self.working_set, self.loss)

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("block in backward or loss", max(self.working_set, self.loss)),
        )
        return (
            " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
            + f" = {self.total / GIB:.2f} GiB"
        )


def account(
    model: ModelConfig,
    policies: Sequence[Policy],
    *,
    micro_batch_tokens: int,
    precision: str,
    accumulate: bool,
    fused: bool,
) -> MemoryAccount:
    """Bytes of a training step.

    Args:
        model: shape.
        policies: one per layer.
        micro_batch_tokens: tokens of one forward and backward pass.
        precision: "bf16" (fp32 masters) or "fp32".
        accumulate: more than one micro-batch a step, so gradients are also summed in fp32.
        fused: the Triton kernels, whose loss holds the logits of one chunk at a time.
    """
    size = _DTYPE_BYTES[precision]
    parameters = model.num_parameters()
    masters = 4 if precision == "bf16" else 0
    d, tokens = model.hidden_size, micro_batch_tokens
    kept = sum(policy.kept_elements(model) for policy in policies)
    # Softmax statistics of attention, fp32 per query head; full blocks compute them again.
    statistics = 4 * model.num_attention_heads * sum(policy.name != "full" for policy in policies)
    # Gradients of gate_up and of its operand live beside the rebuilt operand; a full block also
    # holds its own recomputed activations.
    working = 2 * _gate_up_elements(model) + 2 * d
    if any(policy.name == "full" for policy in policies):
        working += SELECTIVE.kept_elements(model)
    head_gradient = 4 * model.vocab_size * d
    if fused:
        chunk = min(tokens, loss_chunk(model.vocab_size, tokens, size))
        loss = chunk * model.vocab_size * size + head_gradient
        loss += tokens * d * size
    else:
        # Logits, their fp32 copy for the softmax, its log-probabilities and their gradient.
        loss = tokens * model.vocab_size * (2 * size + 8) + head_gradient
    return MemoryAccount(
        weights=parameters * size,
        gradients=parameters * (size + (4 if accumulate and precision == "bf16" else 0)),
        optimizer=parameters * (8 + masters),
        activations=tokens * (kept * size + statistics + 3 * d * size),
        working_set=tokens * working * size,
        loss=loss,
    )


def loss_chunk(vocab_size: int, tokens: int, element_size: int = 2) -> int:
    """Tokens whose logits the fused loss holds at a time: `cross_entropy.default_chunk_size`.

    Said again here, because that module needs torch; a test keeps the two equal.
    """
    most = int(0.4 * GIB) // (vocab_size * element_size) // 128 * 128
    chunks = max(1, math.ceil(tokens / max(128, most)))
    return math.ceil(math.ceil(tokens / chunks) / 128) * 128


@dataclass(frozen=True)
class MemoryPlan:
    """The policies and micro-batch of a run, with the sum that led to them."""

    policies: tuple[Policy, ...]
    micro_batch_size: int
    account: MemoryAccount

    def __str__(self) -> str:
        return (
            f"recompute {describe(self.policies)}, micro-batch {self.micro_batch_size}: "
            f"{self.account}"
        )


def choose(
    model: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    precision: str,
    fused: bool,
    budget: int,
    policies: tuple[Policy, ...] | None = None,
    micro_batch_size: int | None = None,
    max_micro_batch_tokens: int | None = None,
) -> MemoryPlan:
    """Fit a run into `budget` bytes: the fastest choice that fits by the account.

    Selective everywhere; else full on the fewest layers needed; else a smaller micro-batch with
    accumulation. Without the fused kernels, which rebuild operands inside a pass that backward
    makes anyway, rebuilding costs passes of its own: there `none` comes first. What is given
    (`policies`, `micro_batch_size`) stays as given. `max_micro_batch_tokens` bounds what is chosen,
    as far as one sequence allows.

    Raises:
        UserError: not even one sequence with every block recomputed fits.
    """
    most = max(1, (max_micro_batch_tokens or batch_size * seq_len) // seq_len)
    micro_batches = (
        [micro_batch_size]
        if micro_batch_size
        else [size for size in range(min(most, batch_size), 0, -1) if batch_size % size == 0]
    )
    layers = model.num_layers
    if policies is not None:
        candidates = [policies]
    elif model.gradient_checkpointing:
        candidates = [mixed(full_layers, layers) for full_layers in range(layers + 1)]
        if not fused:
            candidates.insert(0, (NONE,) * layers)
    else:
        candidates = [(NONE,) * layers]
    plan = None
    for size in micro_batches:
        for candidate in candidates:
            plan = MemoryPlan(
                candidate,
                size,
                account(
                    model,
                    candidate,
                    micro_batch_tokens=size * seq_len,
                    precision=precision,
                    accumulate=size < batch_size,
                    fused=fused,
                ),
            )
            if plan.account.total <= budget:
                return plan
    if micro_batch_size and policies is not None:
        # Both were given: the user decides, and the account is only shown.
        return plan
    raise UserError(
        f"--vram-budget {budget / GIB:.1f} GiB is too small: the least this model needs is "
        f"{plan.account.total / GIB:.1f} GiB ({plan})"
    )
