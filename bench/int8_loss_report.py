"""Runs in int8 are compared with those in bf16 of the same seeds, whose batches they share.

The difference in validation loss at the end has an interval over the seeds, by Student's t, and
stands beside the spread of bf16's seeds. So has the slope over tokens of the difference in training
loss; one seed's slope has the interval of a line through the means of parts of the run.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from bench.recipe_runs import configure
from bench.recipe_statistics import half_interval, with_interval
from bench.recipe_trials import Trial
from hamner.config.model import ModelConfig
from hamner.config.options import OPTIONS
from hamner.kernels.int8_linear import products
from hamner.model.int8 import Operand, int8_linears
from hamner.plan.loss import BESIROGLU
from hamner.plan.step_time import MicroBatch
from hamner.plan.words import short
from hamner.train.int8_guard import Int8Guard

WANTED_GAP, LARGEST_GAP = 0.005, 0.01
"""nats a token: what is wanted, and above which int8 does not ship"""
SLOPE_SHARE = 2 / 3
"""of a run, its end, over which the slope is taken: the warm-up's losses say little"""
PARTS = 8
"""of that, whose means a line is fitted to"""


@dataclass(frozen=True)
class Pair:
    """A pair is a run and bf16's of the same seed."""

    gap: float
    """validation loss less bf16's, nats a token"""
    slope: float
    """of the difference in training loss, nats a token per 100M tokens"""
    slope_error: float
    """half of the slope's 95% interval, from the run itself"""


def option_of(result: Mapping) -> str:
    """The function gives the option whose model, but for other flags, was trained."""
    return result["flags"][result["flags"].index("--option") + 1]


def groups_of(results: Sequence[Mapping]) -> dict[str, dict[str, dict[int, Mapping]]]:
    """The function gives, for all runs that differ in seed and arithmetic only, what they have in
    common, and their results by arithmetic and seed."""
    groups: dict = defaultdict(lambda: defaultdict(dict))
    for result in results:
        trial = Trial.of(result)
        *flags, _, matmul = trial.flags
        values = f"lr {trial.lr:g}, weight decay {trial.weight_decay:g}"
        common = f"{' '.join(flags)}, {trial.arm}, {values}, {short(trial.tokens)} tokens"
        groups[common][matmul][trial.seed] = result
    return groups


def pair(result: Mapping, base: Mapping) -> Pair:
    """The function compares two runs on the same batches."""
    curves = [{tokens: loss for tokens, loss, _ in r["curve"]} for r in (result, base)]
    common = sorted(
        tokens
        for tokens in curves[0].keys() & curves[1].keys()
        if tokens >= (1 - SLOPE_SHARE) * result["tokens"]
        and None not in (curves[0][tokens], curves[1][tokens])
    )
    differences = [curves[0][tokens] - curves[1][tokens] for tokens in common]
    slope, error = slope_of(common, differences)
    return Pair(result["val_loss"] - base["val_loss"], slope, error)


def slope_of(tokens: Sequence[int], differences: Sequence[float]) -> tuple[float, float]:
    """The function fits a line through the means of PARTS parts of a run: neighbouring points are
    not independent.

    Returns:
        Its slope per 100M tokens and half of that's 95% interval; NaN where there are too few
        points.
    """
    if len(tokens) < PARTS:
        return math.nan, math.nan
    x, y = (
        [float(np.mean(part)) for part in np.array_split(np.array(values), PARTS)]
        for values in ([t / 100e6 for t in tokens], differences)
    )
    line = stats.linregress(x, y)
    return line.slope, stats.t.ppf(0.975, PARTS - 2) * line.stderr


def share_of_tokens(gap: float, model: ModelConfig, tokens: int) -> float:
    """The function gives the share of these tokens after which bf16 has the loss that a run with
    this gap ends with, by hamner.plan's law."""
    parameters = model.num_parameters(active=True)
    reached = BESIROGLU.tokens_to_reach(BESIROGLU.loss(parameters, tokens) + gap, parameters)
    return math.inf if reached is None else reached / tokens


