"""The memory account says what a step keeps, what it computes again, and what both cost.

A policy says how many bytes one block keeps. `choose` fits a run into a memory budget by that
account alone, so `hamner.plan` can say beforehand what a run will take, without torch;
`hamner.model.recompute` runs a block by its policy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hamner.config.model import ModelConfig
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.hardware import GIB
from hamner.plan import costs
from hamner.plan.communication import ONE_GPU, Parallelism


@dataclass(frozen=True)
class Policy:
    """A policy is how much of one block is kept until its backward pass.

    `none` keeps every operand: the fastest where memory is no limit. `selective` recomputes the
    cheap operands (the normed inputs and the SwiGLU output) inside the backward of the matmul that
    reads them: memory-bound work, no matmul twice. `full` keeps the block's input and runs the
    block again (Chen et al. 2016, arXiv:1604.06174): +28% arithmetic for option a.
    """

    name: str

    def kept_bytes(self, model: ModelConfig, element_size: int, *, fused: bool) -> int:
        """A block keeps this many bytes a token until its backward pass.

        Args:
            model: shape.
            element_size: bytes of the compute dtype.
            fused: whether the Triton kernels run, or their plain references, whose norms and SwiGLU
                also keep fp32 intermediates.
        """
        if self == FULL:
            return model.hidden_size * element_size
        how = {"fused": fused, "recompute": self == SELECTIVE}
        kept = 2 * costs.norm_kept(model.hidden_size, element_size, **how)
        kept += costs.attention_kept(model, element_size, **how)
        kept += costs.swiglu_kept(costs.dense_width(model), element_size, **how)
        return kept + (costs.experts_kept(model, element_size, **how) if model.is_moe else 0)


class DoesNotFit(UserError):
    """A run takes more memory than its budget, even with every block recomputed one sequence at a
    time, or as far as what was given allows."""


NONE, SELECTIVE, FULL = Policy("none"), Policy("selective"), Policy("full")


def parse(text: str, num_layers: int) -> tuple[Policy, ...] | None:
    """The function reads `--recompute`: one policy per layer, or None for `auto`.

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
    """The first `full_layers` layers are full, the rest selective."""
    return (FULL,) * full_layers + (SELECTIVE,) * (num_layers - full_layers)


def describe(policies: Sequence[Policy]) -> str:
    """The policies read `selective`, or for a mix what `parse` reads."""
    if len(set(policies)) == 1:
        return policies[0].name
    return f"full:{policies.count(FULL)}"


@dataclass(frozen=True)
class MemoryAccount:
    """An account has the bytes of a training step on one GPU, by kind."""

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
    update: int = 0
    """what the optimizer holds beside the gradients"""
    communication: int = 0
    """with DDP the buckets that all gradients are formed and reduced in; with FSDP the weights and
    gradients that are whole: the embedding's, those of a block and of the next one"""

    @property
    def total(self) -> int:
        """The peak is that of the loss, of the backward pass, or of the update."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts are what is held at the peak, by name; they add up to `total`."""
        parts = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "gradient sums": self.gradient_sums,
            "communication": self.communication,
        }
        parts = {name: size for name, size in parts.items() if size}
        peaks = [
            {"activations": self.activations, "loss": self.loss},
            {"activations and gradients in backward": self.backward},
            {"gradients": self.gradients, "update": self.update},
        ]
        peak = max(peaks, key=lambda held: sum(held.values()))
        return parts | {name: size for name, size in peak.items() if size}

    def __str__(self) -> str:
        parts = " + ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts().items())
        return f"{parts} = {self.total / GIB:.2f} GiB"


