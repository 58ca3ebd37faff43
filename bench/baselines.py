"""Hamner is measured against these trainers, each as its users have it, on equal terms.

Equal are: initial weights, batches (the real loader's), AdamW with fp32 state, weight decay on
matrices, clipping at 1.0, bf16 compute with fp32 weights (Hamner: bf16 weights with fp32 masters),
one pass over the whole batch where memory allows. Before anything is timed, the gradients of one
whole batch are compared with those of a plain fp32 model (`gradient_error`), which may be missed by
twice what a plain model in the compute dtype misses them by.

    Hamner        hamner.train.step.TrainStep, the step as it trains
    Plain         a plain torch model; torch.compile around all of it, or around each block with a
                  chunked loss and an activation memory budget
    HuggingFace   transformers' Llama or Mixtral, with or without Liger's kernels
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bench import scale
from hamner.config.model import ModelConfig
from hamner.config.train import TrainConfig
from hamner.data.batch import IGNORED_TARGET, Batch
from hamner.export.hf import to_hugging_face
from hamner.model.attention import AttentionShape, get_attention
from hamner.model.ops import build_ops
from hamner.model.transformer import RMSNorm, Transformer
from hamner.profile.steps import LR
from hamner.train.optimizer import EPS
from hamner.train.step import TrainStep

WEIGHT_DECAY, GRAD_CLIP = 0.1, 1.0
MAX_ERROR_RATIO = 2.0
"""times the error of plain torch in the same dtype, as for a kernel. That error is a few percent of
dense gradients, more with more layers, and more than that with experts: bf16 sends tokens between
two nearly equal ones to the other one. Another RoPE or epsilon is more than 60% off"""
ERROR_FLOOR = 1e-4
"""where plain torch is the reference itself: in fp32, sums in another order"""
SHARPENING = 2.0
"""times the initial weights, while gradients are compared"""
REFERENCE_ROWS = 2
"""of one pass of the fp32 reference, which holds its logits whole"""
LOSS_CHUNK = 4096
"""tokens whose logits the chunked loss holds"""


class Contender(Protocol):
    """A contender is a trainer that is built and takes steps."""

    def step(self, batch: Batch) -> object:
        """The method takes one optimizer step on a whole batch, without waiting for the GPU."""
        ...

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """The method gives the gradients of the batch's mean loss by the contender's own names, and
        changes no weight."""
        ...

    def named(self, model: Transformer) -> Mapping[str, Tensor]:
        """The method gives a Hamner model's parameters under the contender's names."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """The method gives what forward and backward read."""
        ...

    def close(self) -> None:
        """The method frees what it holds."""
        ...


def plain_model(config: ModelConfig) -> Transformer:
    """The function gives Hamner's model on plain torch operations, with its initial weights, in
    fp32."""
    shape = AttentionShape.of_model(
        config,
        device=torch.device(scale.device()),
        dtype=torch.float32,
        seq_len=config.max_seq_len,
        micro_batch_size=REFERENCE_ROWS,
    )
    attention = get_attention("sdpa", shape)
    with torch.device("meta"):
        model = Transformer(config, build_ops("torch", attention))
    model.to_empty(device=scale.device())
    model.load_state_dict(_initial_weights(config))
    return model


@functools.cache
def _initial_weights(config: ModelConfig) -> dict[str, Tensor]:
    """The function draws them once for all trainers of a shape, on the CPU as Hamner's trainer
    does."""
    with torch.device("meta"):
        model = Transformer(config, ops=None)
    model.to_empty(device="cpu")
    model.initialize(TrainConfig.seed)
    return model.state_dict()


class Reference:
    """A reference has the gradients of a batch in fp32, and how far plain torch in the compute
    dtype is from them.

    Args:
        config: shape.
        batch: whole.

    Attributes:
        max_error: what a contender's `error_of` may be.
    """

    def __init__(self, config: ModelConfig, batch: Batch) -> None:
        self.batch = batch
        # Waits outside the GPU's memory for the contenders.
        self.gradients = plain_gradients(config, batch, torch.float32).to("cpu")
        rounded = plain_gradients(config, batch, scale.dtype())
        names = dict(self.gradients.named_parameters())
        error = _distance(names, dict(rounded.named_parameters()))
        self.max_error = max(MAX_ERROR_RATIO * error, ERROR_FLOOR)

    def error_of(self, contender: Contender) -> float:
        """The method gives the distance of a contender's gradients from the reference, relative to
        its norm.

        Of every parameter by itself, then the root of the mean square: small gradients, such as
        those of queries and keys, count as much as the embedding's. One that is missing is 1 off.
        """
        with sharpened(contender.parameters()):
            theirs = contender.gradients(self.batch)
        return _distance(contender.named(self.gradients), theirs)


def plain_gradients(config: ModelConfig, batch: Batch, dtype: torch.dtype) -> Transformer:
    """The function gives a plain model's gradients of a batch, added up in fp32 a few rows at a
    time.

    Returns:
        A model that holds them as its parameters.
    """
    model = plain_model(config).to(dtype)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    rows = len(batch.inputs)
    with sharpened(model.parameters()):
        for start in range(0, rows, REFERENCE_ROWS):
            part = slice(start, start + REFERENCE_ROWS)
            inputs, targets = (x[part].to(scale.device()) for x in (batch.inputs, batch.targets))
            loss = model(inputs, targets).loss * (len(inputs) / rows)
            for total, gradient in zip(
                sums, torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                total += gradient
    for parameter, total in zip(model.parameters(), sums, strict=True):
        parameter.data = total
    return model


def _distance(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    squares = []
    for name, reference in expected.items():
        reference = reference.detach().to(scale.device())
        difference = found[name].detach().float() - reference if name in found else reference
        squares.append((difference.norm() / reference.norm()).square().item())
    return (sum(squares) / len(squares)) ** 0.5


@contextlib.contextmanager
def sharpened(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Matrices are larger for as long as it is open.

    With the initial weights attention is nearly uniform, and a model without RoPE would hardly
    differ. A power of two is undone exactly.
    """
    matrices = [p.data for p in parameters if p.ndim >= 2]
    torch._foreach_mul_(matrices, SHARPENING)
    try:
        yield
    finally:
        torch._foreach_mul_(matrices, 1 / SHARPENING)


