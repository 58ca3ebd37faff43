"""What a report card says of kernels is timed here: matmuls, attention, and fused kernels.

A call is timed as a CUDA graph of many, on data several times the L2, on a GPU that is warm.
"""

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from bench import tune
from bench.timing import ManyCalls
from bench.tune_flash_attention import TOKENS, Problem, work
from bench.tuning import COPIES, ROUNDS
from hamner.hardware import Gpu
from hamner.kernels import global_grad_norm
from hamner.plan import costs
from hamner.plan.costs import Cost
from hamner.plan.efficiency import Efficiency
from hamner.plan.report_card import AttentionRate, KernelTime, MatmulRate
from hamner.plan.step_time import ATTENTION_LAUNCHES, GRAPH_GAP_US, Op

MATMULS = (
    # Option a's: qkv, o, gate and up, down, a chunk of the head, and a weight's gradient.
    *((24_576, 1024, 1536), (24_576, 1024, 1024), (24_576, 1024, 5632), (24_576, 2816, 1024)),
    *((3584, 1024, 49_152), (1536, 24_576, 1024)),
    # Options b and c.
    *((24_576, 768, 1280), (24_576, 768, 4096), (24_576, 2048, 768)),
    *((n, n, n) for n in (2048, 4096, 8192)),
)
ATTENTION = ((512, 64), (1024, 64), (2048, 64), (1024, 128))
"""T and head size"""
WARM_UP_SECONDS = 10.0
MILLISECONDS = 10.0
"""of a graph"""

Build = Callable[[], Callable[[], object]]
"""makes inputs on the GPU, and gives the call to time"""


def warm_up() -> None:
    """The function keeps the GPU busy, so that its clock is nearer to that of hours of training."""
    x = torch.randn(8192, 8192, device="cuda").bfloat16()
    end = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < end:
        torch.mm(x, x)
        torch.cuda.synchronize()


def milliseconds(build: Build) -> float:
    """The function gives the median time of a call."""
    many = ManyCalls([build() for _ in range(COPIES)], milliseconds=MILLISECONDS)
    return statistics.median(many.milliseconds() for _ in range(ROUNDS))


def matmul_rates() -> Iterator[MatmulRate]:
    """The function measures torch's matmuls, as a linear layer asks for them."""
    for m, k, n in MATMULS:

        def build(m: int = m, k: int = k, n: int = n) -> Callable[[], object]:
            x, weight = (torch.randn(rows, k, device="cuda").bfloat16() for rows in (m, n))
            return lambda: torch.mm(x, weight.t())

        yield MatmulRate(m, k, n, tflops=costs.matmul(m, k, n).flops / milliseconds(build) / 1e9)


def attention_rates() -> Iterator[AttentionRate]:
    """The function measures Hamner's attention, its backward with RoPE's in it."""
    for seq_len, head_size in ATTENTION:
        for direction in ("forward", "backward"):
            cost = attention_work(seq_len, head_size, direction)
            spent = milliseconds(functools.partial(attention, seq_len, head_size, direction))
            rate = cost.flops / spent / 1e9
            yield AttentionRate(seq_len, head_size, direction, milliseconds=spent, tflops=rate)


def predicted_ms(op: Op, gpu: Gpu, reached: Efficiency) -> float:
    """The function gives what the step model counts for an op, its gaps between kernels
    included."""
    return 1e3 * op.seconds(gpu, reached) + 1e-3 * GRAPH_GAP_US * op.launches


def matmul_op(rate: MatmulRate) -> Op:
    """The function describes a matmul as the step model does."""
    shape = rate.m, rate.k, rate.n
    return Op("matmul", costs.matmul(*shape), smallest_dim=min(shape))


def attention_op(seq_len: int, head_size: int, direction: str) -> Op:
    """The function describes one direction of attention as the step model does."""
    cost = attention_work(seq_len, head_size, direction)
    launches = ATTENTION_LAUNCHES[direction]
    return Op(f"attention_{direction}", cost, launches, smallest_dim=seq_len)