def account(
    config: TrainConfig,
    policies: Sequence[Policy],
    micro_batch_size: int,
    *,
    precision: str = "bf16",
    fused: bool = True,
    parallelism: Parallelism = ONE_GPU,
) -> MemoryAccount:
    """The account is of the bytes of a training step on each GPU.

    Args:
        config: model and batch, over all GPUs; where that is more than one micro-batch of each,
            gradients are also summed in fp32.
        policies: one per layer.
        micro_batch_size: sequences of one forward and backward pass of a GPU.
        precision: "bf16" (fp32 masters, split under `fused`) or "fp32".
        fused: the Triton kernels, or their plain references.
        parallelism: `kind` "ddp" or "fsdp" where there is more than one GPU.
    """
    model, tokens = config.model, micro_batch_size * config.seq_len
    accumulate = micro_batch_size * parallelism.ranks < config.batch_size
    size = costs.BF16 if precision == "bf16" else costs.FP32
    parameters, shards = model.num_parameters(), parallelism.shards
    # Of these, gradients are formed from the head to the first block.
    head, block = model.vocab_size * model.hidden_size, model.num_parameters_per_layer()
    gradient_size = costs.FP32 if shards > 1 else size
    communication, gradients = 0, parameters * gradient_size // shards
    if shards > 1:
        heads = 1 if model.tie_word_embeddings else 2
        communication = 2 * (heads * head + 2 * block) * size
        if not parallelism.reshard:
            communication += parameters * size
    elif parallelism.ranks > 1:
        # Every gradient is a view of a bucket, and the buckets stay.
        communication, gradients = gradients, 0
        head = block = 0

    peak = held = 0
    for layer, policy in enumerate(policies):
        held += tokens * policy.kept_bytes(model, size, fused=fused)
        formed = (head + (len(policies) - 1 - layer) * block) * gradient_size // shards
        working = tokens * _backward_bytes(model, policy, size, fused=fused, matmul=config.matmul)
        peak = max(peak, held + formed + working)
    # After the last block: a norm and the head, which in plain torch keeps its operand as well.
    tail = costs.norm_kept(model.hidden_size, size, fused=fused, recompute=False)
    tail += 0 if fused else model.hidden_size * size
    return MemoryAccount(
        weights=parameters * size // shards,
        optimizer=_optimizer_bytes(config, precision, is_split=fused or shards > 1) // shards,
        gradient_sums=parameters * 4 if accumulate and shards == 1 else 0,
        gradients=gradients,
        update=costs.muon_held(model, size) if config.optimizer == "muon" else 0,
        activations=held + tokens * tail,
        loss=costs.loss_held(model, tokens, size, fused=fused),
        backward=peak,
        communication=communication,
    )


def _optimizer_bytes(config: TrainConfig, precision: str, *, is_split: bool) -> int:
    """Masters and fp32 moments, of which Muon's matrices have one, are this many bytes.

    Of a split master only the int16 remainder is held beside the bf16 weight. A shard is fp32, as
    its gradient is, which adds up by itself.
    """
    masters = (2 if is_split else 4) if precision == "bf16" else 0
    held = config.model.num_parameters() * (8 + masters)
    return held - (4 * costs.hidden_parameters(config.model) if config.optimizer == "muon" else 0)


def _backward_bytes(
    model: ModelConfig, policy: Policy, size: int, *, fused: bool, matmul: str = "bf16"
) -> int:
    """A block's backward pass holds this many bytes a token beside what was kept for it."""
    d, routed = model.hidden_size, costs.routed_width(model)
    # The MLP is the widest: gradient of its result, recomputed operand, gradient of gate_up.
    working = (2 * d + 3 * max(costs.dense_width(model), routed)) * size
    if matmul != "bf16" and not model.is_moe:
        working = max(working, _int8_backward_bytes(model, size, matmul))
    if routed:
        # A row of x's gradient from each expert, what they add up to, and x itself, recomputed.
        working += (model.num_experts_per_token + 2) * d * size
    if not fused:
        # fp32 intermediates again, and gradients of each.
        working += 2 * NONE.kept_bytes(model, size, fused=False)
    if policy == FULL:
        working += SELECTIVE.kept_bytes(model, size, fused=fused)
    return working


