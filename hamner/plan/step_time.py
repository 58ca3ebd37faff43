"""How long a training step takes on a GPU: a roofline per op (Williams et al. 2009), torch-free.

A step is a list of ops, each with the FLOPs and bytes it must move (bf16). An op takes the longer
of arithmetic and traffic, each at the share of the card's peak that its kind of kernel reaches.
Those shares are data, with their provenance, in `EFFICIENCIES`; whatever they were not measured on
is a projection. `MEASURED_RUNS` are the real runs the model is held against.

Left out, being below 1% of a step: the embedding's gather and scatter, the router's matmul, softmax
statistics. Not modelled: a data loader that cannot keep up, a card that throttles.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.hardware import GIB, GPUS, Gpu
from hamner.plan.communication import ONE_GPU, Communication, Parallelism, communicate
from hamner.plan.memory import FULL, NONE, SELECTIVE, Policy, account, loss_chunk

CATEGORIES = (
    *("matmul", "attention", "norm", "swiglu", "rope", "routing", "loss", "optimizer", "gaps"),
    "communication",
)


@dataclass(frozen=True)
class Efficiency:
    """What each kind of kernel reaches on a card."""

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


def efficiency(gpu: Gpu) -> Efficiency:
    """The card's own row, or a related card's shares of peak, with a provenance that says so."""
    if gpu.name in EFFICIENCIES:
        return EFFICIENCIES[gpu.name]
    stand_in = _STAND_INS.get(gpu.name, "RTX 3090")
    return replace(
        EFFICIENCIES[stand_in],
        provenance=f"kernel efficiencies assumed, not measured: the {stand_in}'s shares of peak",
    )


@dataclass(frozen=True)
class Implementation:
    """What a trainer's kernels move beyond, or short of, the others'."""

    name: str
    fused_attention: bool
    """False writes the T x T scores to memory"""
    rebuilds_operands: bool
    """selective recomputation inside the backward of each matmul"""
    chunked_loss: bool
    """logits of one chunk at a time"""
    rope_traffic: float
    """times the least traffic: q and k read once and written once"""
    folds_rope: bool
    """standard attention's backward rotates dq and dk before it writes them"""
    loss_passes: int
    """over the logits, beyond their matmuls"""
    optimizer_bytes: int
    """per parameter: clip norm, AdamW, weight casts"""
    graphed: bool
    """one GPU replays forward and backward as a CUDA graph"""


# Read grad (twice, once for the norm), bf16 weight, its master's remainder and two moments; write
# those four.
TRITON = Implementation(
    name="triton",
    fused_attention=True,
    rebuilds_operands=True,
    chunked_loss=True,
    rope_traffic=1.0,
    folds_rope=True,
    loss_passes=3,
    optimizer_bytes=2 * 2 + 2 * (2 + 2 + 2 * 4),
    graphed=True,
)
# A plain model under torch.compile, fp32 weights and bf16 autocast. rope_traffic and loss_passes
# follow from its measured breakdown on an H100: 7.7 ms of RoPE with its copies, 3.4 ms of loss.
COMPILED = Implementation(
    name="torch.compile",
    fused_attention=True,
    rebuilds_operands=False,
    chunked_loss=False,
    rope_traffic=3.35,
    folds_rope=False,
    loss_passes=4,
    optimizer_bytes=2 * 4 + 3 * 4 + 3 * 4 + (4 + 2) + (2 + 4),
    graphed=False,
)
# The trainer this project replaces: COMPILED, but attention writes its scores; blocks recomputed.
EARLIER = replace(COMPILED, name="earlier trainer", fused_attention=False)


@dataclass(frozen=True)
class Op:
    """One kernel's work, or a few kernels' of the same kind."""

    category: str
    kind: str
    """the efficiency it is held to"""
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 1
    smallest_dim: int = 0
    """of a matmul's M, N and K"""
    overlaps: bool = True
    """arithmetic hides behind traffic or the other way round; else their times add"""

    def seconds(self, gpu: Gpu, reached: Efficiency) -> float:
        """Time on `gpu`, launch gaps aside."""
        share = reached.flops.get(self.kind, 1.0)
        if self.smallest_dim:
            share *= self.smallest_dim / (self.smallest_dim + reached.half_dim)
        bandwidth = reached.bandwidth.get(self.kind, reached.bandwidth["norm"])
        arithmetic = self.flops / (gpu.bf16_tflops * 1e12 * share)
        traffic = self.bytes / (gpu.bandwidth_gbs * 1e9 * bandwidth)
        return max(arithmetic, traffic) if self.overlaps else arithmetic + traffic


