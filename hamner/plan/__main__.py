"""The plan before the run: `python -m hamner.plan --option a`.

Parameters, VRAM, speed, hours and expected loss of an option on one GPU or several, by arithmetic
alone: no GPU and no torch, so the answer comes at once. With a run's metrics it also says where
that run is heading; with `--report` it writes the whole analysis as a document.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hamner.cli import run_command
from hamner.config.model import flag
from hamner.config.options import OPTIONS
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.hardware import GIB, GPUS, PCIE4, RESERVE_GIB, Gpu
from hamner.plan.communication import ONE_GPU, QUIET, Parallelism
from hamner.plan.loss import BESIROGLU, KNOWN_RUN, LossLaw, RunProjection, project, read_run
from hamner.plan.memory import MemoryPlan, Policy, choose
from hamner.plan.step_time import StepPrediction, predict

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
    gpus: int = 1
    """such cards in each node (torchrun --nproc-per-node)"""
    nodes: int = 1
    """machines (torchrun --nnodes)"""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: the whole model on each GPU; fsdp: sharded over the GPUs of a node; auto: ddp where it
    fits, else fsdp"""
    link: float | None = None
    """GB/s each way between the GPUs of a node, as nccl-tests' busbw; None: what the card has
    without a bridge"""
    network: float = 1.25
    """GB/s each way of a node's network; 1.25 is Ethernet of 10 Gbit/s"""
    batch_size: int | None = None
    """sequences per optimizer step, over all GPUs, as in hamner.train: N GPUs take an Nth each;
    None: what the option plans"""
    tokens: float | None = None
    """tokens to train on, such as 10e9; None: what the option plans"""
    vram_budget: float | None = None
    """GiB the run may take of each GPU; None: the card's memory less 2 GiB"""
    metrics: Path | None = None
    """metrics.jsonl of a run of --option, or a CSV with columns step, loss, tokens_total"""
    report: Path | None = None
    """also write the analysis here as Markdown, with its plots in a folder beside it"""


@dataclass(frozen=True)
class Plan:
    """One option on one card, or on several of a kind."""

    option: TrainConfig
    gpu: Gpu
    parallelism: Parallelism
    tokens: int
    vram_budget: int
    """bytes of each GPU"""
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

    @property
    def rows_per_gpu(self) -> int:
        """Sequences of each GPU in a step."""
        return self.parallelism.rows_per_gpu(self.option.batch_size)

    @property
    def communication_share(self) -> float:
        """Of a step's time, what communication adds to it."""
        return self.prediction.communication.exposed_ms / self.prediction.step_ms

    @property
    def efficiency(self) -> float | None:
        """Tokens/s over those of as many GPUs, each alone at the option's own batch.

        None where one GPU alone has too little memory.
        """
        option = OPTIONS[self.option.option]
        try:
            alone = make_plan(option, self.gpu, vram_budget=self.vram_budget / GIB)
        except UserError:
            return None
        speed = self.prediction.tokens_per_second / self.parallelism.ranks
        return speed / alone.prediction.tokens_per_second

    def with_quiet_communication(self) -> "Plan | None":
        """This plan, its batch doubled until communication takes less than QUIET of a step.

        Recomputation stays as it is, so that what does not fit becomes micro-batches. None where
        even 64 times the batch does not: within a node FSDP sends with every micro-batch.
        """
        for times in (2, 4, 8, 16, 32, 64):
            option = replace(self.option, batch_size=times * self.option.batch_size)
            try:
                larger = make_plan(
                    option,
                    self.gpu,
                    self.parallelism,
                    tokens=max(self.tokens, option.tokens_per_step),
                    vram_budget=self.vram_budget / GIB,
                    policies=self.memory.policies,
                )
            except UserError:
                # No room for the fp32 sums that several micro-batches take.
                return None
            if larger.communication_share < QUIET:
                return larger
        return None

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
        return Gpu("custom GPU", "(?!)", bf16, fp32, bandwidth, memory, 0, 0, 0, PCIE4)
    if spec is not None:
        raise UserError(f"--gpu-spec describes a custom card: use it with --gpu custom, not {name}")
    if name not in GPUS:
        raise UserError(f"--gpu {name} is not one of {', '.join(GPUS)}, custom")
    return GPUS[name]


