"""A step's time on a GPU is predicted by a roofline per op (Williams et al. 2009).

A step is a list of ops, each with its cost (`hamner.plan.costs`, bf16). An op takes the longer of
arithmetic and traffic, each at the share of the card's peak that its kind of kernel reaches. Those
shares are data, with their provenance, in `hamner.plan.efficiency`; whatever they were not measured
on is a projection. profiles/plan.md lists the real runs that the model is held against.

Left out, being below 1% of a step: the embedding's gather and scatter, the router's matmul, softmax
statistics. Not modelled: a data loader that cannot keep up, a card that throttles.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.config.train import TrainConfig
from hamner.hardware import GIB, GPUS, Gpu
from hamner.plan import costs
from hamner.plan.communication import (
    ONE_GPU,
    Communication,
    Parallelism,
    communicate,
    gather_updates,
)
from hamner.plan.costs import Cost
from hamner.plan.efficiency import Efficiency, efficiency
from hamner.plan.interval import Interval, find_interval
from hamner.plan.memory import FULL, NONE, Policy, account

CATEGORIES = (
    *("matmul", "attention", "norm", "swiglu", "rope", "routing", "loss", "optimizer", "gaps"),
    *("communication", "int8", "quantisation"),
)

INT8_PRODUCTS = {
    "bf16": (),
    "int8": ("forward", "data_gradient"),
    "int8-all": ("forward", "data_gradient", "weight_gradient"),
}
"""by --matmul, as hamner.kernels.int8_linear has it, said again for want of torch; a test keeps the
two equal"""

LAUNCH_GAP_US, GRAPH_GAP_US = 6.4, 3.3
"""what each kernel costs beside its work, launched by itself and inside a CUDA graph: 4.3 and 1.2
of idle GPU, measured in steps of option a on an H100, and 2.1 of multiprocessors that wait for the
kernel's last blocks, fitted to the steps in several micro-batches there and on an H200"""

ATTENTION_OUT, GATE_UP, DOWN = 1, 2, 3
"""among the linear layers of a block, qkv, o, gate_up and down"""
INT8_GROUPED = {"forward": (DOWN,), "data_gradient": (GATE_UP,), "weight_gradient": range(4)}
"""int8 matmuls whose operands have a scale each 256 elements: SwiGLU's result, the gradient of what
it takes, and all that is transposed by tokens"""

ATTENTION_LAUNCHES = {"forward": 1, "backward": 3}


@dataclass(frozen=True)
class Op:
    """An op is one kernel's work, or a few kernels' of the same kind."""

    kind: str
    """the efficiency it is held to; its first word is one of CATEGORIES"""
    cost: Cost
    launches: int = 1
    smallest_dim: int = 0
    """of a matmul's M, N and K; of attention the sequence length"""

    def seconds(self, gpu: Gpu, reached: Efficiency | None = None) -> float:
        """The op takes this long on `gpu`, launch gaps aside; arithmetic hides behind traffic or
        the other way round."""
        reached = reached or efficiency(gpu)
        arithmetic = reached.arithmetic_seconds(self.kind, self.cost.flops, self.smallest_dim, gpu)
        return max(arithmetic, reached.traffic_seconds(self.kind, self.cost.bytes, gpu))