def _traffic(category: str, elements: float, launches: int = 1) -> Op:
    return Op(category, category, bytes=2 * elements, launches=launches)


def _matmul(tokens: int, k: int, n: int) -> Op:
    """(tokens, k) x (k, n)."""
    return Op(
        "matmul",
        "matmul",
        flops=2 * tokens * k * n,
        bytes=2 * (tokens * (k + n) + k * n),
        smallest_dim=min(tokens, k, n),
    )


def _grouped_matmul(rows: int, k: int, n: int, experts: int) -> Op:
    """(rows, k) x (k, n), each expert with its share of the rows and a weight of its own."""
    return Op(
        "matmul",
        "grouped_matmul",
        flops=2 * rows * k * n,
        bytes=2 * (rows * (k + n) + experts * k * n),
    )


def _block_matmuls(model: ModelConfig, tokens: int) -> list[Op]:
    """Forward matmuls of one block; each has two of the same size in backward."""
    d, inner = model.hidden_size, model.expert_intermediate_size
    ops = [_matmul(tokens, d, model.qkv_size), _matmul(tokens, d, d)]
    if not model.is_moe or model.num_shared_experts:
        shared = inner * (model.num_shared_experts or 1)
        ops += [_matmul(tokens, d, 2 * shared), _matmul(tokens, shared, d)]
    if model.is_moe:
        rows = _routed_rows(model, tokens)
        ops += [
            _grouped_matmul(rows, d, 2 * inner, model.num_experts),
            _grouped_matmul(rows, inner, d, model.num_experts),
        ]
    return ops


def _attention(
    model: ModelConfig, tokens: int, seq_len: int, fused: bool, *, backward: bool
) -> list[Op]:
    d, differential = model.hidden_size, model.use_differential_attention
    if not fused:
        # Passes over the scores. Forward: written, read and written by the softmax, read. Backward:
        # their gradient written, three by the softmax, two reads for q and k, one for v. K or N of
        # these matmuls is the head size, one step of a tile's loop, so nothing in a tile overlaps.
        scores = tokens * model.num_attention_heads * seq_len
        matmul_passes, softmax_passes, matmuls = (4, 3, 4) if backward else (2, 2, 2)
        products = Op(
            "attention",
            "matmul",
            flops=matmuls * 2 * tokens * seq_len * d,
            bytes=2 * scores * matmul_passes,
            launches=matmuls,
            overlaps=False,
        )
        return [products, _traffic("attention", scores * softmax_passes)]
    # Halved square. Forward q k^T and p v; backward those of q, k and v, and q k^T again.
    # Differential attention applies its scores to values twice as wide.
    kind, products, launches = ("backward", 5, 3) if backward else ("forward", 2, 1)
    if differential:
        products += 2 if backward else 1
    ops = [
        Op(
            "attention",
            f"attention_{kind}",
            flops=products * tokens * seq_len * d,
            bytes=2 * tokens * 2 * model.qkv_size * (2 if backward else 1),
            launches=launches,
        )
    ]
    if differential:
        # The two maps' outputs subtracted and normalised per head.
        ops.append(_traffic("attention", tokens * d * (5 if backward else 3)))
    return ops


def _dense_rows(model: ModelConfig, tokens: int) -> int:
    """Rows of the gate_up of a dense MLP or of the shared experts: every token once for each."""
    return tokens * (model.num_shared_experts if model.is_moe else 1)


def _routed_rows(model: ModelConfig, tokens: int) -> int:
    """Rows of the routed experts' gate_up: every token once per expert it goes through."""
    return tokens * model.num_experts_per_token if model.is_moe else 0


def _routing(model: ModelConfig, tokens: int) -> list[Op]:
    """Rows gathered by expert and summed back; the same traffic in forward and backward."""
    if not model.is_moe:
        return []
    elements = (3 * _routed_rows(model, tokens) + tokens) * model.hidden_size
    return [_traffic("routing", elements, launches=6)]


def _forward(model: ModelConfig, tokens: int, seq_len: int, how: Implementation) -> list[Op]:
    d, kv = model.hidden_size, model.num_kv_heads * model.head_size
    return [
        _traffic("norm", 2 * tokens * 4 * d, launches=2),
        _traffic("rope", tokens * 2 * (d + kv) * how.rope_traffic),
        # Of routed experts it is part of the grouped matmul.
        _traffic("swiglu", _dense_rows(model, tokens) * 3 * model.expert_intermediate_size),
        *_block_matmuls(model, tokens),
        *_attention(model, tokens, seq_len, how.fused_attention, backward=False),
        *_routing(model, tokens),
    ]


