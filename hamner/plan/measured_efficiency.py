"""A card's own efficiencies are taken from its report card."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import geometric_mean, median

from hamner.config.options import OPTIONS
from hamner.errors import UserError
from hamner.hardware import GIB, GPUS, Gpu, identify
from hamner.plan.analysis import make_plan
from hamner.plan.efficiency import Efficiency, efficiency
from hamner.plan.report_card import KernelTime, ReportCard, StepMeasurement

_MODEL = (0.96, 1.04)
"""as for the cards that steps were fitted on"""
_CLOCK = (0.95, 1.02)
"""hours of load warm a card more than the minutes of a report card"""
_WITHOUT_STEP = (0.92, 1.06)
"""from kernels to a step, where none was timed: a warm GPU runs them slower than one by one"""


def measured_efficiency(card: ReportCard) -> tuple[Gpu, Efficiency]:
    """The function gives the card, and what it reached as shares of its peak.

    Matmuls follow rate = peak * m / (m + half_dim), m the smallest dimension, with both fitted;
    kinds that the report card lacks keep the shares of such cards. Where option a was trained, all
    shares are multiplied by what makes its projection its measured speed.

    Raises:
        UserError: the measured step does not fit the measured kernels at all.
    """
    gpu = _gpu(card)
    base = efficiency(gpu)
    matmul, half_dim = _fit_matmuls(card, base.half_dim)
    flops = {**base.flops, "matmul": matmul / gpu.bf16_tflops}
    for direction in {rate.direction for rate in card.attention}:
        peaks = [
            rate.tflops * (rate.seq_len + base.half_seq_len) / rate.seq_len
            for rate in card.attention
            if rate.direction == direction
        ]
        flops[f"attention_{direction}"] = geometric_mean(peaks) / gpu.bf16_tflops
    grouped = [k.flops / k.measured_ms / 1e9 for k in card.kernels if k.kind == "matmul_grouped"]
    if grouped:
        flops["matmul_grouped"] = median(grouped) / gpu.bf16_tflops
    device = card.device
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
        + _compiled_for(card),
        clock_mhz=device.load_clock_mhz,
        power_w=device.power_limit_w,
    )
    return gpu, _through_step(reached, gpu, card.step) if card.step else reached


def _gpu(card: ReportCard) -> Gpu:
    """A card that the table lacks has as its peak the fastest that was measured."""
    device = card.device
    known = identify(device.gpu)
    if known:
        return known
    peak = max(rate.tflops for rate in card.matmuls)
    rates = {"bf16_tflops": peak, "fp32_tflops": peak / 2, "bandwidth_gbs": card.bandwidth_gbs}
    unknown = {"pattern": "(?!)", "clock_mhz": None, "power_w": None}
    memory_gib = device.memory_bytes / GIB
    return replace(GPUS["rtx-3090"], name=device.gpu, memory_gib=memory_gib, **rates, **unknown)


def _compiled_for(card: ReportCard) -> str:
    if card.device.compiled_for == card.device.capability:
        return ""
    return " with the kernels of compute capability {}.{}".format(*card.device.compiled_for)


def _fit_matmuls(card: ReportCard, half_dim: float) -> tuple[float, float]:
    """Peak, TFLOP/s, and half_dim are a line: 1 / rate = 1 / peak + half_dim / peak * 1 / m.

    Errors are relative, so each side is multiplied by the rate. Where the line makes no sense, or
    all dimensions are the same, `half_dim` is as given.
    """
    rates = {rate: min(rate.m, rate.k, rate.n) for rate in card.matmuls}
    x = [rate.tflops for rate in rates]
    y = [rate.tflops / dim for rate, dim in rates.items()]
    xx, xy, yy = (_dot(u, v) for u, v in ((x, x), (x, y), (y, y)))
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        inverse = (yy * sum(x) - xy * sum(y)) / determinant
        slope = (xx * sum(y) - xy * sum(x)) / determinant
        if inverse > 0 and slope >= 0:
            return 1 / inverse, slope / inverse
    peaks = [rate.tflops * (dim + half_dim) / dim for rate, dim in rates.items()]
    return geometric_mean(peaks), half_dim


def _dot(u: Iterable[float], v: Iterable[float]) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def _bandwidth(card: ReportCard, gpu: Gpu) -> Mapping[str, float]:
    """The share of each kind is the median of its kernels'; a large copy stands for norms."""
    shares: dict[str, list[float]] = defaultdict(list)
    for kernel in filter(_is_traffic, card.kernels):
        shares[kernel.kind].append(kernel.bytes / kernel.measured_ms / 1e6 / gpu.bandwidth_gbs)
    found = {kind: median(values) for kind, values in shares.items()}
    return {"norm": card.bandwidth_gbs / gpu.bandwidth_gbs, **found}


def _is_traffic(kernel: KernelTime) -> bool:
    """The kernel moves bytes and computes next to nothing."""
    return bool(kernel.kind) and kernel.bytes > 0 and kernel.flops < 10 * kernel.bytes


def _through_step(reached: Efficiency, gpu: Gpu, step: StepMeasurement) -> Efficiency:
    """All shares change by the factor at which option a's step takes what it took."""
    projected = make_plan(OPTIONS["a"], gpu, reached=reached).prediction
    measured_ms = OPTIONS["a"].tokens_per_step / step.tokens_per_second * 1e3
    gaps = projected.milliseconds["gaps"]
    factor = (projected.step_ms - gaps) / (measured_ms - gaps)
    if not 0.5 < factor < 2:
        raise UserError(
            f"--report-card: option a took {measured_ms:,.0f} ms a step where its kernels say "
            f"{projected.step_ms:,.0f}: make it again with python -m bench.report_card, on a GPU "
            "that does nothing else"
        )
    spread = (
        step.tokens_per_second_p10 / step.tokens_per_second,
        step.tokens_per_second_p90 / step.tokens_per_second,
    )
    return replace(
        reached,
        flops={kind: factor * share for kind, share in reached.flops.items()},
        bandwidth={kind: factor * share for kind, share in reached.bandwidth.items()},
        ranges={**reached.ranges, "step": spread, "model": _MODEL},
        why={
            **reached.why,
            "step": f"p10 to p90 of {step.steps} steps of option a on this card",
            "model": "from option a to another step",
        },
        provenance=f"{reached.provenance}, all multiplied by {factor:.2f}, at which option a's "
        f"step takes the {measured_ms:,.0f} ms that it took",
    )
