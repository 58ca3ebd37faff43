"""A step's time on a GPU is predicted by a roofline per op (Williams et al. 2009), torch-free.

A step is a list of ops, each with its cost (`hamner.plan.costs`, bf16). An op takes the longer of
arithmetic and traffic, each at the share of the card's peak that its kind of kernel reaches. Those
shares are data, with their provenance, in `EFFICIENCIES`; whatever they were not measured on is a
projection. docs/planning.md lists the real runs that the model is held against.

Left out, being below 1% of a step: the embedding's gather and scatter, the router's matmul, softmax
statistics. Not modelled: a data loader that cannot keep up, a card that throttles.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hamner.config.model import ModelConfig
from hamner.hardware import GIB, Gpu
from hamner.plan import costs
from hamner.plan.communication import ONE_GPU, Communication, Parallelism, communicate
from hamner.plan.costs import Cost
from hamner.plan.memory import FULL, NONE, Policy, account

CATEGORIES = (
    *("matmul", "attention", "norm", "swiglu", "rope", "routing", "loss", "optimizer", "gaps"),
    "communication",
)


@dataclass(frozen=True)
class Efficiency:
    """An efficiency is what each kind of kernel reaches on a card."""

    flops: dict[str, float]
    """kind: share of the bf16 peak; attention causal, counting half of the square"""
    half_dim: float
    """smallest of a matmul's M, N and K at which it reaches half of its share"""
    bandwidth: dict[str, float]
    """kind: share of the memory bandwidth; "norm" also stands for kinds that are not listed"""
    launch_gap_us: float
    """the GPU's idle time before each kernel that is launched by itself, microseconds"""
    graph_gap_us: float
    """the same inside a CUDA graph"""
    provenance: str


# H100: 24576x1024x1536 678 TFLOP/s, x5632 677, x49152 641, 24576x2816x1024 700, 49152x768x3072 629,
# 49152x1536x768 659, 8192^3 776 are within 6% of 792 * m / (m + 176), m the smallest dimension;
# grouped ones are a step of option c's 421 to 444, SwiGLU's forward in it; attention is cuDNN's
# time for 24 x 1024 tokens, 16 heads of 64; the GB/s are the traffic counted below over the time
# each kind took in a step of option a; about 4 ms of that step were gaps, in a CUDA graph 1.3.
EFFICIENCIES: dict[str, Efficiency] = {
    "H100 SXM": Efficiency(
        flops={
            "matmul": 792 / 989.4,
            "attention_forward": 328 / 989.4,
            "attention_backward": 211 / 989.4,
            "grouped_matmul": 430 / 989.4,
        },
        half_dim=176,
        bandwidth={
            "norm": 2745 / 3352,
            "swiglu": 2903 / 3352,
            "rope": 2626 / 3352,
            "loss": 2899 / 3352,
            "optimizer": 2292 / 3352,
        },
        launch_gap_us=4.3,
        graph_gap_us=1.2,
        provenance="kernel efficiencies measured on an H100 SXM (routing assumed as norms)",
    ),
    "RTX 3090": Efficiency(
        flops={
            "matmul": 65 / 71.2,
            "attention_forward": 54 / 71.2,
            "attention_backward": 54 / 71.2,
            "grouped_matmul": 55 / 71.2,
        },
        half_dim=0,
        bandwidth={"norm": 850 / 936},
        launch_gap_us=4.3,
        graph_gap_us=1.2,
        provenance="kernel efficiencies assumed, not measured: matmuls 65 of 71.2 TFLOP/s, "
        "grouped ones 55, attention 54 TFLOP/s, 850 of 936 GB/s, the H100's gaps between kernels",
    ),
}
_STAND_INS = dict.fromkeys(("H100 PCIe", "H200", "A100 40GB", "A100 80GB"), "H100 SXM")

MEASURED_ERRORS: dict[str, tuple[int, float, float]] = {
    "H100 SXM": (9, -0.04, 0.03),
    "RTX 3090": (1, 0.09, 0.09),
    "H200": (17, -0.04, 0.05),
}
"""card: how many runs were measured on it (docs/planning.md), and the lowest and highest error of
the speed predicted for them; a test holds them to the runs"""


def efficiency(gpu: Gpu) -> Efficiency:
    """A card has its own row, or a related card's shares of peak and a provenance to say so."""
    if gpu.name in EFFICIENCIES:
        return EFFICIENCIES[gpu.name]
    stand_in = _STAND_INS.get(gpu.name, "RTX 3090")
    return replace(
        EFFICIENCIES[stand_in],
        provenance=f"kernel efficiencies assumed, not measured: the {stand_in}'s shares of peak",
    )