def quantisation(
    product: str, tokens: int, shapes: Sequence[tuple[int, int]], *, by_norms: Sequence[int] = ()
) -> Op:
    """The operands of these int8 matmuls, (K, N) of qkv, o and perhaps gate_up and down, that
    nothing else quantises take passes of their own; and the error of each is measured on a sample,
    in a launch of its own in backward, which has all of them. `by_norms` are those whose gradient
    a norm's backward quantises as it writes it."""
    inputs, outputs = (tokens * sum(sizes) for sizes in zip(*shapes, strict=True))
    weights, launches = sum(k * n for k, n in shapes), 2 * len(shapes)
    if product == "forward":
        # Norm and SwiGLU write theirs; not attention, whose result is as wide as the first input.
        cost = costs.quantize_int8(weights + tokens * shapes[0][0])
        return Op("quantisation", cost, launches=launches + 1 - len(shapes))
    measured = (product,) if product == "weight_gradient" else ("forward", product)
    samples = sum((error_samples(p, tokens, shapes) for p in measured), Cost())
    launches += 2 * len(shapes) * len(measured)
    if product == "data_gradient":
        # Whole columns of weights have one scale: their maxima take another read and two launches.
        read_twice = [k * n for i, (k, n) in enumerate(shapes) if i not in INT8_GROUPED[product]]
        cost = costs.quantize_int8(weights + outputs) + Cost(bytes=sum(read_twice) * costs.BF16)
        launches += 2 * len(read_twice)
        if len(shapes) > GATE_UP and shapes[GATE_UP][1] % (2 * costs.INT8_GROUP) == 0:
            # SwiGLU's backward quantises gate_up's as it writes it, where no scale is for elements
            # of both halves.
            cost += Cost(bytes=-tokens * shapes[GATE_UP][1] * costs.BF16)
            launches -= 1
        cost += Cost(bytes=-tokens * sum(shapes[i][1] for i in by_norms) * costs.BF16)
        launches -= len(by_norms)
    else:
        cost = costs.quantize_int8(inputs + outputs)
    kind = "quantisation" if product != "weight_gradient" else "quantisation_transposed"
    return Op(kind, cost + samples, launches=launches)


def gradients_by_norms(model: ModelConfig) -> tuple[int, ...]:
    """Of these linear layers' results a norm's backward quantises the gradient, as
    hamner.model.int8 has it, said again for want of torch; a test keeps the two equal."""
    if model.is_moe:
        return ()
    return (ATTENTION_OUT,) if model.use_differential_attention else (ATTENTION_OUT, DOWN)


