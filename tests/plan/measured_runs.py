"""Training runs that really happened: the points that the speed model is held against."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hamner.config.options import OPTIONS
from hamner.hardware import GPUS, Gpu
from hamner.plan import costs
from hamner.plan.costs import Cost
from hamner.plan.efficiency import Efficiency
from hamner.plan.memory import FULL, NONE, SELECTIVE, Policy
from hamner.plan.step_time import MicroBatch, Op, StepPrediction, predict


class Compiled(MicroBatch):
    """A plain model runs under torch.compile, with fp32 weights and bf16 autocast.

    What RoPE and the loss move follows from its measured breakdown on an H100: 7.7 ms of RoPE with
    its copies, 3.4 ms of loss. Attention is cuDNN's, whose backward takes 1.32 times as long there.
    """

    is_graphed = False
    update = Cost(bytes=2 * 4 + 3 * 4 + 3 * 4 + (4 + 2) + (2 + 4))

    def attention(self, *, backward: bool) -> list[Op]:
        factor = 1.32 if backward else 0.96
        return [
            replace(op, cost=Cost(factor * op.cost.flops, op.cost.bytes))
            for op in super().attention(backward=backward)
        ]

    def rope(self) -> Op:
        op = super().rope()
        return replace(op, cost=Cost(bytes=3.35 * op.cost.bytes))

    def backward(self, policy: Policy) -> list[Op]:
        """Only whole blocks are computed again."""
        ops = [*super().backward(NONE), self.rope()]
        return ops + self.forward() if policy == FULL else ops

    def loss(self) -> list[Op]:
        """All logits are there at once, and passed over four times."""
        d, vocab_size = self.model.hidden_size, self.model.vocab_size
        loss = costs.linear_cross_entropy(self.tokens, d, vocab_size, logit_passes=4)
        return [*3 * [self.matmul(d, vocab_size)], Op("loss", Cost(bytes=loss.bytes))]


class ScoreProducts(Op):
    """The matmuls of attention that writes its scores.

    Their K or N is the head size, one step of a tile's loop, so nothing in a tile overlaps.
    """

    def seconds(self, gpu: Gpu, reached: Efficiency | None = None) -> float:
        apart = Cost(flops=self.cost.flops), Cost(bytes=self.cost.bytes)
        return sum(Op("matmul", cost).seconds(gpu, reached) for cost in apart)


class EarlierTrainer(Compiled):
    """It is the trainer that this project replaced: attention writes its bf16 scores."""

    def attention(self, *, backward: bool) -> list[Op]:
        """The whole square is computed, in matmuls and a softmax.

        Forward the scores are written, read and written by the softmax, and read. Backward their
        gradient is written, three passes are the softmax's, q and k read twice and v once.
        """
        scores = costs.BF16 * self.tokens * self.model.num_attention_heads * self.seq_len
        matmul_passes, softmax_passes, matmuls = (4, 3, 4) if backward else (2, 2, 2)
        flops = matmuls * 2 * self.tokens * self.seq_len * self.model.hidden_size
        products = Cost(flops, scores * matmul_passes)
        return [
            ScoreProducts("attention_products", products, launches=matmuls),
            Op("attention", Cost(bytes=scores * softmax_passes)),
        ]


TRAINERS = {
    MicroBatch: "triton",
    Compiled: "torch.compile",
    EarlierTrainer: "earlier trainer",
}


@dataclass(frozen=True)
class MeasuredRun:
    option: str
    gpu: str
    trainer: type[MicroBatch]
    policy: Policy
    batch_size: int
    tokens_per_second: float
    micro_batches: int = 1
    """a step"""

    def predict(self) -> StepPrediction:
        config = replace(OPTIONS[self.option], batch_size=self.batch_size)
        policies = (self.policy,) * config.model.num_layers
        micro_batch_size = self.batch_size // self.micro_batches
        return predict(config, GPUS[self.gpu], policies, micro_batch_size, kind=self.trainer)

    @property
    def is_fitted(self) -> bool:
        """The card's efficiencies were fitted to this run among others."""
        return self.trainer is MicroBatch

    @property
    def error(self) -> float:
        """The error is predicted over measured tokens/s, less one."""
        return self.predict().tokens_per_second / self.tokens_per_second - 1