@dataclass(frozen=True)
class Implementation:
    """An implementation is what a trainer's kernels move beyond, or short of, the others'."""

    name: str
    fused_attention: bool
    """False writes the T x T scores to memory"""
    recomputes_operands: bool
    """selective recomputation inside the backward of each matmul"""
    chunked_loss: bool
    """logits of one chunk at a time"""
    rope_traffic: float
    """times the least traffic: q and k read once and written once"""
    folds_rope: bool
    """standard attention's backward rotates dq and dk before it writes them"""
    loss_passes: int
    """over the logits, beyond their matmuls"""
    optimizer_bytes: float
    """per parameter: clip norm, AdamW, weight casts"""
    graphed: bool
    """one GPU replays forward and backward as a CUDA graph"""


TRITON = Implementation(
    name="triton",
    fused_attention=True,
    recomputes_operands=True,
    chunked_loss=True,
    rope_traffic=1.0,
    folds_rope=True,
    loss_passes=3,
    optimizer_bytes=(costs.gradient_norm(1) + costs.adamw(1, split_master=True)).bytes,
    graphed=True,
)


@dataclass(frozen=True)
class Op:
    """An op is one kernel's work, or a few kernels' of the same kind."""

    category: str
    kind: str
    """the efficiency it is held to"""
    cost: Cost
    launches: int = 1
    smallest_dim: int = 0
    """of a matmul's M, N and K"""
    overlaps: bool = True
    """arithmetic hides behind traffic or the other way round; else their times add"""

    def seconds(self, gpu: Gpu, reached: Efficiency) -> float:
        """The op takes this long on `gpu`, launch gaps aside."""
        share = reached.flops.get(self.kind, 1.0)
        if self.smallest_dim:
            share *= self.smallest_dim / (self.smallest_dim + reached.half_dim)
        bandwidth = reached.bandwidth.get(self.kind, reached.bandwidth["norm"])
        arithmetic = self.cost.flops / (gpu.bf16_tflops * 1e12 * share)
        traffic = self.cost.bytes / (gpu.bandwidth_gbs * 1e9 * bandwidth)
        return max(arithmetic, traffic) if self.overlaps else arithmetic + traffic


def _op(kind: str, cost: Cost, launches: int = 1) -> Op:
    return Op(kind, kind, cost, launches)


def _matmul(tokens: int, k: int, n: int) -> Op:
    return Op("matmul", "matmul", costs.matmul(tokens, k, n), smallest_dim=min(tokens, k, n))


def _grouped_matmul(rows: int, k: int, n: int, experts: int) -> Op:
    return Op("matmul", "grouped_matmul", costs.grouped_matmul(rows, k, n, experts=experts))


def _block_matmuls(model: ModelConfig, tokens: int) -> list[Op]:
    """One block's forward has these matmuls; each has two of the same size in backward."""
    d, inner, dense = model.hidden_size, model.expert_intermediate_size, costs.dense_width(model)
    ops = [_matmul(tokens, d, model.qkv_size), _matmul(tokens, d, d)]
    if dense:
        ops += [_matmul(tokens, d, 2 * dense), _matmul(tokens, dense, d)]
    if model.is_moe:
        rows = tokens * model.num_experts_per_token
        ops += [
            _grouped_matmul(rows, d, 2 * inner, model.num_experts),
            _grouped_matmul(rows, inner, d, model.num_experts),
        ]
    return ops


def _attention(
    model: ModelConfig, tokens: int, seq_len: int, fused: bool, *, backward: bool
) -> list[Op]:
    d, kv = model.hidden_size, model.num_kv_heads * model.head_size
    if not fused:
        products, softmax = costs.unfused_attention(
            tokens, seq_len, heads=model.num_attention_heads, width=d, backward=backward
        )
        # K or N of these matmuls is the head size, one step of a tile's loop, so nothing in a tile
        # overlaps.
        launches = 4 if backward else 2
        return [
            Op("attention", "matmul", products, launches, overlaps=False),
            _op("attention", softmax),
        ]
    cost = costs.attention(
        tokens * seq_len / 2,
        query_elements=tokens * d,
        key_elements=tokens * kv,
        width=d,
        value_widths=costs.value_widths(model),
        backward=backward,
    )
    # Tiles of queries read k and v again, which comes to about once more from memory; in backward
    # as much is written and read again of their gradients.
    cost += Cost(bytes=costs.BF16 * tokens * 2 * kv * (2 if backward else 1))
    kind, launches = ("backward", 3) if backward else ("forward", 1)
    ops = [Op("attention", f"attention_{kind}", cost, launches)]
    if model.use_differential_attention:
        combination = costs.differential_combination(tokens * d, backward=backward)
        ops.append(_op("attention", combination))
    return ops