def error_samples(product: str, tokens: int, shapes: Sequence[tuple[int, int]]) -> Cost:
    """The errors of these int8 matmuls' operands are measured in every micro-batch."""
    samples = Cost()
    for number, (k, n) in enumerate(shapes):
        how = {"is_grouped": number in INT8_GROUPED[product]}
        if product == "forward":
            samples += costs.int8_error(tokens, k, **how)
            samples += costs.int8_error(n, k, **how)
        elif product == "data_gradient":
            samples += costs.int8_error(tokens, n, **how)
            samples += costs.int8_error(k, n, is_transposed=True, **how)
        else:
            for lines in (n, k):
                samples += costs.int8_error(lines, tokens, is_transposed=True, **how)
    return samples


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch has these ops with the Triton kernels; tests derive other trainers' from it."""

    model: ModelConfig
    seq_len: int
    tokens: int
    hidden_optimizer: str = "adamw"
    """of the hidden matrices"""
    arithmetic: str = "bf16"
    """of linear layers: bf16, int8 or int8-all"""
    is_graphed: ClassVar[bool] = True
    """one GPU replays forward and backward as a CUDA graph"""
    update: ClassVar[Cost] = costs.gradient_norm(1) + costs.adamw(1, split_master=True)
    """of one parameter: clip norm, AdamW, weight casts"""
    muon_update: ClassVar[Cost] = (
        costs.gradient_norm(1) + costs.muon_momentum(1) + costs.muon_apply(1, split_master=True)
    )
    """of one parameter: clip norm, momentum, weight casts"""

    @classmethod
    def of(cls, config: TrainConfig, size: int) -> "MicroBatch":
        """The method gives a run's micro-batch of `size` sequences."""
        tokens = size * config.seq_len
        how = {"hidden_optimizer": config.optimizer, "arithmetic": config.matmul}
        return cls(config.model, config.seq_len, tokens, **how)

    @property
    def by_muon(self) -> int:
        """Muon updates this many parameters."""
        return costs.hidden_parameters(self.model) if self.hidden_optimizer == "muon" else 0

    def matmul(self, k: int, n: int, kind: str = "matmul") -> Op:
        """Every token is a row of this matmul, whose int8 operands are quantised already."""
        cost = costs.matmul if kind == "matmul" else costs.int8_matmul
        return Op(kind, cost(self.tokens, k, n), smallest_dim=min(self.tokens, k, n))

    def block_matmuls(self, product: str = "forward") -> list[Op]:
        """One block's forward has these matmuls, and as large ones of each kind in backward.

        Those of attention and of a dense MLP may be int8; then norm and SwiGLU quantise what they
        write forward, counted as in bf16, they and SwiGLU what they write backward (but not the
        last norm of the model, which is left out here), and all other operands take passes of their
        own.
        """
        model, d, dense = self.model, self.model.hidden_size, costs.dense_width(self.model)
        attention, mlp = [(d, model.qkv_size), (d, d)], [(d, 2 * dense), (dense, d)]
        if not dense:
            mlp = []
        may_be_int8 = attention if model.is_moe else attention + mlp
        ops = [self.matmul(k, n) for k, n in attention + mlp]
        if product in INT8_PRODUCTS[self.arithmetic]:
            rest = ops[len(may_be_int8) :]
            ops = [
                self.matmul(k, n, "int8_grouped" if i in INT8_GROUPED[product] else "int8")
                for i, (k, n) in enumerate(may_be_int8)
            ]
            how = {"by_norms": gradients_by_norms(model)}
            ops += [quantisation(product, self.tokens, may_be_int8, **how), *rest]
        if model.is_moe:
            rows, inner = self.tokens * model.num_experts_per_token, model.expert_intermediate_size
            ops += [
                Op("matmul_grouped", costs.matmul(rows, k, n, experts=model.num_experts))
                for k, n in ((d, 2 * inner), (inner, d))
            ]
        return ops

    def attention(self, *, backward: bool) -> list[Op]:
        """The scores stay out of memory; differential attention combines its two maps' outputs."""
        d, kv = self.model.hidden_size, self.model.num_kv_heads * self.model.head_size
        pairs, queries, keys = self.tokens * self.seq_len / 2, self.tokens * d, self.tokens * kv
        shape = {"width": d, "value_widths": costs.value_widths(self.model)}
        cost = costs.attention(pairs, queries, keys, backward=backward, **shape)
        # Tiles of queries read k and v again, which comes to about once more from memory; in
        # backward as much is written and read again of their gradients.
        cost += Cost(bytes=costs.BF16 * 2 * keys * (2 if backward else 1))
        direction = "backward" if backward else "forward"
        launches = ATTENTION_LAUNCHES[direction]
        ops = [Op(f"attention_{direction}", cost, launches, smallest_dim=self.seq_len)]
        if self.model.use_differential_attention:
            combination = costs.differential_combination(queries, backward=backward)
            ops.append(Op("attention", combination))
        return ops

    def routing(self) -> list[Op]:
        """The tokens of a mixture go to their experts and back, in either direction."""
        if not self.model.is_moe:
            return []
        rows = self.tokens * self.model.num_experts_per_token
        cost = costs.moe_rows(self.tokens, rows, self.model.hidden_size)
        return [Op("routing", cost, launches=6)]

    def norms(self, *, backward: bool) -> Op:
        """A block has two norms, which in backward sum their weight's gradient in a second pass."""
        elements = 2 * self.tokens * self.model.hidden_size
        cost = costs.rms_norm(elements, adds_residual=True, backward=backward)
        return Op("norm", cost, launches=4 if backward else 2)

    def rope(self) -> Op:
        """RoPE of q and k moves what the norms before it do too, which are the same pass."""
        return Op("rope", costs.rope(self.rotated()))

    def rotated(self) -> int:
        """The value is the number of elements of q and k."""
        width = self.model.hidden_size + self.model.num_kv_heads * self.model.head_size
        return self.tokens * width

    def qk_norm_backward(self) -> Op:
        """The norms' weights get their gradients in a second pass."""
        return Op("rope", costs.qk_norm_rope(self.rotated(), backward=True), launches=2)

    def forward(self) -> list[Op]:
        return [
            self.norms(backward=False),
            self.rope(),
            # Of routed experts it is part of the grouped matmul.
            Op("swiglu", costs.swiglu(self.tokens * costs.dense_width(self.model))),
            *self.block_matmuls(),
            *self.attention(backward=False),
            *self.routing(),
        ]

    def backward(self, policy: Policy) -> list[Op]:
        """A block's backward pass has these ops, those of forward among them where they rerun."""
        recompute = policy != NONE
        width = costs.dense_width(self.model) + costs.routed_width(self.model)
        ops = [
            self.norms(backward=True),
            Op("swiglu", costs.swiglu(self.tokens * width, backward=True, recompute=recompute)),
            *self.attention(backward=True),
            *self.routing(),
        ]
        if self.model.use_differential_attention:
            # Standard attention's backward rotates dq and dk before it writes them.
            ops.append(self.rope())
        if self.model.qk_norm:
            ops += [self.qk_norm_backward(), *([self.rope()] if recompute else [])]
        for product in ("data_gradient", "weight_gradient"):
            ops += self.block_matmuls(product)
        if recompute:
            # Counted as passes of their own.
            norms = costs.rms_norm(2 * self.tokens * self.model.hidden_size)
            ops.append(Op("norm", norms, launches=2))
        if policy == FULL:
            ops += self.forward()
        return ops

    def loss(self) -> list[Op]:
        """The loss has three matmuls, and three passes over logits that exist in chunks."""
        d, vocab_size = self.model.hidden_size, self.model.vocab_size
        chunk = costs.loss_chunk(vocab_size, self.tokens)
        chunks = -(-self.tokens // chunk)
        head = self.matmul(d, vocab_size)
        head = replace(head, launches=chunks, smallest_dim=min(chunk, head.smallest_dim))
        loss = costs.linear_cross_entropy(self.tokens, d, vocab_size, logit_passes=3)
        return [head, head, head, Op("loss", Cost(bytes=loss.bytes), launches=chunks)]

    def optimizer(self, micro_batches: int, shards: int) -> list[Op]:
        """The update ends a step of so many micro-batches, on one of so many shards.

        Muon's iteration is each process's own, on whole matrices.
        """
        model, sums = self.model, 0.0
        if micro_batches > 1:
            sums = costs.gradient_sums(1, micro_batches).bytes
        moved = (model.num_parameters() - self.by_muon) * (self.update.bytes + sums)
        moved += self.by_muon * (self.muon_update.bytes + sums)
        ops = [Op("optimizer", Cost(bytes=moved / shards), launches=6 * model.num_layers)]
        return [*ops, self.orthogonalize()] if self.by_muon else ops

    def orthogonalize(self) -> Op:
        """Muon's iteration takes all layers' matrices of one kind at once."""
        total, kinds = Cost(), costs.hidden_matrices(self.model)
        for (rows, columns), count in kinds.items():
            one = costs.orthogonalize(rows, columns)
            times = self.model.num_layers * count
            total += Cost(times * one.flops, times * one.bytes)
        launches = (costs.MUON_QUADRATICS + 2 * costs.MUON_STEPS + 6) * len(kinds)
        return Op("optimizer_muon", total, launches=launches)


@dataclass(frozen=True)
class StepPrediction:
    """A prediction is of one optimizer step, before it was ever run."""

    config: TrainConfig
    gpu: Gpu
    gpus: int
    milliseconds: dict[str, float]
    """of each GPU, by category, summed over micro-batches; of communication what is not hidden"""
    peak_gib: float
    """of each GPU, by hamner.plan.memory's account"""
    communication: Communication
    reached: Efficiency
    """the efficiencies that the times are from"""

    @property
    def step_ms(self) -> float:
        return sum(self.milliseconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.config.tokens_per_step / self.step_ms * 1e3

    @property
    def interval(self) -> Interval:
        """About nine of ten runs should have a speed within this interval."""
        return find_interval(self.milliseconds, self.config.tokens_per_step, self.reached)

    @property
    def flops_per_token(self) -> int:
        """Model FLOPs are those of forward and backward, causal, nothing recomputed."""
        return costs.flops_per_token(self.config.model, self.config.seq_len)

    @property
    def mfu(self) -> float:
        """MFU is tokens/s x FLOPs per token / bf16 peak of all GPUs, 0 to 1."""
        peak = self.gpus * self.gpu.bf16_tflops * 1e12
        return self.tokens_per_second * self.flops_per_token / peak


def predict(
    config: TrainConfig,
    gpu: Gpu,
    policies: Sequence[Policy],
    micro_batch_size: int,
    *,
    parallelism: Parallelism = ONE_GPU,
    kind: type[MicroBatch] = MicroBatch,
    reached: Efficiency | None = None,
) -> StepPrediction:
    """The prediction is of a training step in bf16, or with linear layers in int8.

    Args:
        config: model and batch, over all GPUs: each GPU's share is a multiple of
            `micro_batch_size`.
        gpu: the card.
        policies: recomputation, one per layer.
        micro_batch_size: sequences of one forward and backward pass of a GPU.
        parallelism: `kind` "ddp" or "fsdp" where there is more than one GPU.
        kind: whose kernels.
        reached: the card's efficiencies; default: what is known of such cards.

    Raises:
        ValueError: micro-batches do not divide a GPU's share, or policies are not one a layer.
    """
    model, batch_size = config.model, config.batch_size
    micro_batches, rest = divmod(batch_size, parallelism.ranks * micro_batch_size)
    if rest:
        raise ValueError(f"{batch_size=} is not a multiple of {micro_batch_size=} on each GPU")
    if len(policies) != model.num_layers:
        raise ValueError(f"policies has {len(policies)} entries for {model.num_layers} layers")
    micro_batch = kind.of(config, micro_batch_size)
    is_graphed = kind.is_graphed and parallelism.ranks == 1
    reached = (reached or efficiency(gpu)).for_matmul(config.matmul, gpu)
    gap_ms = 1e-3 * (GRAPH_GAP_US if is_graphed else LAUNCH_GAP_US)
    milliseconds = dict.fromkeys(CATEGORIES, 0.0)

    def add(ops: Sequence[Op], times: int) -> float:
        """The ops count this many times over; one time takes what is returned, gaps aside."""
        once = 0.0
        for op in ops:
            spent = 1e3 * op.seconds(gpu, reached)
            once += spent
            milliseconds[op.kind.partition("_")[0]] += times * spent
            milliseconds["gaps"] += gap_ms * times * op.launches
        return once

    forward = backward = 0.0
    for policy, layers in Counter(policies).items():
        times = layers * micro_batches
        forward += layers * add(micro_batch.forward(), times)
        backward += layers * add(micro_batch.backward(policy), times)
    add(micro_batch.loss(), micro_batches)
    add(micro_batch.optimizer(micro_batches, parallelism.shards), 1)
    sent = communicate(model, parallelism, micro_batches, forward_ms=forward, backward_ms=backward)
    sent += gather_updates(micro_batch.by_muon, parallelism)
    milliseconds["communication"] = sent.exposed_ms
    peak = account(config, policies, micro_batch_size, parallelism=parallelism).total
    rest = {"peak_gib": peak / GIB, "communication": sent, "reached": reached}
    return StepPrediction(config, gpu, parallelism.ranks, milliseconds, **rest)


def shared_flags(config: TrainConfig) -> str:
    """The flags say to hamner.train and hamner.plan alike which run this is, as far as both have
    them: option, and recipe, matmul and batch where they are not the defaults."""
    flags = f"--option {config.option}"
    if config.recipe != "plan":
        flags += f" --recipe {config.recipe}"
    if config.matmul != "bf16":
        flags += f" --matmul {config.matmul}"
    if config.batch_size != OPTIONS.get(config.option, config).batch_size:
        flags += f" --batch-size {config.batch_size}"
    return flags


def compare_with_reality(
    prediction: StepPrediction, tokens_per_second: float, peak_gib: float, total_tokens: int
) -> str:
    """A line for the log holds measured speed, peak memory and length against the projected, of a
    card in `GPUS`."""
    speed = tokens_per_second / prediction.tokens_per_second
    memory, expected = peak_gib - prediction.peak_gib, prediction.interval
    advice = ""
    if expected.position(tokens_per_second) == "below":
        card = next(name for name, gpu in GPUS.items() if gpu.name == prediction.gpu.name)
        advice = (
            f"; python -m hamner.plan {shared_flags(prediction.config)} --gpu {card} --clock MHZ, "
            "with what nvidia-smi shows under load, says whether that is the GPU's clock"
        )
    days, projected_days = (
        total_tokens / rate / 86_400 for rate in (tokens_per_second, prediction.tokens_per_second)
    )
    return (
        f"measured {tokens_per_second:,.0f} tokens/s, {speed:.0%} of the projected "
        f"{prediction.tokens_per_second:,.0f} and {expected.position(tokens_per_second)} its "
        f"interval, {expected.low:,.0f}-{expected.high:,.0f}; peak {peak_gib:.1f} GiB, "
        f"{abs(memory):.1f} GiB {'above' if memory > 0 else 'below'} the projected "
        f"{prediction.peak_gib:.1f}; the whole run takes {days:.2f} days, "
        f"projected {projected_days:.2f}{advice}"
    )