class Hamner:
    """This contender is the project's own training step.

    Args:
        config: the run, with its batch and its memory budget.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.train_step = TrainStep(config, may_step_down=False)

    def step(self, batch: Batch) -> object:
        """The step is that of the training loop."""
        return self.train_step.step(batch, LR)

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """The gradients are those that the optimizer would be given: the step is dropped there."""
        optimizer = self.train_step.optimizer
        found: dict[str, Tensor] = {}

        def keep_and_drop(done: int, total: int) -> bool:
            if done == total:
                gradients = optimizer.accumulated or {
                    name: parameter.grad for name, parameter in optimizer.parameters.items()
                }
                found.update({name: gradient.clone() for name, gradient in gradients.items()})
            return done == total

        self.train_step.step(batch, LR, keep_and_drop)
        return found

    def named(self, model: Transformer) -> Mapping[str, Tensor]:
        """The names are its own."""
        return dict(model.named_parameters())

    def parameters(self) -> Iterable[Tensor]:
        """The weights in the compute dtype; their fp32 masters play no part in gradients."""
        return self.train_step.model.parameters()

    def close(self) -> None:
        """The method drops the model."""
        self.train_step.close()
        self.train_step = None


class TorchTrainer:
    """The trainer is the usual loop: fp32 weights, autocast, PyTorch's fused AdamW.

    Args:
        model: fp32, on the device.
        loss: (inputs, targets) -> loss to differentiate.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.loss = model, loss
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=LR,
            betas=(TrainConfig.beta1, TrainConfig.beta2),
            eps=EPS,
            fused=True,
        )

    def backward(self, batch: Batch) -> Tensor:
        """The method leaves the gradients of a batch in the parameters and returns its loss."""
        inputs, targets = (
            x.to(scale.device(), non_blocking=True) for x in (batch.inputs, batch.targets)
        )
        with torch.autocast(scale.device(), torch.bfloat16, enabled=not scale.SMOKE):
            loss = self.loss(inputs, targets)
        loss.backward()
        return loss.detach()

    def step(self, batch: Batch) -> object:
        """The method goes forward and backward, clips and updates."""
        loss = self.backward(batch)
        nn.utils.clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients(self, batch: Batch) -> dict[str, Tensor]:
        """The method gives them by the model's names."""
        self.backward(batch)
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def parameters(self) -> Iterable[Tensor]:
        """The parameters are the model's."""
        return self.model.parameters()

    def close(self) -> None:
        """The method drops the model and what was compiled for it."""
        self.model = self.loss = self.optimizer = None
        torch.compiler.reset()