def _routing(model: ModelConfig, tokens: int) -> list[Op]:
    if not model.is_moe:
        return []
    rows = tokens * model.num_experts_per_token
    return [_op("routing", costs.moe_rows(tokens, rows, model.hidden_size), launches=6)]


def _norms(model: ModelConfig, tokens: int, *, backward: bool) -> Op:
    """A block has two norms, which in backward sum their weight's gradient in a second pass."""
    elements = 2 * tokens * model.hidden_size
    cost = costs.rms_norm(elements, adds_residual=True, backward=backward)
    return _op("norm", cost, launches=4 if backward else 2)


def _rope(model: ModelConfig, tokens: int, how: Implementation) -> Op:
    rotated = model.hidden_size + model.num_kv_heads * model.head_size
    return _op("rope", Cost(bytes=costs.rope(tokens * rotated).bytes * how.rope_traffic))


def _forward(model: ModelConfig, tokens: int, seq_len: int, how: Implementation) -> list[Op]:
    return [
        _norms(model, tokens, backward=False),
        _rope(model, tokens, how),
        # Of routed experts it is part of the grouped matmul.
        _op("swiglu", costs.swiglu(tokens * costs.dense_width(model))),
        *_block_matmuls(model, tokens),
        *_attention(model, tokens, seq_len, how.fused_attention, backward=False),
        *_routing(model, tokens),
    ]


def _backward(
    model: ModelConfig, tokens: int, seq_len: int, how: Implementation, *, policy: Policy
) -> list[Op]:
    recompute = how.recomputes_operands and policy != NONE
    width = costs.dense_width(model) + costs.routed_width(model)
    ops = [
        _norms(model, tokens, backward=True),
        _op("swiglu", costs.swiglu(tokens * width, backward=True, recompute=recompute)),
        *_attention(model, tokens, seq_len, how.fused_attention, backward=True),
        *_routing(model, tokens),
    ]
    if not how.folds_rope or model.use_differential_attention:
        ops.append(_rope(model, tokens, how))
    ops += 2 * _block_matmuls(model, tokens)
    if recompute:
        # Counted as passes of their own.
        ops.append(_op("norm", costs.rms_norm(2 * tokens * model.hidden_size), launches=2))
    if policy == FULL:
        ops += _forward(model, tokens, seq_len, how)
    return ops


def _loss(model: ModelConfig, tokens: int, how: Implementation) -> list[Op]:
    d, vocab_size = model.hidden_size, model.vocab_size
    chunk = costs.loss_chunk(vocab_size, tokens) if how.chunked_loss else tokens
    chunks = -(-tokens // chunk)
    head = _matmul(tokens, d, vocab_size)
    head = replace(head, launches=chunks, smallest_dim=min(chunk, head.smallest_dim))
    loss = costs.linear_cross_entropy(tokens, d, vocab_size, logit_passes=how.loss_passes)
    return [head, head, head, _op("loss", Cost(bytes=loss.bytes), launches=chunks)]


def _optimizer(model: ModelConfig, how: Implementation, micro_batches: int, shards: int) -> Op:
    per_parameter = how.optimizer_bytes
    if micro_batches > 1:
        per_parameter += costs.gradient_sums(1, micro_batches).bytes
    cost = Cost(bytes=per_parameter * model.num_parameters() / shards)
    return _op("optimizer", cost, launches=6 * model.num_layers)


@dataclass(frozen=True)
class StepPrediction:
    """A prediction is of one optimizer step, before it was ever run."""

    gpu: Gpu
    milliseconds: dict[str, float]
    """of each GPU, by category, summed over micro-batches; of communication what is not hidden"""
    tokens_per_step: int
    """of all GPUs"""
    flops_per_token: int
    """model FLOPs: forward and backward, causal, nothing recomputed"""
    peak_gib: float
    """of each GPU, by hamner.plan.memory's account"""
    provenance: str
    gpus: int
    communication: Communication

    @property
    def step_ms(self) -> float:
        """The step takes this many milliseconds."""
        return sum(self.milliseconds.values())

    @property
    def tokens_per_second(self) -> float:
        """The step trains on this many tokens a second."""
        return self.tokens_per_step / self.step_ms * 1e3

    @property
    def mfu(self) -> float:
        """MFU is tokens/s x FLOPs per token / bf16 peak of all GPUs, 0 to 1."""
        peak = self.gpus * self.gpu.bf16_tflops * 1e12
        return self.tokens_per_second * self.flops_per_token / peak


@dataclass
class _Clock:
    """A clock adds up the milliseconds of ops by category, launch gaps apart."""

    gpu: Gpu
    reached: Efficiency
    gap_ms: float
    milliseconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))

    def add(self, ops: Sequence[Op], times: int) -> float:
        """The clock counts `ops` this many times over; one time takes what is returned."""
        once = 0.0
        for op in ops:
            spent = 1e3 * op.seconds(self.gpu, self.reached)
            once += spent
            self.milliseconds[op.category] += times * spent
            self.milliseconds["gaps"] += self.gap_ms * times * op.launches
        return once


