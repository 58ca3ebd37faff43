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

from hamner.config.model import ModelConfig
from hamner.errors import UserError
from hamner.hardware import GIB
from hamner.plan.communication import ONE_GPU, Parallelism

if TYPE_CHECKING:
    import torch

_DTYPE_BYTES = {"bf16": 2, "fp32": 4}


class Policy(Protocol):
    """How one block is run, and the activations it keeps until its backward pass."""

    name: str

    def run(self, block: Callable, x: "torch.Tensor", residual: "torch.Tensor | None", *args):
        """Run `block(x, residual, *args, rebuild=...)`; returns what the block returns."""
        ...

    def kept_bytes(self, model: ModelConfig, element_size: int, *, fused: bool) -> int:
        """Bytes kept per token and layer.

        Args:
            model: shape.
            element_size: bytes of the compute dtype.
            fused: whether the Triton kernels run, or their plain references, whose norms and SwiGLU
                also keep fp32 intermediates.
        """
        ...


def _attention_bytes(model: ModelConfig, size: int, *, fused: bool) -> int:
    """qkv, the attention output and its softmax statistics, and what the differential kind adds."""
    d, kv = model.hidden_size, model.num_kv_heads * model.head_size
    kept = ((d + 2 * kv) + d) * size + 4 * model.num_attention_heads
    if model.use_differential_attention:
        # Values of both halves side by side, the two maps' outputs, their difference; plain torch
        # keeps what the norm made of it in fp32 as well.
        kept += (kv + 3 * d) * size + (0 if fused else 4 * d)
    return kept


def _dense_width(model: ModelConfig) -> int:
    """Intermediate width of the MLP every token goes through: the dense one or the shared one."""
    if not model.is_moe:
        return model.expert_intermediate_size
    return model.expert_intermediate_size * model.num_shared_experts


def _routed_width(model: ModelConfig) -> int:
    """Intermediate width of all routed experts of a token together."""
    return model.expert_intermediate_size * model.num_experts_per_token if model.is_moe else 0


@dataclass(frozen=True)
class KeepAll:
    """Keep every operand: the fastest where memory is no limit."""

    name: str = "none"

    def run(self, block, x, residual, *args):
        """Run the block with every matmul operand kept."""
        return block(x, residual, *args, rebuild=False)

    def kept_bytes(self, model, element_size, *, fused):
        """2 residuals, 2 normed inputs, attention, gate_up, swiglu out."""
        d, size = model.hidden_size, element_size
        dense, routed = _dense_width(model), _routed_width(model)
        kept = 2 * d * size + _attention_bytes(model, size, fused=fused)
        if fused:
            return kept + (2 * d + 3 * (dense + routed)) * size
        # Norms keep input and result in fp32. SwiGLU keeps gate_up and silu in fp32, its result in
        # the compute dtype; of each expert also the gathered rows and its output, in both dtypes.
        norms = 2 * 2 * 4 * d
        experts = 4 * (4 * routed) + routed * size
        if model.is_moe:
            experts += 4 * d + model.num_experts_per_token * d * (4 + size)
        return kept + norms + (12 + size) * dense + experts


@dataclass(frozen=True)
class Selective:
    """Rebuild norms and SwiGLU in backward: memory-bound work, no matmul twice."""

    name: str = "selective"

    def run(self, block, x, residual, *args):
        """Run the block with its cheap operands rebuilt in backward."""
        return block(x, residual, *args, rebuild=True)

    def kept_bytes(self, model, element_size, *, fused):
        """2 residuals, attention, gate_up."""
        d, size = model.hidden_size, element_size
        kept = 2 * d * size + _attention_bytes(model, size, fused=fused)
        kept += 2 * _dense_width(model) * size
        if model.is_moe and fused:
            kept += 2 * _routed_width(model) * size
        elif model.is_moe:
            # The plain experts rebuild all. Before them a norm, which keeps the residual in fp32
            # instead, and the router, which keeps an fp32 copy of its input.
            kept += 3 * 4 * d
        return kept


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

    def kept_bytes(self, model, element_size, *, fused):
        """The block's input."""
        return model.hidden_size * element_size


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
    """Bytes of a training step on one GPU, by kind."""

    weights: int
    optimizer: int
    gradient_sums: int
    """fp32, where a step has more than one micro-batch"""
    gradients: int
    """of all parameters, as they are when backward ends"""
    activations: int
    """kept from forward to backward, all layers, as they are when the loss is computed"""
    loss: int
    """what the loss holds beside the activations"""
    backward: int
    """most that backward holds: activations still needed, gradients formed so far, and the block
    that is being differentiated"""
    communication: int = 0
    """with DDP the buckets that all gradients are formed and reduced in; with FSDP the weights and
    gradients that are whole: the embedding's, those of a block and of the next one"""

    @property
    def total(self) -> int:
        """Bytes at the peak: of the loss, of the backward pass, or of the update."""
        step = max(self.activations + self.loss, self.backward, self.gradients)
        return self.weights + self.optimizer + self.gradient_sums + self.communication + step

    def parts(self) -> dict[str, int]:
        """What is held at the peak, by name; adds up to `total`."""
        parts = {"weights": self.weights, "optimizer": self.optimizer}
        if self.gradient_sums:
            parts["gradient sums"] = self.gradient_sums
        if self.communication:
            parts["communication"] = self.communication
        if self.activations + self.loss >= max(self.backward, self.gradients):
            return parts | {"activations": self.activations, "loss": self.loss}
        if self.backward >= self.gradients:
            return parts | {"activations and gradients in backward": self.backward}
        return parts | {"gradients": self.gradients}

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts().items())
        return f"{parts} = {self.total / GIB:.2f} GiB"


