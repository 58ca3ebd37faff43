"""Training runs that really happened: the points that the speed model is held against."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hamner.config.options import OPTIONS
from hamner.hardware import GPUS
from hamner.plan import costs
from hamner.plan.memory import FULL, NONE, SELECTIVE, Policy
from hamner.plan.step_time import TRITON, Implementation, StepPrediction, predict

# A plain model under torch.compile, fp32 weights and bf16 autocast. rope_traffic and loss_passes
# follow from its measured breakdown on an H100: 7.7 ms of RoPE with its copies, 3.4 ms of loss.
COMPILED = Implementation(
    name="torch.compile",
    fused_attention=True,
    recomputes_operands=False,
    chunked_loss=False,
    rope_traffic=3.35,
    folds_rope=False,
    loss_passes=4,
    optimizer_bytes=2 * 4 + 3 * 4 + 3 * 4 + (4 + 2) + (2 + 4),
    graphed=False,
)
# The trainer this project replaced: COMPILED, but attention writes its scores; blocks recomputed.
EARLIER = replace(COMPILED, name="earlier trainer", fused_attention=False)
# TRITON as it was when first measured: whole fp32 masters, the bf16 weights only written;
# attention cuDNN's, with RoPE's backward in a pass of its own.
_FIRST_KERNELS = replace(
    TRITON,
    optimizer_bytes=(costs.gradient_norm(1) + costs.adamw(1, split_master=False)).bytes,
    folds_rope=False,
    graphed=False,
)


@dataclass(frozen=True)
class MeasuredRun:
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


def markdown_rows(runs: Iterable[MeasuredRun]) -> list[str]:
    """Rows of docs/planning.md's table."""
    rows = []
    for run in runs:
        name = f"{run.option}, {run.implementation.name}, recompute {run.policy.name}"
        name += f", {run.micro_batches} micro-batches" if run.micro_batches > 1 else ""
        speeds = f"{run.tokens_per_second:,.0f} | {run.predict().tokens_per_second:,.0f}"
        fitted = "yes" if run.fitted else "no"
        rows.append(f"| {name} | {GPUS[run.gpu].name} | {speeds} | {run.error:+.1%} | {fitted} |")
    return rows
