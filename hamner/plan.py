"""The plan before the run: `python -m hamner.plan --option a`.

Parameters, VRAM, speed, hours and expected loss of an option on a card, by arithmetic alone: no GPU
and no torch, so the answer comes at once. With a run's metrics it also says where that run is
heading; with `--report` it writes the whole analysis as a document.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hamner.cli import run_command
from hamner.cost_model import StepPrediction, predict
from hamner.errors import UserError
from hamner.hardware import GPUS, Gpu
from hamner.options import OPTIONS, Option
from hamner.recompute import GIB, RESERVE_GIB, MemoryPlan, choose
from hamner.scaling_law import BESIROGLU, KNOWN_RUN, LossLaw, RunProjection, project, read_run

COMPARED = ("current", "a", "a-short", "b", "c", "c-shared")


@dataclass(frozen=True)
class PlanConfig:
    """Say what a run will take before it starts, and where one under way is heading."""

    option: str = "a"
    """option to plan (tiny, current, a, a-short, b, c, c-shared), or all to compare them"""
    gpu: str = "rtx-3090"
    """card: a name in hamner.hardware.GPUS, or custom with --gpu-spec"""
    gpu_spec: tuple[float, float, float, float] | None = None
    """a custom card: dense bf16 TFLOP/s, GB/s, GiB, fp32 TFLOP/s"""
    tokens: float | None = None
    """tokens to train on, such as 10e9; None: what the option plans"""
    vram_budget: float | None = None
    """GiB the run may take; None: the card's memory less 2 GiB"""
    metrics: Path | None = None
    """metrics.jsonl of a run of --option, or a CSV with columns step, loss, tokens_total"""
    report: Path | None = None
    """also write the analysis here as Markdown, with its plots in a folder beside it"""


@dataclass(frozen=True)
class Plan:
    """One option on one card."""

    option: Option
    gpu: Gpu
    tokens: int
    vram_budget: int
    """bytes"""
    memory: MemoryPlan
    prediction: StepPrediction

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.option.model.num_parameters()

    @property
    def active_parameters(self) -> int:
        """Those one token goes through."""
        return self.option.model.num_parameters(active=True)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.option.tokens_per_step

    @property
    def hours(self) -> float:
        """Projected duration, evaluation and saving aside."""
        return self.tokens / self.prediction.tokens_per_second / 3600

    def loss_range(self, law: LossLaw, tokens: float | None = None) -> tuple[float, float]:
        """Expected loss after `tokens` (default: at the end), lower and upper bound.

        The law is about dense models: a mixture of experts should end between a dense model of all
        its parameters and one of its active ones. For a dense model both are the same.
        """
        tokens = tokens or self.tokens
        return law.loss(self.parameters, tokens), law.loss(self.active_parameters, tokens)

    def tokens_in(self, hours: float) -> float:
        """Tokens trained on in `hours`."""
        return hours * 3600 * self.prediction.tokens_per_second


@dataclass(frozen=True)
class Analysis:
    """All that the command prints and the report writes."""

    plan: Plan
    """of the option asked for; of the recommended one where all were"""
    recommended: Plan
    hours: float
    """the time in which options are compared: what `a` takes, or else the first of them"""
    plans: list[Plan]
    """of every option that fits"""
    misfits: dict[str, str]
    """option: why it does not fit"""
    run: RunProjection | None

    @property
    def local_law(self) -> LossLaw:
        """The law shifted through the run under way, or else through the known 164M run."""
        return self.run.law if self.run else BESIROGLU.through(*KNOWN_RUN)


def find_gpu(name: str, spec: tuple[float, float, float, float] | None) -> Gpu:
    """The card `--gpu` and `--gpu-spec` mean.

    Raises:
        UserError: an unknown name, or a spec that is missing, superfluous or not positive.
    """
    if name == "custom":
        if spec is None or not all(0 < value < math.inf for value in spec):
            raise UserError(
                "--gpu custom needs --gpu-spec with four numbers above 0: "
                "dense bf16 TFLOP/s, GB/s, GiB, fp32 TFLOP/s"
            )
        bf16, bandwidth, memory, fp32 = spec
        return Gpu("custom GPU", "(?!)", bf16, fp32, bandwidth, memory, 0, 0, 0)
    if spec is not None:
        raise UserError(f"--gpu-spec describes a custom card: use it with --gpu custom, not {name}")
    if name not in GPUS:
        raise UserError(f"--gpu {name} is not one of {', '.join(GPUS)}, custom")
    return GPUS[name]