def predict(
    model: ModelConfig,
    gpu: Gpu,
    *,
    policies: Sequence[Policy],
    micro_batch_size: int,
    batch_size: int,
    seq_len: int,
    implementation: Implementation = TRITON,
    parallelism: Parallelism = ONE_GPU,
) -> StepPrediction:
    """The prediction is of a bf16 training step.

    Args:
        model: shape.
        gpu: the card.
        policies: recomputation, one per layer.
        micro_batch_size: sequences of one forward and backward pass of a GPU.
        batch_size: sequences of one optimizer step, over all GPUs: each GPU's share is a multiple
            of `micro_batch_size`.
        seq_len: tokens of a sequence.
        implementation: whose kernels.
        parallelism: `kind` "ddp" or "fsdp" where there is more than one GPU.

    Raises:
        ValueError: micro-batches do not divide a GPU's share, or policies are not one a layer.
    """
    micro_batches, rest = divmod(batch_size, parallelism.ranks * micro_batch_size)
    if rest:
        raise ValueError(f"{batch_size=} is not a multiple of {micro_batch_size=} on each GPU")
    tokens = micro_batch_size * seq_len
    milliseconds, communication = _step_times(
        model,
        gpu,
        implementation,
        parallelism,
        policies=policies,
        micro_batches=micro_batches,
        tokens=tokens,
        seq_len=seq_len,
    )
    memory = account(
        model,
        policies,
        micro_batch_tokens=tokens,
        precision="bf16",
        accumulate=micro_batches > 1,
        fused=implementation.chunked_loss,
        parallelism=parallelism,
    )
    return StepPrediction(
        gpu=gpu,
        milliseconds=milliseconds,
        tokens_per_step=batch_size * seq_len,
        flops_per_token=costs.flops_per_token(model, seq_len),
        peak_gib=memory.total / GIB,
        provenance=efficiency(gpu).provenance,
        gpus=parallelism.ranks,
        communication=communication,
    )


def _step_times(
    model: ModelConfig,
    gpu: Gpu,
    how: Implementation,
    parallelism: Parallelism,
    *,
    policies: Sequence[Policy],
    micro_batches: int,
    tokens: int,
    seq_len: int,
) -> tuple[dict[str, float], Communication]:
    """A step takes these milliseconds by category, the exposed communication among them."""
    if len(policies) != model.num_layers:
        raise ValueError(f"policies has {len(policies)} entries for {model.num_layers} layers")
    reached = efficiency(gpu)
    is_graphed = how.graphed and parallelism.ranks == 1
    clock = _Clock(
        gpu, reached, 1e-3 * (reached.graph_gap_us if is_graphed else reached.launch_gap_us)
    )
    forward = backward = 0.0
    for policy, layers in Counter(policies).items():
        times = layers * micro_batches
        forward += layers * clock.add(_forward(model, tokens, seq_len, how), times)
        ops = _backward(model, tokens, seq_len, how, policy=policy)
        backward += layers * clock.add(ops, times)
    clock.add(_loss(model, tokens, how), micro_batches)
    clock.add([_optimizer(model, how, micro_batches, parallelism.shards)], 1)
    communication = communicate(
        parallelism,
        parameters=model.num_parameters(),
        embedding=model.vocab_size * model.hidden_size,
        micro_batches=micro_batches,
        forward_ms=forward,
        backward_ms=backward,
    )
    clock.milliseconds["communication"] = communication.exposed_ms
    return clock.milliseconds, communication


def compare_with_reality(
    prediction: StepPrediction, tokens_per_second: float, peak_gib: float, total_tokens: int
) -> str:
    """A line for the log holds measured speed, peak memory and length against the projected."""
    speed = tokens_per_second / prediction.tokens_per_second
    memory = peak_gib - prediction.peak_gib
    days, projected_days = (
        total_tokens / rate / 86_400 for rate in (tokens_per_second, prediction.tokens_per_second)
    )
    return (
        f"measured {tokens_per_second:,.0f} tokens/s, {speed:.0%} of the projected "
        f"{prediction.tokens_per_second:,.0f}; peak {peak_gib:.1f} GiB, "
        f"{abs(memory):.1f} GiB {'above' if memory > 0 else 'below'} the projected "
        f"{prediction.peak_gib:.1f}; the whole run takes {days:.2f} days, "
        f"projected {projected_days:.2f}"
    )