class Plain(TorchTrainer):
    """This trainer has a plain model as one would write it, with Hamner's names, and torch.compile.

    Args:
        config: dense shape.
        memory_budget: None compiles the whole model with one loss over all logits. A number from 0
            to 1 is torch._functorch's activation memory budget (1 keeps what the backward pass
            needs, 0 recomputes all of it), with each block compiled and the loss in chunks.
    """

    def __init__(self, config: ModelConfig, memory_budget: float | None = None) -> None:
        with torch.device(scale.device()):
            model = PlainModel(config, chunked_loss=memory_budget is not None)
        model.load_state_dict(_initial_weights(config))
        if memory_budget is None:
            loss = scale.compiled(model)
        else:
            # Read when the blocks are compiled, at the first step.
            functorch_config.activation_memory_budget = memory_budget
            for layer in model.layers:
                layer.compile(dynamic=False, backend="eager" if scale.SMOKE else "inductor")
            loss = model
        super().__init__(model, loss)

    def named(self, model: Transformer) -> Mapping[str, Tensor]:
        """The method gives Hamner's names."""
        return dict(model.named_parameters())

    def close(self) -> None:
        """The model goes, and the memory budget is given back."""
        super().close()
        functorch_config.activation_memory_budget = 1.0


class PlainBlock(nn.Module):
    """A block is attention, then SwiGLU, each behind an RMSNorm and a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.expert_intermediate_size
        self.config = config
        self.attention = nn.ModuleDict(
            {
                "norm": RMSNorm(d, config.rms_norm_eps),
                "qkv_proj": nn.Linear(d, config.qkv_size, bias=False),
                "o_proj": nn.Linear(d, d, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "norm": RMSNorm(d, config.rms_norm_eps),
                "gate_up_proj": nn.Linear(d, 2 * inner, bias=False),
                "down_proj": nn.Linear(inner, d, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The block maps (B, T, D) to (B, T, D)."""
        config, attention, mlp = self.config, self.attention, self.mlp
        heads, kv_heads = config.num_attention_heads, config.num_kv_heads
        qkv = attention["qkv_proj"](normed(x, attention["norm"]))
        qkv = qkv.unflatten(-1, (-1, config.head_size)).transpose(1, 2)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attention["o_proj"](out.transpose(1, 2).flatten(-2))
        gate, up = mlp["gate_up_proj"](normed(x, mlp["norm"])).chunk(2, dim=-1)
        return x + mlp["down_proj"](functional.silu(gate) * up)