def attention(seq_len: int, head_size: int, direction: str) -> Callable[[], object]:
    """The function gives the call of one direction."""
    problem = Problem(head_size, head_size, seq_len, batch_size=TOKENS // seq_len)
    return getattr(problem, direction)


def attention_work(seq_len: int, head_size: int, direction: str) -> Cost:
    """The function gives the work of one direction."""
    return work((head_size, head_size, seq_len), backward=direction == "backward")


def grad_norm() -> Callable[[], object]:
    """The function gives the norm over the gradients of some layers."""
    grads = [tune.randn(*shape) for shape in tune.UPDATED]
    return lambda: global_grad_norm(grads)


def embedding() -> Callable[[], object]:
    """The function gives the gradient of a tied embedding, of tokens as rare as a text's."""
    d_x, d_weight = tune.randn(tune.N, tune.D), tune.randn(tune.V, tune.D)
    tokens = text_like_tokens().cuda()
    return lambda: torch.ops.hamner.add_embedding_gradient_(d_x, tokens, d_weight)


def text_like_tokens() -> torch.Tensor:
    """The function gives (N,) tokens of which a few are frequent and most rare."""
    ranks = torch.rand(tune.N, generator=torch.Generator().manual_seed(0))
    return (tune.V**ranks - 1).long()


def tuned(kernel: str, direction: str) -> tuple[Build, Cost]:
    """The function gives what bench/tune.py times."""
    tunable = tune.KERNELS[kernel][direction]
    module = importlib.import_module(f"hamner.kernels.{tunable.module}")
    return functools.partial(tunable.build, module), tunable.cost


def kernels() -> Iterator[tuple[str, str, Build, Op]]:
    """The function lists the kernels of bf16 training with AdamW: name, shape, call, and what each
    is to the step model."""
    n, d, inner = tune.N, tune.D, tune.INTERMEDIATE
    updated = sum(rows * columns for rows, columns in tune.UPDATED)
    experts = f"{n} x {tune.TOP_K} of {tune.EXPERTS}, {tune.MOE_D} x {tune.MOE_I}"
    heads = f"{n} x {tune.HEADS + tune.KV_HEADS} x {tune.HEAD_DIM}"
    for name, shape, kind, kernel, direction, launches in (
        ("norm forward", f"{n} x {d}", "norm", "rms_norm", "forward", 1),
        ("norm backward", f"{n} x {d}", "norm", "rms_norm", "backward", 2),
        ("SwiGLU forward", f"{n} x {inner}", "swiglu", "swiglu", "forward", 1),
        ("SwiGLU backward", f"{n} x {inner}", "swiglu", "swiglu", "backward", 1),
        ("RoPE", heads, "rope", "rope", "packed", 1),
        ("AdamW", f"{updated:,}", "optimizer", "adamw", "update", 1),
        ("router forward", f"{n} x {tune.MOE_D}", "", "router_linear", "forward", 1),
        ("router backward", f"{n} x {tune.MOE_D}", "", "router_linear", "backward", 2),
        ("grouped gate and up", experts, "matmul_grouped", "grouped_matmul", "gate_up", 1),
        ("grouped products", experts, "matmul_grouped", "grouped_matmul", "matmul", 3),
        ("grouped weight gradients", experts, "matmul_grouped", "grouped_matmul", "weight_grad", 2),
    ):
        build, cost = tuned(kernel, direction)
        yield name, shape, build, Op(kind, cost, launches)
    # The step model counts that the logits are read twice.
    rows, vocabulary = tune.LOSS_ROWS, tune.V
    loss = Cost(bytes=costs.linear_cross_entropy(rows, d, vocabulary, logit_passes=3).bytes)
    call, _ = tuned("cross_entropy", "rows")
    yield "loss and gradient", f"{rows} x {vocabulary}", call, Op("loss", loss)
    norm = Op("optimizer", costs.gradient_norm(updated))
    yield "gradient norm", f"{updated:,}", grad_norm, norm
    distinct = len(text_like_tokens().unique())
    scattered = Op("", costs.tied_embedding_backward(n, distinct, d))
    yield "embedding gradient", f"{n} x {d}", embedding, scattered
    for direction in ("forward", "backward"):
        yield (
            f"attention {direction}",
            f"{TOKENS} at T 1024, head size 64",
            functools.partial(attention, 1024, 64, direction),
            attention_op(1024, 64, direction),
        )


def kernel_times(gpu: Gpu, reached: Efficiency) -> Iterator[KernelTime]:
    """The function measures each kernel beside its floor and prediction on such a GPU."""
    for name, shape, build, op in kernels():
        yield KernelTime(
            name,
            shape,
            op.kind,
            flops=op.cost.flops,
            bytes=op.cost.bytes,
            launches=op.launches,
            measured_ms=milliseconds(build),
            floor_ms=1e3 * op.cost.floor_seconds(gpu, "bf16"),
            predicted_ms=predicted_ms(op, gpu, reached) if op.kind else None,
        )
