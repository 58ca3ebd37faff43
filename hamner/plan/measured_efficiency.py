"""A card's own efficiencies are taken from its report card."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean

from hamner.config.options import OPTIONS
from hamner.errors import UserError
from hamner.hardware import GIB, GPUS, Gpu, identify
from hamner.plan.efficiency import Efficiency, efficiency
from hamner.plan.memory import parse
from hamner.plan.report_card import (
    Device,
    KernelTime,
    MatmulRate,
    ReportCard,
    StepMeasurement,
)
from hamner.plan.step_time import ATTENTION_LAUNCHES, GRAPH_GAP_US, StepPrediction, predict

_MODEL = (0.96, 1.04)
"""as for the cards that steps were fitted on"""
_CLOCK = (0.95, 1.02)
"""hours of load warm a card more than the minutes of a report card"""
_WITHOUT_STEP = (0.92, 1.06)
"""from kernels to a step, where none was timed: a warm GPU runs them slower than one by one"""
_HEAD_SIZE = 64
"""of every option, and so of the shares of attention"""


def known_gpu(card: ReportCard) -> tuple[Gpu, Efficiency]:
    """The function gives the card, and what was known of such cards before this one was measured,
    at its power limit.

    A card that the table lacks has as its peak the fastest that was measured.
    """
    device, gpu = card.device, identify(card.device.gpu)
    # In tenths, as the driver keeps some of what a card is sold with.
    memory_gib = math.floor(10 * device.memory_bytes / GIB) / 10
    if gpu is None:
        peak = max(rate.tflops for rate in card.matmuls)
        rates = {"bf16_tflops": peak, "fp32_tflops": peak / 2, "bandwidth_gbs": card.bandwidth_gbs}
        unknown = {"pattern": "(?!)", "clock_mhz": None, "power_w": None, "int8_tops": None}
        gpu = replace(GPUS["rtx-3090"], name=device.gpu, **rates, **unknown)
    gpu = replace(gpu, memory_gib=memory_gib)
    reached = efficiency(gpu)
    if limit := changed_power_limit(device, gpu):
        reached = reached.at_power(gpu, limit)
    return gpu, reached


def changed_power_limit(device: Device, gpu: Gpu) -> float | None:
    """The function gives the power limit, W, where it is known not to be that of a card as sold."""
    limit, sold_with = device.power_limit_w, gpu.power_w
    return limit if limit and sold_with and round(limit) != sold_with else None


def measured_efficiency(card: ReportCard) -> tuple[Gpu, Efficiency]:
    """The function gives the card, and what it reached as shares of its peak.

    Matmuls follow rate = peak * m / (m + half_dim), m the smallest dimension, with both fitted;
    kinds that the report card lacks keep the shares of such cards. The step model adds a gap to
    every kernel, so that of each time one is left out. Where option a was trained, all shares are
    multiplied by what makes its projection its measured speed.

    Raises:
        UserError: the measured step does not fit the measured kernels at all.
    """
    gpu, _ = known_gpu(card)
    base, device = efficiency(gpu), card.device
    # Clock and power are those that it was measured at, or not known.
    gpu = replace(gpu, clock_mhz=None, power_w=None)
    matmul, half_dim = _fit_matmuls(card, base.half_dim)
    flops = {**base.flops, "matmul": matmul / gpu.bf16_tflops}
    for direction in ("forward", "backward"):
        if peaks := _attention_peaks(card, direction, base.half_seq_len):
            flops[f"attention_{direction}"] = geometric_mean(peaks) / gpu.bf16_tflops
    grouped = [kernel for kernel in card.kernels if kernel.kind == "matmul_grouped"]
    if grouped:
        # A step has them in the report card's proportions.
        work = math.fsum(kernel.flops for kernel in grouped)
        flops["matmul_grouped"] = work / _net_ms(grouped) / 1e9 / gpu.bf16_tflops
    reached = Efficiency(
        flops,
        half_dim=half_dim,
        half_seq_len=base.half_seq_len,
        bandwidth=_bandwidth(card, gpu),
        ranges={"clock": _CLOCK, "model": _WITHOUT_STEP},
        why={
            "clock": "hours of load warm a card more than minutes",
            "model": "kernels were timed on this card, no step",
        },
        provenance=f"kernel efficiencies measured on this {device.gpu} on {card.date}"
        f"{_compiled_for(card)} (routing as norms, Muon's iteration as of such cards)",
        clock_mhz=device.load_clock_mhz,
        power_w=device.power_limit_w,
    )
    return gpu, _through_step(reached, gpu, card.step) if card.step else reached


def _compiled_for(card: ReportCard) -> str:
    if card.device.compiled_for == card.device.capability:
        return ""
    return " with the kernels of compute capability {}.{}".format(*card.device.compiled_for)


def _without_gaps(milliseconds: float, launches: int) -> float:
    """What the step model adds to every kernel is left out, but never more than half."""
    return milliseconds - min(1e-3 * GRAPH_GAP_US * launches, milliseconds / 2)


def _net_ms(kernels: Iterable[KernelTime]) -> float:
    return math.fsum(_without_gaps(kernel.measured_ms, kernel.launches) for kernel in kernels)


def _net_tflops(rate: MatmulRate) -> float:
    gflop = 2e-9 * rate.m * rate.k * rate.n
    return gflop / _without_gaps(gflop / rate.tflops, 1)


def _attention_peaks(card: ReportCard, direction: str, half_seq_len: float) -> list[float]:
    """The peak by each rate, TFLOP/s: of the head size of the options, if it was measured."""
    rates = [rate for rate in card.attention if rate.direction == direction]
    rates = [rate for rate in rates if rate.head_size == _HEAD_SIZE] or rates
    launches = ATTENTION_LAUNCHES[direction]
    return [
        rate.tflops
        * (rate.milliseconds / _without_gaps(rate.milliseconds, launches))
        * ((rate.seq_len + half_seq_len) / rate.seq_len)
        for rate in rates
    ]


def _fit_matmuls(card: ReportCard, half_dim: float) -> tuple[float, float]:
    """Peak, TFLOP/s, and half_dim are a line: 1 / rate = 1 / peak + half_dim / peak * 1 / m.

    Errors are relative, so each side is multiplied by the rate. Where the line makes no sense, or
    all dimensions are the same, `half_dim` is as given. Cubes do not count beside the shapes of a
    step: large ones take a GPU to its power limit, at a lower clock than a step has.
    """
    shapes = [r for r in card.matmuls if not r.m == r.k == r.n] or card.matmuls
    rates = [(_net_tflops(rate), min(rate.m, rate.k, rate.n)) for rate in shapes]
    x = [tflops for tflops, _ in rates]
    y = [tflops / dim for tflops, dim in rates]
    xx, xy, yy = (_dot(u, v) for u, v in ((x, x), (x, y), (y, y)))
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        inverse = (yy * sum(x) - xy * sum(y)) / determinant
        slope = (xx * sum(y) - xy * sum(x)) / determinant
        if inverse > 0 and slope >= 0:
            return 1 / inverse, slope / inverse
    peaks = [tflops * (dim + half_dim) / dim for tflops, dim in rates]
    return geometric_mean(peaks), half_dim


def _dot(u: Iterable[float], v: Iterable[float]) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def _bandwidth(card: ReportCard, gpu: Gpu) -> Mapping[str, float]:
    """The share of each kind is that of all its kernels; a large copy stands for norms."""
    kinds: dict[str, list[KernelTime]] = defaultdict(list)
    for kernel in filter(_is_traffic, card.kernels):
        kinds[kernel.kind].append(kernel)
    found = {kind: _gb_per_s(kernels) / gpu.bandwidth_gbs for kind, kernels in kinds.items()}
    return {"norm": card.bandwidth_gbs / gpu.bandwidth_gbs, **found}


def _gb_per_s(kernels: Sequence[KernelTime]) -> float:
    return math.fsum(kernel.bytes for kernel in kernels) / _net_ms(kernels) / 1e6


def _is_traffic(kernel: KernelTime) -> bool:
    """The kernel moves bytes and computes next to nothing."""
    return bool(kernel.kind) and kernel.bytes > 0 and kernel.flops < 10 * kernel.bytes


def _projected(reached: Efficiency, gpu: Gpu, step: StepMeasurement) -> StepPrediction:
    """The step that was measured, as it was made to fit the free memory."""
    option, policies = OPTIONS["a"], None
    with contextlib.suppress(UserError):
        policies = parse(step.recompute, option.model.num_layers)
    if policies is None or option.batch_size % step.micro_batch_size:
        raise UserError(
            f"--report-card: option a cannot have been trained with recompute {step.recompute}, "
            f"micro-batch {step.micro_batch_size}: make it again with python -m bench.report_card"
        )
    return predict(option, gpu, policies, step.micro_batch_size, reached=reached)


def _through_step(reached: Efficiency, gpu: Gpu, step: StepMeasurement) -> Efficiency:
    """All shares change by the factor at which option a's step takes what it took."""
    projected = _projected(reached, gpu, step)
    measured_ms = OPTIONS["a"].tokens_per_step / step.tokens_per_second * 1e3
    gaps = projected.milliseconds["gaps"]
    factor = (projected.step_ms - gaps) / (measured_ms - gaps)
    if not 0.5 < factor < 2:
        raise UserError(
            f"--report-card: option a took {measured_ms:,.0f} ms a step where its kernels say "
            f"{projected.step_ms:,.0f}: make it again with python -m bench.report_card, on a GPU "
            "that does nothing else"
        )
    # A run's speed is that of many steps, which differ less in their mean.
    spread = (
        (step.tokens_per_second_p10 / step.tokens_per_second) ** (step.steps**-0.5),
        (step.tokens_per_second_p90 / step.tokens_per_second) ** (step.steps**-0.5),
    )
    return replace(
        reached,
        flops={kind: factor * share for kind, share in reached.flops.items()},
        bandwidth={kind: factor * share for kind, share in reached.bandwidth.items()},
        ranges={**reached.ranges, "step": spread, "model": _MODEL},
        why={
            **reached.why,
            "step": f"p10 to p90 of {step.steps} steps of option a on this card, in their mean",
            "model": "from option a to another step",
        },
        provenance=f"{reached.provenance}, all multiplied by {factor:.2f}, at which option a's "
        f"step takes the {measured_ms:,.0f} ms that it took",
    )
