"""`python -m hamner.plan --option a` makes the plan before the run.

Parameters, VRAM, speed, hours and expected loss of an option on one GPU or several, by arithmetic
alone: no GPU and no torch, so the answer comes at once. With a run's metrics it also says where
that run is heading; with `--report` it writes the whole analysis as a document.
"""

import sys

if __package__ != "hamner.plan":
    print("error: start this with python -m hamner.plan", file=sys.stderr)
    raise SystemExit(2)

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hamner.cli import read_flags, run_command
from hamner.config.model import ModelConfig, flag
from hamner.config.options import OPTIONS, for_option
from hamner.config.recipe import RECIPES, Recipe
from hamner.config.train import CONFIG_FILE, Matmul, TrainConfig
from hamner.errors import UserError
from hamner.hardware import GPUS, PCIE4, Gpu
from hamner.plan import report
from hamner.plan.analysis import COMPARED, Analysis, Plan, make_plan, recommend
from hamner.plan.communication import Parallelism
from hamner.plan.efficiency import Efficiency, efficiency
from hamner.plan.measured_efficiency import measured_efficiency
from hamner.plan.projection import RunProjection
from hamner.plan.report_card import ReportCard
from hamner.plan.run_curve import read_run

RATES = 1e-3, 1e6
"""of a card or a link, in its unit: none is beyond them, and numbers would overflow"""
MOST_TOKENS = 1e15


@dataclass(frozen=True)
class PlanConfig:
    """Say what a run will take before it starts, and where one under way is heading."""

    option: str = "a"
    """option to plan (tiny, current, a, a-short, b, c, c-shared), or all to compare them"""
    recipe: Recipe = "plan"
    """how the model learns, as in hamner.train: memory and speed are this recipe's"""
    matmul: Matmul = "bf16"
    """arithmetic of the linear layers, as in hamner.train; how fast int8 is, is projected"""
    gpu: str | None = None
    """card: rtx-3090, rtx-3090-ti, rtx-4090, rtx-5090, a100-40gb, a100-80gb, h100, h100-pcie, h200,
    or custom with --gpu-spec; default rtx-3090, or the card of --report-card"""
    gpu_spec: tuple[float, float, float, float] | None = None
    """a custom card: dense bf16 TFLOP/s, GB/s, GiB, fp32 TFLOP/s"""
    report_card: Path | None = None
    """plan with what this card reached: the JSON that python -m bench.report_card wrote"""
    power_limit: float | None = None
    """watts, as nvidia-smi -pl sets them; default as the card is sold"""
    clock: float | None = None
    """MHz of the multiprocessors under load, as nvidia-smi shows them; default not known"""
    gpus: int = 1
    """such cards in each node (torchrun --nproc-per-node)"""
    nodes: int = 1
    """machines (torchrun --nnodes)"""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: the whole model on each GPU; fsdp: sharded over the GPUs of a node; auto: ddp where it
    fits, else fsdp"""
    link: float | None = None
    """GB/s each way between the GPUs of a node, as nccl-tests' busbw; default what the card has
    without a bridge"""
    network: float = 1.25
    """GB/s each way of a node's network; 1.25 is Ethernet of 10 Gbit/s"""
    batch_size: int | None = None
    """sequences per optimizer step, over all GPUs, as in hamner.train: N GPUs take an Nth each;
    default what the option plans"""
    tokens: float | None = None
    """tokens to train on, such as 10e9; default what the option plans"""
    vram_budget: float | None = None
    """GiB the run may take of each GPU; default the card's memory less 2 GiB"""
    metrics: Path | None = None
    """metrics.jsonl of a run of --option, or a CSV with columns step, loss, tokens_total and,
    where known, learning_rate"""
    report: Path | None = None
    """also write the analysis here as Markdown, with its plots in a folder beside it"""


def require_rates(name: str, values: Sequence[float], unit: str = "") -> None:
    """The function refuses what no card or link has.

    Raises:
        UserError: it names the flag.
    """
    if not all(RATES[0] <= value <= RATES[1] for value in values):
        given = " ".join(f"{value:g}" for value in values)
        low, high = RATES
        raise UserError(f"--{name} {given} must be between {low:g} and {high:,.0f}{unit}")


def find_gpu(name: str | None, spec: tuple[float, float, float, float] | None) -> Gpu:
    """The function finds the card that `--gpu` and `--gpu-spec` mean.

    Raises:
        UserError: an unknown name, or a spec that is missing, superfluous or absurd.
    """
    name = "rtx-3090" if name is None else name
    if name == "custom":
        if spec is None:
            raise UserError(
                "--gpu custom needs --gpu-spec with four numbers: "
                "dense bf16 TFLOP/s, GB/s, GiB, fp32 TFLOP/s"
            )
        require_rates("gpu-spec", spec)
        bf16, bandwidth, memory, fp32 = spec
        rates = {"bf16_tflops": bf16, "fp32_tflops": fp32, "bandwidth_gbs": bandwidth}
        card = {"shared_memory_bytes": GPUS["rtx-3090"].shared_memory_bytes, "link": PCIE4}
        return Gpu("custom GPU", pattern="(?!)", memory_gib=memory, **card, **rates)
    if spec is not None:
        raise UserError(f"--gpu-spec describes a custom card: use it with --gpu custom, not {name}")
    if name not in GPUS:
        raise UserError(f"--gpu {name} is not one of {', '.join(GPUS)}, custom")
    return GPUS[name]