def _backward(
    model: ModelConfig, tokens: int, seq_len: int, how: Implementation, policy: Policy
) -> list[Op]:
    d, kv, inner = (
        model.hidden_size,
        model.num_kv_heads * model.head_size,
        model.expert_intermediate_size,
    )
    rebuild = how.rebuilds_operands and policy != NONE
    rows = _dense_rows(model, tokens) + _routed_rows(model, tokens)
    ops = [
        # Norms sum their weight's gradient in a second pass.
        _traffic("norm", 2 * tokens * 4 * d, launches=4),
        # Rebuilding writes the operand in the pass that forms the gradient of gate_up.
        _traffic("swiglu", rows * (6 if rebuild else 5) * inner),
        *_attention(model, tokens, seq_len, how.fused_attention, backward=True),
        *_routing(model, tokens),
    ]
    if not how.folds_rope or model.use_differential_attention:
        ops.append(_traffic("rope", tokens * 2 * (d + kv) * how.rope_traffic))
    ops += 2 * _block_matmuls(model, tokens)
    if rebuild:
        ops.append(_traffic("norm", 2 * tokens * 2 * d, launches=2))
    if policy == FULL:
        ops += _forward(model, tokens, seq_len, how)
    return ops


def _loss(model: ModelConfig, tokens: int, how: Implementation) -> list[Op]:
    chunk = loss_chunk(model.vocab_size, tokens) if how.chunked_loss else tokens
    chunks = -(-tokens // chunk)
    head = _matmul(tokens, model.hidden_size, model.vocab_size)
    head = replace(head, launches=chunks, smallest_dim=min(chunk, head.smallest_dim))
    softmax = _traffic("loss", tokens * model.vocab_size * how.loss_passes, launches=chunks)
    return [head, head, head, softmax]


def _optimizer(model: ModelConfig, how: Implementation, micro_batches: int, shards: int) -> Op:
    per_parameter = how.optimizer_bytes
    if micro_batches > 1:
        # Each micro-batch adds its bf16 gradient to an fp32 sum, which the two passes then read.
        per_parameter += (2 + 4 + 4) * micro_batches + 2 * 2
    tensors = 6 * model.num_layers
    size = per_parameter * model.num_parameters() / shards
    return Op("optimizer", "optimizer", bytes=size, launches=tensors)


@dataclass(frozen=True)
class StepPrediction:
    """One optimizer step, before it was ever run."""

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
        """Milliseconds of the step."""
        return sum(self.milliseconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second."""
        return self.tokens_per_step / self.step_ms * 1e3

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1: tokens/s x FLOPs per token / bf16 peak of all GPUs."""
        peak = self.gpus * self.gpu.bf16_tflops * 1e12
        return self.tokens_per_second * self.flops_per_token / peak


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
    """Time a bf16 training step.

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
        ValueError: a GPU's share of batch_size is not a multiple of micro_batch_size, or policies
            are not one a layer.
    """
    if batch_size % (parallelism.ranks * micro_batch_size):
        raise ValueError(f"{batch_size=} is not a multiple of {micro_batch_size=} on each GPU")
    if len(policies) != model.num_layers:
        raise ValueError(f"policies has {len(policies)} entries for {model.num_layers} layers")
    micro_batches = batch_size // parallelism.ranks // micro_batch_size
    tokens = micro_batch_size * seq_len
    reached = efficiency(gpu)

    is_graphed = implementation.graphed and parallelism.ranks == 1
    gap = 1e-3 * (reached.graph_gap_us if is_graphed else reached.launch_gap_us)

    milliseconds = dict.fromkeys(CATEGORIES, 0.0)

    def add(ops: Sequence[Op], times: int) -> float:
        """Count `ops`, `times` over, in the step; returns what one time takes, launches aside."""
        once = 0.0
        for op in ops:
            spent = 1e3 * op.seconds(gpu, reached)
            once += spent
            milliseconds[op.category] += times * spent
            milliseconds["gaps"] += gap * times * op.launches
        return once

    forward = backward = 0.0
    for policy, layers in Counter(policies).items():
        times = layers * micro_batches
        forward += layers * add(_forward(model, tokens, seq_len, implementation), times)
        backward += layers * add(_backward(model, tokens, seq_len, implementation, policy), times)
    add(_loss(model, tokens, implementation), micro_batches)
    add([_optimizer(model, implementation, micro_batches, parallelism.shards)], 1)
    communication = communicate(
        parallelism,
        parameters=model.num_parameters(),
        embedding=model.vocab_size * model.hidden_size,
        micro_batches=micro_batches,
        forward_ms=forward,
        backward_ms=backward,
    )
    milliseconds["communication"] = communication.exposed_ms

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
        flops_per_token=model.flops_per_token(seq_len),
        peak_gib=memory.total / GIB,
        provenance=reached.provenance,
        gpus=parallelism.ranks,
        communication=communication,
    )


def compare_with_reality(
    prediction: StepPrediction, tokens_per_second: float, peak_gib: float, total_tokens: int
) -> str:
    """One line for the log: measured speed, peak memory and length against what was projected."""
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


@dataclass(frozen=True)
class MeasuredRun:
    """A training run that really happened: one point to hold the model against."""

    option: str
    gpu: str
    implementation: Implementation
    policy: Policy
    batch_size: int
    tokens_per_second: float
    fitted: bool = False
    """whether the efficiencies were taken from this run's own breakdown"""
    micro_batches: int = 1
    """a step"""

    def predict(self) -> StepPrediction:
        """What the model says of the run."""
        option = OPTIONS[self.option]
        return predict(
            option.model,
            GPUS[self.gpu],
            policies=(self.policy,) * option.model.num_layers,
            micro_batch_size=self.batch_size // self.micro_batches,
            batch_size=self.batch_size,
            seq_len=option.seq_len,
            implementation=self.implementation,
        )

    @property
    def error(self) -> float:
        """Predicted over measured tokens/s, less one."""
        return self.predict().tokens_per_second / self.tokens_per_second - 1


# TRITON as it was when measured: fp32 masters read and written, the bf16 weights only written;
# attention cuDNN's, with RoPE's backward in a pass of its own.
_FIRST_KERNELS = replace(
    TRITON, optimizer_bytes=2 * 2 + 2 * (4 + 2 * 4) + 2, folds_rope=False, graphed=False
)
MEASURED_RUNS = (
    MeasuredRun("a", "h100", _FIRST_KERNELS, SELECTIVE, 24, 205_896, fitted=True),
    MeasuredRun("current", "h100", _FIRST_KERNELS, SELECTIVE, 48, 368_743),
    MeasuredRun("a", "h100", TRITON, SELECTIVE, 24, 216_908),
    MeasuredRun("current", "h100", TRITON, SELECTIVE, 24, 366_726),
    MeasuredRun("c", "h100", TRITON, SELECTIVE, 24, 248_893, fitted=True),
    MeasuredRun("a", "h100", COMPILED, NONE, 24, 197_433, fitted=True),
    MeasuredRun("a", "h100", COMPILED, FULL, 24, 160_320),
    MeasuredRun("a", "h100", EARLIER, FULL, 24, 94_873),
    MeasuredRun("current", "h100", EARLIER, FULL, 24, 156_008),
    MeasuredRun("current", "rtx-3090", EARLIER, FULL, 24, 26_000),
    # On a card that nothing was fitted to, 2026-11-25.
    MeasuredRun("a", "h200", TRITON, NONE, 24, 231_319),
    MeasuredRun("a", "h200", TRITON, SELECTIVE, 24, 227_464),
    MeasuredRun("a", "h200", TRITON, SELECTIVE, 24, 218_794, micro_batches=2),
    MeasuredRun("a", "h200", TRITON, SELECTIVE, 24, 203_990, micro_batches=4),
    MeasuredRun("a", "h200", TRITON, FULL, 24, 180_571),
    MeasuredRun("a-short", "h200", TRITON, SELECTIVE, 32, 241_963),
    MeasuredRun("a-short", "h200", TRITON, FULL, 32, 188_174),
    MeasuredRun("b", "h200", TRITON, SELECTIVE, 24, 243_145),
    MeasuredRun("b", "h200", TRITON, FULL, 24, 186_870),
    MeasuredRun("current", "h200", TRITON, NONE, 48, 418_521),
    MeasuredRun("current", "h200", TRITON, SELECTIVE, 48, 415_469),
    MeasuredRun("current", "h200", TRITON, FULL, 48, 325_765),
    MeasuredRun("c", "h200", TRITON, NONE, 24, 278_317),
    MeasuredRun("c", "h200", TRITON, SELECTIVE, 24, 273_022),
    MeasuredRun("c", "h200", TRITON, SELECTIVE, 24, 255_502, micro_batches=2),
    MeasuredRun("c", "h200", TRITON, FULL, 24, 215_447),
    MeasuredRun("c-shared", "h200", TRITON, SELECTIVE, 24, 220_473),
)