class PlainModel(nn.Module):
    """The model has an embedding, blocks, a norm and a tied head, and gives the mean
    cross-entropy."""

    def __init__(self, config: ModelConfig, *, chunked_loss: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.chunked_loss = chunked_loss
        exponent = torch.arange(0, config.head_size, 2).double() / config.head_size
        angles = torch.outer(
            torch.arange(config.max_seq_len).double(), config.rope_theta**-exponent
        )
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The model maps (B, T) tokens and what each should predict to the mean cross-entropy."""
        length = inputs.shape[1]
        # The residual stream in the compute dtype, as autocast leaves the embedding in fp32.
        x = self.embed(inputs).to(scale.dtype())
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        hidden, targets = normed(x, self.norm).flatten(0, 1), targets.flatten()
        if not self.chunked_loss:
            return functional.cross_entropy(
                functional.linear(hidden, self.embed.weight).float(),
                targets,
                ignore_index=IGNORED_TARGET,
            )
        total = sum(
            checkpoint(sum_of_losses, part, self.embed.weight, wanted, use_reentrant=False)
            for part, wanted in zip(
                hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True
            )
        )
        return total / (targets != IGNORED_TARGET).sum()


def sum_of_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The function gives cross-entropies of some tokens, added up."""
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET, reduction="sum")


def normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """The function is RMSNorm with fp32 statistics, in x's dtype."""
    return functional.rms_norm(x.float(), norm.weight.shape, norm.weight, norm.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The function is RoPE, half-rotation: x (B, H, T, hd), tables (T, hd / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


class HuggingFace(TorchTrainer):
    """This trainer has transformers' Llama, or Mixtral with its grouped_mm experts, eager, with
    SDPA.

    Args:
        config: shape.
        liger: patch Liger's kernels in, as its users do.
    """

    def __init__(self, config: ModelConfig, *, liger: bool = False) -> None:
        import transformers

        kind = "Mixtral" if config.is_moe else "Llama"
        shape = {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_kv_heads,
            "intermediate_size": config.expert_intermediate_size,
            "max_position_embeddings": config.max_seq_len,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "attn_implementation": "sdpa",
            "use_cache": False,
        }
        if config.is_moe:
            shape |= {
                "num_local_experts": config.num_experts,
                "num_experts_per_tok": config.num_experts_per_token,
                "sliding_window": None,
                "experts_implementation": "grouped_mm",
                "output_router_logits": True,
                "router_aux_loss_coef": config.router_aux_loss_coef,
            }
        hf_config = getattr(transformers, f"{kind}Config")(**shape)
        with torch.device(scale.device()):
            model = getattr(transformers, f"{kind}ForCausalLM")(hf_config)
        missing, unexpected = model.load_state_dict(self.named(plain_model(config)), strict=False)
        tied = ["lm_head.weight"] if config.tie_word_embeddings else []
        if missing != tied or unexpected:
            raise RuntimeError(f"transformers' {kind} has other weights: {missing}, {unexpected}")
        model.train()
        self._patches = contextlib.ExitStack()
        if liger:
            self._patches.enter_context(_patched_by_liger(model))
        # They shift labels themselves, unless the call says that it is done.
        super().__init__(
            model, lambda inputs, targets: model(inputs, labels=targets, shift_labels=targets).loss
        )

    def named(self, model: Transformer) -> Mapping[str, Tensor]:
        """The method gives transformers' names."""
        weights = dict(model.named_parameters())
        named = to_hugging_face(model.config, weights)
        if model.config.is_moe:
            # Published one by one, but packed in memory, as ours are.
            named = {k: v for k, v in named.items() if ".block_sparse_moe." not in k}
            for layer in range(model.config.num_layers):
                ours, theirs = f"layers.{layer}.mlp", f"model.layers.{layer}.mlp"
                named[f"{theirs}.gate.weight"] = weights[f"{ours}.router.weight"]
                named[f"{theirs}.experts.gate_up_proj"] = weights[f"{ours}.gate_up_weight"]
                named[f"{theirs}.experts.down_proj"] = weights[f"{ours}.down_weight"]
        return named

    def close(self) -> None:
        """The model goes, and with it Liger's patches of transformers' modules."""
        self._patches.close()
        super().close()


@contextlib.contextmanager
def _patched_by_liger(model: nn.Module) -> Iterator[None]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    # It also replaces functions and classes of the module, for every model after this one.
    before = dict(vars(modeling_llama))
    apply_liger_kernel_to_llama(model=model)
    try:
        yield
    finally:
        vars(modeling_llama).update(before)