def find_card(config: PlanConfig) -> tuple[Gpu, Efficiency]:
    """The function finds the card and what it reaches, at the clock or the power that is asked for.

    Raises:
        UserError: bad flags, or a report card that cannot be read.
    """
    if config.report_card is None:
        gpu = find_gpu(config.gpu, config.gpu_spec)
        reached = efficiency(gpu)
    elif config.gpu is not None or config.gpu_spec is not None:
        raise UserError("--report-card says which card it is of: leave out --gpu and --gpu-spec")
    else:
        gpu, reached = measured_efficiency(ReportCard.read(config.report_card))
    limits = {"clock": config.clock, "power_limit": config.power_limit}
    for name, value in limits.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag(name)} {value:g} must be above 0 and finite")
    if None not in limits.values():
        raise UserError("--power-limit is there to guess the clock that --clock gives: give one")
    if config.clock is not None:
        reached = reached.at_clock(gpu, config.clock)
    if config.power_limit is not None:
        reached = reached.at_power(gpu, config.power_limit)
    return gpu, reached


def find_parallelism(config: PlanConfig, gpu: Gpu) -> Parallelism:
    """The function reads `--gpus`, `--nodes`, `--parallel`, `--link` and `--network`.

    Raises:
        UserError: a number that makes no sense, or shards over nodes of one GPU.
    """
    for name in ("gpus", "nodes", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{flag(name)} {value} must be above 0")
    link = gpu.link.gbs if config.link is None else config.link
    for name, gbs in (("link", link), ("network", config.network)):
        require_rates(name, (gbs,), " GB/s")
    if config.parallel == "fsdp" and config.gpus == 1:
        raise UserError(
            "--parallel fsdp shards the model over the GPUs of a node: give --gpus 2 or more"
        )
    return Parallelism(config.parallel, config.gpus, config.nodes, link, network_gbs=config.network)


def plan_option(
    name: str, config: PlanConfig, card: tuple[Gpu, Efficiency], parallelism: Parallelism
) -> Plan:
    """The option is planned with batch, recipe, tokens and budget as the flags ask for them.

    Raises:
        UserError: it does not fit, or has fewer tokens than one step or absurdly many.
    """
    option = for_option(name, config.recipe)
    option = replace(
        option, batch_size=config.batch_size or option.batch_size, matmul=config.matmul
    )
    tokens = OPTIONS[name].tokens if config.tokens is None else config.tokens
    if not option.tokens_per_step <= tokens <= MOST_TOKENS:
        raise UserError(
            f"--tokens {tokens:g} must be at least one step of option {name}, "
            f"{option.tokens_per_step:,}, and at most {MOST_TOKENS:g}"
        )
    option = replace(option, tokens=int(tokens))
    gpu, reached = card
    return make_plan(option, gpu, parallelism, vram_budget=config.vram_budget, reached=reached)


def find_model(metrics: Path, planned: TrainConfig) -> ModelConfig:
    """The model is that of the run, whose configuration may lie beside its log, or the planned one.

    Raises:
        UserError: it is a run of another option.
    """
    try:
        run = TrainConfig.read(metrics.with_name(CONFIG_FILE))
    except UserError:
        return planned.model
    if run.option != planned.option:
        raise UserError(
            f"--metrics {metrics} is of a run of option {run.option}, not of --option "
            f"{planned.option}: give --option {run.option}"
        )
    return run.model


def analyse(config: PlanConfig) -> Analysis:
    """The function does what the flags ask, short of printing it.

    Raises:
        UserError: bad input, or nothing that fits.
    """
    card, is_all = find_card(config), config.option == "all"
    if not is_all and config.option not in OPTIONS:
        raise UserError(f"--option {config.option} is not one of {', '.join(OPTIONS)}, all")
    if is_all and config.metrics:
        raise UserError("--metrics needs the --option that the run trains, not all")
    parallelism = find_parallelism(config, card[0])
    plans, misfits = [], {}
    for name in COMPARED:
        try:
            plans.append(plan_option(name, config, card, parallelism))
        except UserError as error:
            misfits[name] = str(error)
    asked = None if is_all else plan_option(config.option, config, card, parallelism)
    if not asked and not plans:
        raise UserError(misfits["a"])
    candidates = plans or [asked]
    hours = next((p for p in candidates if p.config.option == "a"), candidates[0]).hours
    recommended = recommend(candidates, hours)
    plan = asked or recommended
    run = None
    if config.metrics:
        model = find_model(config.metrics, plan.config)
        curve = read_run(config.metrics, math.log(model.vocab_size))
        end = max(plan.config.tokens, float(curve.tokens[-1]))
        run = RunProjection(curve, model.num_parameters(active=True), end)
    by_recipe = []
    for recipe in RECIPES:
        with contextlib.suppress(UserError):  # Muon's update has to fit too
            asked_for = replace(config, recipe=recipe)
            by_recipe.append(plan_option(plan.config.option, asked_for, card, parallelism))
    return Analysis(plan, recommended, hours, plans, misfits=misfits, run=run, by_recipe=by_recipe)


def main(argv: Sequence[str]) -> None:
    """The command prints the plan, and writes the report where one is asked for."""
    from rich.console import Console
    from rich.markdown import Markdown

    config = read_flags(PlanConfig, argv, "hamner.plan")
    if config.report:
        report.require_report(config.report)
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