def _int8_backward_bytes(model: ModelConfig, size: int, matmul: str) -> int:
    """A dense MLP's int8 backward pass holds this many bytes a token where it holds most, at the
    gradient of down's weight or of gate_up's; weights in int8 are too few to count."""
    d, inner = model.hidden_size, model.expert_intermediate_size
    # Gradients of the result, with int8 of it, and of the stream, recomputed operand, and gradient
    # of gate_up with int8 of it; with int8-all, int8 of what the product takes.
    down = (2 * d + 3 * inner) * size + d + 2 * inner
    # What was kept for SwiGLU is still there (norm_mlp.py is one op), its operand is not; there are
    # the norm's operand and the gradient of its input, with int8 of it.
    gate_up = (4 * d + 2 * inner) * size + d + 2 * inner
    if matmul == "int8-all":
        down, gate_up = down + d + inner, gate_up + d + 2 * inner
    return max(down, gate_up)


def evaluation_bytes(model: ModelConfig, tokens: int, precision: str, *, fused: bool) -> int:
    """A forward pass without gradients holds at most this many bytes beside the weights: the
    residual, and the operands of one block or what the loss holds."""
    size = costs.BF16 if precision == "bf16" else costs.FP32
    block = tokens * NONE.kept_bytes(model, size, fused=fused)
    loss = costs.loss_held(model, tokens, size, fused=fused)
    return 2 * tokens * model.hidden_size * size + max(block, loss)


@dataclass(frozen=True)
class MemoryPlan:
    """A memory plan has a run's policies and micro-batch, with the sum that led to them."""

    policies: tuple[Policy, ...]
    micro_batch_size: int
    account: MemoryAccount

    def __str__(self) -> str:
        how = f"recompute {describe(self.policies)}, micro-batch {self.micro_batch_size}"
        return f"{how}: {self.account}"


def choose(
    config: TrainConfig,
    budget: int,
    *,
    precision: str = "bf16",
    fused: bool = True,
    policies: tuple[Policy, ...] | None = None,
    max_micro_batch_tokens: int | None = None,
    parallelism: Parallelism = ONE_GPU,
) -> MemoryPlan:
    """`choose` fits a run into `budget` bytes of each GPU, by the account: the first of these
    that fits.

    Selective everywhere; else full on the fewest layers needed; else a smaller micro-batch with
    accumulation. What is given (`policies`, `config.micro_batch_size`) stays as given.
    `max_micro_batch_tokens` bounds what is chosen, as far as one sequence allows.

    Raises:
        DoesNotFit: nothing that `choose` may take fits.
        UserError: the GPUs cannot share the batch evenly, or FSDP2 is to train with int8.
    """
    if config.matmul != "bf16" and parallelism.kind == "fsdp" and parallelism.ranks > 1:
        raise UserError(
            f"--matmul {config.matmul} trains with --parallel ddp only, and fsdp is asked for or "
            "what the memory needs; use --matmul bf16, or --parallel ddp and a smaller "
            "--micro-batch-size"
        )
    rows = parallelism.rows_per_gpu(config.batch_size)
    bound = max(1, (max_micro_batch_tokens or rows * config.seq_len) // config.seq_len)
    sizes = [size for size in range(min(bound, rows), 0, -1) if rows % size == 0]
    if config.micro_batch_size:
        sizes = [config.micro_batch_size]
    layers = config.model.num_layers
    candidates = [mixed(full_layers, layers) for full_layers in range(layers + 1)]
    if not config.model.gradient_checkpointing:
        candidates = [(NONE,) * layers]
    elif not fused:
        # Triton kernels recompute operands inside a pass that backward makes anyway; elsewhere
        # recomputing costs passes of its own.
        candidates.insert(0, (NONE,) * layers)
    if policies:
        candidates = [policies]
    how = {"precision": precision, "fused": fused, "parallelism": parallelism}
    for size in sizes:
        for candidate in candidates:
            plan = MemoryPlan(candidate, size, account(config, candidate, size, **how))
            if plan.account.total <= budget:
                return plan
    if config.micro_batch_size and policies:
        # Both were given: the user decides, and the account is only shown.
        return plan
    raise DoesNotFit(
        f"--vram-budget {budget / GIB:.4g} GiB is too small: the least this model needs is "
        f"{plan.account.total / GIB:.1f} GiB ({plan})"
    )