MEASURED_RUNS = (
    # The benchmark suite, 2026-11-25 (profiles/benchmarks-h100.md).
    MeasuredRun("current", "h100", MicroBatch, NONE, 48, 401_200),
    MeasuredRun("current", "h100", MicroBatch, SELECTIVE, 48, 397_867),
    MeasuredRun("current", "h100", MicroBatch, FULL, 48, 310_306),
    MeasuredRun("a", "h100", MicroBatch, NONE, 24, 225_688),
    MeasuredRun("a", "h100", MicroBatch, SELECTIVE, 24, 223_750),
    MeasuredRun("a", "h100", MicroBatch, FULL, 24, 175_660),
    MeasuredRun("a", "h100", MicroBatch, SELECTIVE, 24, 214_452, micro_batches=2),
    MeasuredRun("a", "h100", MicroBatch, SELECTIVE, 24, 202_305, micro_batches=4),
    MeasuredRun("a-short", "h100", MicroBatch, NONE, 32, 230_076),
    MeasuredRun("a-short", "h100", MicroBatch, SELECTIVE, 32, 229_759),
    MeasuredRun("a-short", "h100", MicroBatch, FULL, 32, 178_210),
    MeasuredRun("b", "h100", MicroBatch, NONE, 24, 232_425),
    MeasuredRun("b", "h100", MicroBatch, SELECTIVE, 24, 232_524),
    MeasuredRun("b", "h100", MicroBatch, FULL, 24, 180_475),
    MeasuredRun("c", "h100", MicroBatch, NONE, 24, 261_450),
    MeasuredRun("c", "h100", MicroBatch, SELECTIVE, 24, 256_437),
    MeasuredRun("c", "h100", MicroBatch, FULL, 24, 205_780),
    MeasuredRun("c", "h100", MicroBatch, SELECTIVE, 24, 242_585, micro_batches=2),
    MeasuredRun("c-shared", "h100", MicroBatch, NONE, 24, 209_842),
    MeasuredRun("c-shared", "h100", MicroBatch, SELECTIVE, 24, 207_727),
    MeasuredRun("c-shared", "h100", MicroBatch, FULL, 24, 164_057),
    MeasuredRun("a", "h100", Compiled, NONE, 24, 202_178),
    # 2026-11-23 and before (profiles/LOG.md).
    MeasuredRun("a", "h100", Compiled, FULL, 24, 160_320),
    MeasuredRun("a", "h100", EarlierTrainer, FULL, 24, 94_873),
    MeasuredRun("current", "h100", EarlierTrainer, FULL, 24, 156_008),
    # 2026-11-25.
    MeasuredRun("a", "h200", MicroBatch, NONE, 24, 231_319),
    MeasuredRun("a", "h200", MicroBatch, SELECTIVE, 24, 227_464),
    MeasuredRun("a", "h200", MicroBatch, SELECTIVE, 24, 218_794, micro_batches=2),
    MeasuredRun("a", "h200", MicroBatch, SELECTIVE, 24, 203_990, micro_batches=4),
    MeasuredRun("a", "h200", MicroBatch, FULL, 24, 180_571),
    MeasuredRun("a-short", "h200", MicroBatch, SELECTIVE, 32, 241_963),
    MeasuredRun("a-short", "h200", MicroBatch, FULL, 32, 188_174),
    MeasuredRun("b", "h200", MicroBatch, SELECTIVE, 24, 243_145),
    MeasuredRun("b", "h200", MicroBatch, FULL, 24, 186_870),
    MeasuredRun("current", "h200", MicroBatch, NONE, 48, 418_521),
    MeasuredRun("current", "h200", MicroBatch, SELECTIVE, 48, 415_469),
    MeasuredRun("current", "h200", MicroBatch, FULL, 48, 325_765),
    MeasuredRun("c", "h200", MicroBatch, NONE, 24, 278_317),
    MeasuredRun("c", "h200", MicroBatch, SELECTIVE, 24, 273_022),
    MeasuredRun("c", "h200", MicroBatch, SELECTIVE, 24, 255_502, micro_batches=2),
    MeasuredRun("c", "h200", MicroBatch, FULL, 24, 215_447),
    MeasuredRun("c-shared", "h200", MicroBatch, SELECTIVE, 24, 220_473),
    # In the training loop, 2026-11-29 (profiles/LOG.md).
    MeasuredRun("a", "h200", MicroBatch, SELECTIVE, 24, 230_599),
    MeasuredRun("c", "h200", MicroBatch, SELECTIVE, 24, 269_817),
    MeasuredRun("current", "h200", MicroBatch, SELECTIVE, 24, 408_350),
    # Its user's: the median of over 2,000 intervals in each of two runs, in fp16.
    MeasuredRun("current", "rtx-3090", EarlierTrainer, FULL, 24, 27_400),
)


def markdown_rows(runs: Iterable[MeasuredRun]) -> list[str]:
    """profiles/plan.md's table has these rows."""
    rows = []
    for run in runs:
        name = f"{run.option}, {TRAINERS[run.trainer]}, recompute {run.policy.name}"
        name += f", {run.micro_batches} micro-batches" if run.micro_batches > 1 else ""
        speeds = f"{run.tokens_per_second:,.0f} | {run.predict().tokens_per_second:,.0f}"
        fitted = "yes" if run.is_fitted else "no"
        rows.append(f"| {name} | {GPUS[run.gpu].name} | {speeds} | {run.error:+.1%} | {fitted} |")
    return rows