def find_parallelism(config: PlanConfig, gpu: Gpu) -> Parallelism:
    """What `--gpus`, `--nodes`, `--parallel`, `--link` and `--network` mean.

    Raises:
        UserError: a number that makes no sense, or shards over nodes of one GPU.
    """
    for name in ("gpus", "nodes", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{flag(name)} {value} must be above 0")
    link = gpu.link.gbs if config.link is None else config.link
    for name, gbs in (("link", link), ("network", config.network)):
        if not 0 < gbs < math.inf:
            raise UserError(f"--{name} {gbs:g} must be above 0 and finite, in GB/s")
    if config.parallel == "fsdp" and config.gpus == 1:
        raise UserError(
            "--parallel fsdp shards the model over the GPUs of a node: give --gpus 2 or more"
        )
    return Parallelism(config.parallel, config.gpus, config.nodes, link, config.network)


def make_plan(
    option: TrainConfig,
    gpu: Gpu,
    parallelism: Parallelism = ONE_GPU,
    *,
    tokens: float | None = None,
    vram_budget: float | None = None,
    policies: tuple[Policy, ...] | None = None,
) -> Plan:
    """Plan a bf16 run of `option`.

    Args:
        option: model, batch (over all GPUs) and schedule.
        gpu: the card.
        parallelism: how many of them and what connects them; "auto" is DDP where that fits.
        tokens: to train on; default: the option's.
        vram_budget: GiB of each GPU; default: the card's memory less RESERVE_GIB.
        policies: recomputation, one per layer; default: the fastest that fits.

    Raises:
        UserError: fewer tokens than one step has, a budget that is beyond the card or too small, or
            a batch that the GPUs cannot share evenly.
    """
    if parallelism.kind == "auto":
        wishes = {"tokens": tokens, "vram_budget": vram_budget, "policies": policies}
        try:
            return make_plan(option, gpu, replace(parallelism, kind="ddp"), **wishes)
        except UserError:
            if parallelism.gpus_per_node == 1:
                raise
            return make_plan(option, gpu, replace(parallelism, kind="fsdp"), **wishes)
    tokens = option.tokens if tokens is None else tokens
    if not option.tokens_per_step <= tokens < math.inf:
        raise UserError(
            f"--tokens {tokens:g} must be at least one step of option {option.option}, "
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
        policies=policies,
        parallelism=parallelism,
    )
    prediction = predict(
        option.model,
        gpu,
        policies=memory.policies,
        micro_batch_size=memory.micro_batch_size,
        batch_size=option.batch_size,
        seq_len=option.seq_len,
        parallelism=parallelism,
    )
    return Plan(option, gpu, parallelism, int(tokens), int(vram_budget * GIB), memory, prediction)


def compare(
    gpu: Gpu,
    parallelism: Parallelism = ONE_GPU,
    *,
    batch_size: int | None = None,
    tokens: float | None = None,
    vram_budget: float | None = None,
) -> tuple[list[Plan], dict[str, str]]:
    """Plan every option of the comparison: those that fit, and why the others do not."""
    plans, misfits = [], {}
    for name in COMPARED:
        option = _with_batch(OPTIONS[name], batch_size)
        try:
            plans.append(
                make_plan(option, gpu, parallelism, tokens=tokens, vram_budget=vram_budget)
            )
        except UserError as error:
            misfits[name] = str(error)
    return plans, misfits


def _with_batch(option: TrainConfig, batch_size: int | None) -> TrainConfig:
    return option if batch_size is None else replace(option, batch_size=batch_size)


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
    parallelism = find_parallelism(config, gpu)
    wishes = {"tokens": config.tokens, "vram_budget": config.vram_budget}
    plans, misfits = compare(gpu, parallelism, batch_size=config.batch_size, **wishes)
    asked = None
    if config.option != "all":
        option = _with_batch(OPTIONS[config.option], config.batch_size)
        asked = make_plan(option, gpu, parallelism, **wishes)
    if not asked and not plans:
        raise UserError(misfits["a"])
    candidates = plans or [asked]
    hours = next((p for p in candidates if p.option.option == "a"), candidates[0]).hours
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

    from hamner.plan import report

    config = tyro.cli(PlanConfig, args=list(argv), prog="python -m hamner.plan")
    analysis = analyse(config)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(Markdown(report.screen(analysis, every_option=config.option == "all")))
    if config.report:
        report.write_report(config.report, analysis)
        console.print(f"report: {config.report}", markup=False, highlight=False)


if __name__ == "__main__":
    run_command(main)