def int8_share(result: Mapping, model: ModelConfig) -> float:
    """The function gives the share of a run's int8 products, by FLOPs and steps, that were int8:
    the others had an operand that went back to bf16."""
    matmuls = MicroBatch(model, seq_len=1, tokens=1).block_matmuls()
    # A mixture has more matmuls than can be int8.
    flops = dict(zip(int8_linears(model), (op.cost.flops for op in matmuls), strict=False))
    total = model.num_layers * len(products(result["flags"][-1])) * sum(flops.values())
    # Operands of one matmul fall back at the same step.
    first_steps = {Operand(*operand).matmul: first for *operand, first in result[Int8Guard.KEY]}
    lost = sum(
        flops[linear] * (result["steps"] + 1 - first) / result["steps"]
        for (_, linear, _), first in first_steps.items()
    )
    return 1 - lost / total


def describe(arms: Mapping[str, Mapping[int, Mapping]], speeds: Mapping[str, float]) -> list[str]:
    """The lines compare the arms of a group with its bf16."""
    base = {seed: r for seed, r in arms.get("bf16", {}).items() if not r["diverged"]}
    losses = [result["val_loss"] for result in base.values()]
    lines = []
    if losses:
        spread = f", standard deviation {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        lines.append(f"bf16: {statistics.fmean(losses):.4f} over {len(losses)} seeds{spread}")
    for matmul, results in arms.items():
        if matmul == "bf16":
            continue
        diverged = sum(result["diverged"] for result in results.values())
        if diverged:
            lines.append(f"{matmul}: {diverged} of {len(results)} runs diverged")
        both = [s for s in sorted(results.keys() & base) if not results[s]["diverged"]]
        if both:
            of_both = [(results[seed], base[seed]) for seed in both]
            lines += describe_pairs(matmul, of_both, speeds.get(matmul))
        elif diverged < len(results):
            lines.append(f"{matmul}: no run in bf16 of the same seed to compare with yet")
    return lines


def describe_pairs(
    matmul: str, both: Sequence[tuple[Mapping, Mapping]], speed: float | None
) -> list[str]:
    """The lines are about the runs of an arm, each beside bf16's of the same seed."""
    model = configure(Trial.of(both[0][0]), Path()).model
    found = [pair(*runs_of_a_seed) for runs_of_a_seed in both]
    gaps, slopes = [p.gap for p in found], [p.slope for p in found]
    gap, slope = statistics.fmean(gaps), statistics.fmean(slopes)
    slope_half = found[0].slope_error if len(found) == 1 else half_interval(slopes)
    verdict = "as wanted"
    if gap > WANTED_GAP:
        verdict = "above what is wanted"
    elif math.isnan(slope):
        verdict = "small so far"
    elif slope - slope_half > 0:
        verdict = "small, but it grows"
    if gap > LARGEST_GAP:
        verdict = "too much to ship"
    lines = [
        f"{matmul}: gap {with_interval(gap, half_interval(gaps))} nats a token over {len(found)} "
        f"seeds, {verdict}; slope {with_interval(slope, slope_half)} per 100M tokens"
    ]
    # Rows of an earlier version do not say what fell back.
    say = [result for result, _ in both if Int8Guard.KEY in result]
    if say:
        share = statistics.fmean(int8_share(result, model) for result in say)
        fallen = (f"{len(result[Int8Guard.KEY])} of seed {result['seed']}" for result in say)
        lines.append(
            f"{matmul}: {share:.1%} of its products stayed int8; operands that went back to bf16: "
            f"{', '.join(fallen)}"
        )
    speeds = [
        result["tokens_per_second"] / base["tokens_per_second"]
        for result, base in both
        if result["tokens_per_second"] and base["tokens_per_second"]
    ]
    if speed is None and speeds:
        speed = statistics.median(speeds)
    if speed is not None:
        tokens = OPTIONS[option_of(both[0][0])].tokens
        share = share_of_tokens(gap, model, tokens)
        lines.append(
            f"{matmul}: {speed:.3f} times bf16's tokens/s, {share * speed:.3f} net: by the scaling "
            f"law bf16 has that loss after {share:.1%} of {short(tokens)} tokens"
        )
    return lines