def make_plan(
    option: Option, gpu: Gpu, *, tokens: float | None = None, vram_budget: float | None = None
) -> Plan:
    """Plan a bf16 run of `option` on one `gpu`.

    Args:
        option: model, batch and schedule.
        gpu: the card.
        tokens: to train on; default: the option's.
        vram_budget: GiB; default: the card's memory less RESERVE_GIB.

    Raises:
        UserError: fewer tokens than one step has, or a budget that is beyond the card or too small.
    """
    tokens = option.tokens if tokens is None else tokens
    if not option.tokens_per_step <= tokens < math.inf:
        raise UserError(
            f"--tokens {tokens:g} must be at least one step of option {option.name}, "
            f"{option.tokens_per_step:,}"
        )
    vram_budget = gpu.memory_gib - RESERVE_GIB if vram_budget is None else vram_budget
    if not 0 < vram_budget <= gpu.memory_gib:
        raise UserError(
            f"--vram-budget {vram_budget:g} GiB must be above 0 and at most the "
            f"{gpu.memory_gib:g} GiB of the {gpu.name}"
        )
    memory = choose(
        option.model,
        batch_size=option.batch_size,
        seq_len=option.seq_len,
        precision="bf16",
        fused=True,
        budget=int(vram_budget * GIB),
    )
    prediction = predict(
        option.model,
        gpu,
        policies=memory.policies,
        micro_batch_size=memory.micro_batch_size,
        batch_size=option.batch_size,
        seq_len=option.seq_len,
    )
    return Plan(option, gpu, int(tokens), int(vram_budget * GIB), memory, prediction)


def compare(
    gpu: Gpu, *, tokens: float | None = None, vram_budget: float | None = None
) -> tuple[list[Plan], dict[str, str]]:
    """Plan every option of the comparison: those that fit, and why the others do not."""
    plans, misfits = [], {}
    for name in COMPARED:
        try:
            plans.append(make_plan(OPTIONS[name], gpu, tokens=tokens, vram_budget=vram_budget))
        except UserError as error:
            misfits[name] = str(error)
    return plans, misfits


def recommend(plans: Sequence[Plan], hours: float) -> Plan:
    """The lowest expected loss after `hours`, a mixture of experts by its active parameters.

    Options trained on less than their full context are left out where others are there: the law
    does not see context length.
    """
    full_context = [p for p in plans if p.option.seq_len == p.option.model.max_seq_len]
    return min(full_context or plans, key=lambda p: p.loss_range(BESIROGLU, p.tokens_in(hours))[1])


def analyse(config: PlanConfig) -> Analysis:
    """Do what the flags ask, short of printing it.

    Raises:
        UserError: bad input, or nothing that fits.
    """
    gpu = find_gpu(config.gpu, config.gpu_spec)
    if config.option != "all" and config.option not in OPTIONS:
        raise UserError(f"--option {config.option} is not one of {', '.join(OPTIONS)}, all")
    if config.option == "all" and config.metrics:
        raise UserError("--metrics needs the --option that the run trains, not all")
    wishes = {"tokens": config.tokens, "vram_budget": config.vram_budget}
    plans, misfits = compare(gpu, **wishes)
    asked = None if config.option == "all" else make_plan(OPTIONS[config.option], gpu, **wishes)
    if not asked and not plans:
        raise UserError(misfits["a"])
    candidates = plans or [asked]
    hours = next((p for p in candidates if p.option.name == "a"), candidates[0]).hours
    recommended = recommend(candidates, hours)
    plan = asked or recommended
    run = None
    if config.metrics:
        curve = read_run(config.metrics)
        end = max(plan.tokens, float(curve.tokens[-1]))
        run = project(curve, plan.active_parameters, end)
    return Analysis(plan, recommended, hours, plans, misfits, run)


def main(argv: Sequence[str]) -> None:
    """Print the plan; write the report where one is asked for."""
    import tyro
    from rich.console import Console
    from rich.markdown import Markdown

    from hamner import plan_report

    config = tyro.cli(PlanConfig, args=list(argv), prog="python -m hamner.plan")
    analysis = analyse(config)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(Markdown(plan_report.screen(analysis, every_option=config.option == "all")))
    if config.report:
        plan_report.write_report(config.report, analysis)
        console.print(f"report: {config.report}", markup=False, highlight=False)


if __name__ == "__main__":
    run_command(main)