def account(
    model: ModelConfig,
    policies: Sequence[Policy],
    *,
    micro_batch_tokens: int,
    precision: str,
    accumulate: bool,
    fused: bool,
    parallelism: Parallelism = ONE_GPU,
) -> MemoryAccount:
    """Bytes of a training step on each GPU.

    Args:
        model: shape.
        policies: one per layer.
        micro_batch_tokens: tokens of one forward and backward pass of a GPU.
        precision: "bf16" (fp32 masters, split under `fused`) or "fp32".
        accumulate: more than one micro-batch a step, so gradients are also summed in fp32.
        fused: the Triton kernels, or their plain references.
        parallelism: `kind` "ddp" or "fsdp" where there is more than one GPU.
    """
    size = _DTYPE_BYTES[precision]
    parameters = model.num_parameters()
    shards = parallelism.shards
    # Of a split master only the int16 remainder is held beside the bf16 weight. A shard is fp32, as
    # its gradient is, which adds up by itself.
    masters = (2 if fused or shards > 1 else 4) if precision == "bf16" else 0
    gradient_size = 4 if shards > 1 else size
    d, tokens = model.hidden_size, micro_batch_tokens
    kept = [tokens * policy.kept_bytes(model, size, fused=fused) for policy in policies]
    # After the last block: the norm's input and its result; plain torch keeps both in fp32 too.
    tail = tokens * d * (2 * size + (0 if fused else 8))
    embedding = model.vocab_size * d
    heads = 1 if model.tie_word_embeddings else 2
    layer_gradient = (parameters - heads * embedding - d) // model.num_layers * size
    head_gradient = embedding * size
    communication, gradients = 0, parameters * gradient_size // shards
    if shards > 1:
        communication = 2 * (heads * head_gradient + 2 * layer_gradient)
        if not parallelism.reshard:
            communication += parameters * size
    elif parallelism.ranks > 1:
        # Every gradient is a view of a bucket, and the buckets stay.
        communication, gradients = gradients, 0
        layer_gradient = head_gradient = 0

    most = held = 0
    for layer, policy in enumerate(policies):
        held += kept[layer]
        formed = head_gradient + (len(policies) - 1 - layer) * layer_gradient
        formed = formed * gradient_size // (size * shards)
        working = tokens * _backward_bytes(model, policy, size, fused=fused)
        most = max(most, held + formed + working)

    if fused:
        chunk = min(tokens, loss_chunk(model.vocab_size, tokens, size))
        # Logits of a chunk, the fp32 gradient of the head, the gradient of the hidden states.
        loss = chunk * model.vocab_size * size + 4 * embedding + tokens * d * size
    else:
        # In backward: the log-probabilities, their gradient and that of the logits, all in fp32.
        loss = tokens * model.vocab_size * 12
    return MemoryAccount(
        weights=parameters * size // shards,
        optimizer=parameters * (8 + masters) // shards,
        gradient_sums=parameters * 4 if accumulate and shards == 1 else 0,
        gradients=gradients,
        activations=sum(kept) + tail,
        loss=loss,
        backward=most,
        communication=communication,
    )


def _backward_bytes(model: ModelConfig, policy: Policy, size: int, *, fused: bool) -> int:
    """Bytes per token that a block's backward pass holds beside what was kept for it."""
    d, routed = model.hidden_size, _routed_width(model)
    # The MLP is the widest: gradient of its result, rebuilt operand, gradient of gate_up.
    working = (2 * d + 3 * max(_dense_width(model), routed)) * size
    if routed:
        # A row of x's gradient from each expert, what they add up to, and x itself, rebuilt.
        working += (model.num_experts_per_token + 2) * d * size
    if not fused:
        # fp32 intermediates again, and gradients of each.
        working += 2 * NONE.kept_bytes(model, size, fused=False)
    if policy.name == "full":
        working += SELECTIVE.kept_bytes(model, size, fused=fused)
    return working


def loss_chunk(vocab_size: int, tokens: int, element_size: int = 2) -> int:
    """Tokens whose logits the fused loss holds at a time: `cross_entropy.default_chunk_size`.

    Said again here, because that module needs torch; a test keeps the two equal.
    """
    most = int(0.35 * GIB) // (vocab_size * element_size) // 128 * 128
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
    parallelism: Parallelism = ONE_GPU,
) -> MemoryPlan:
    """Fit a run into `budget` bytes of each GPU: the fastest choice that fits by the account.

    Selective everywhere; else full on the fewest layers needed; else a smaller micro-batch with
    accumulation. Without the fused kernels, which rebuild operands inside a pass that backward
    makes anyway, rebuilding costs passes of its own: there `none` comes first. What is given
    (`policies`, `micro_batch_size`) stays as given. `max_micro_batch_tokens` bounds what is chosen,
    as far as one sequence allows.

    Raises:
        UserError: not even one sequence with every block recomputed fits, or the GPUs cannot share
            `batch_size` evenly.
    """
    batch_size = parallelism.rows_per_gpu(batch_size)
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
                    parallelism=parallelism,
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
