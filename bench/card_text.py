"""A report card for readers is one Markdown file."""

import statistics
from collections.abc import Sequence

from bench.card_step import Load
from hamner.hardware import GIB, Gpu
from hamner.plan import costs
from hamner.plan.report_card import (
    AttentionRate,
    Device,
    KernelTime,
    MatmulRate,
    ReportCard,
    StepMeasurement,
)
from hamner.plan.step_time import Op
from hamner.plan.words import table

KERNEL_COLUMNS = ("kernel", "shape", "measured ms", "floor ms", "of the floor")
KERNEL_COLUMNS += ("predicted ms", "error")


def to_markdown(card: ReportCard, gpu: Gpu, load: Load | None, notes: Sequence[str]) -> str:
    """The function writes the card as a page.

    Args:
        card: what was measured.
        gpu: what it is held against.
        load: the GPU while it trained, if it did.
        notes: sentences on what is missing or otherwise than at the defaults.
    """
    device = card.device
    parts = [
        f"# Report card: {device.gpu}",
        f"{card.date}, Hamner {card.commit}",
        *notes,
        table([("", ""), *environment(device, load)]),
        "## Training",
        "Option a was not trained."
        if card.step is None
        else table([("", ""), *training(card.step)]),
        "## Ceilings",
        f"A copy of 1 GiB: {card.bandwidth_gbs:,.0f} GB/s, "
        f"{card.bandwidth_gbs / gpu.bandwidth_gbs:.0%} of {gpu.bandwidth_gbs:,.0f}.",
        table(
            [
                ("bf16 matmul, m x k x n", "TFLOP/s", f"of {gpu.bf16_tflops:g}", "predicted"),
                *(matmul_row(rate, gpu) for rate in card.matmuls),
            ]
        ),
        "## Attention",
        table(
            [
                ("T", "head size", "direction", "TFLOP/s", f"of {gpu.bf16_tflops:g}"),
                *(attention_row(rate, gpu) for rate in card.attention),
            ]
        ),
        "## Kernels",
        table([KERNEL_COLUMNS, *(kernel_row(kernel) for kernel in card.kernels)]),
        "The floor is the longer of arithmetic at the card's peak and traffic at its full "
        "bandwidth; the prediction is the step model's, before this card was measured. Attach "
        "this file and report_card.json to an issue; plan with "
        "`python -m hamner.plan --option a --report-card report_card.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def environment(device: Device, load: Load | None) -> list[tuple[str, str]]:
    """The function gives what was measured on, and how warm it was."""

    def known(value: float | None, unit: str) -> str:
        return "not said" if value is None else f"{value:,.0f} {unit}"

    rows = [
        ("capability", "{}.{}".format(*device.capability)),
        ("kernels compiled for", "{}.{}".format(*device.compiled_for)),
        ("driver, torch, Triton", f"{device.driver}, {device.torch}, {device.triton}"),
        ("memory", f"{device.memory_bytes / GIB:.1f} GiB"),
        ("power limit", known(device.power_limit_w, "W")),
        ("highest clock", known(device.max_clock_mhz, "MHz")),
    ]
    if load is not None:
        rows += [
            (f"{name} while training", spread(values, unit))
            for name, values, unit in (
                ("clock", load.clock_mhz, "MHz"),
                ("power", load.power_w, "W"),
                ("temperature", load.temperature_c, "C"),
            )
        ]
    return rows


def spread(values: Sequence[float], unit: str) -> str:
    """The function gives median and range."""
    if not values:
        return "not said"
    middle = statistics.median(values)
    return f"{middle:,.0f} {unit} ({min(values):,.0f} to {max(values):,.0f})"


def training(step: StepMeasurement) -> list[tuple[str, str]]:
    """The function holds option a's speed and memory against the projected."""
    error = step.projected / step.tokens_per_second - 1
    is_inside = step.projected_low <= step.tokens_per_second <= step.projected_high
    peak, projected = step.peak_bytes / GIB, step.projected_peak_bytes / GIB
    return [
        (
            "tokens/s",
            f"{step.tokens_per_second:,.0f} (median of {step.steps} steps; nine of ten above "
            f"{step.tokens_per_second_p10:,.0f}, one of ten above "
            f"{step.tokens_per_second_p90:,.0f})",
        ),
        (
            "projected",
            f"{step.projected:,.0f} ({error:+.1%}), between {step.projected_low:,.0f} and "
            f"{step.projected_high:,.0f}: measured {'inside' if is_inside else 'outside'}",
        ),
        (
            "memory peak",
            f"{peak:.2f} GiB, projected {projected:.2f} ({projected / peak - 1:+.1%})",
        ),
    ]


def matmul_row(rate: MatmulRate, gpu: Gpu) -> tuple[str, ...]:
    """The function gives a matmul's row."""
    cost = costs.matmul(rate.m, rate.k, rate.n)
    op = Op("matmul", cost, smallest_dim=min(rate.m, rate.k, rate.n))
    predicted = cost.flops / op.seconds(gpu) / 1e12
    return (
        f"{rate.m} x {rate.k} x {rate.n}",
        f"{rate.tflops:.1f}",
        f"{rate.tflops / gpu.bf16_tflops:.0%}",
        f"{predicted:.1f} ({predicted / rate.tflops - 1:+.0%})",
    )


def attention_row(rate: AttentionRate, gpu: Gpu) -> tuple[object, ...]:
    """The function gives the row of one direction of attention."""
    share = f"{rate.tflops / gpu.bf16_tflops:.0%}"
    return rate.seq_len, rate.head_size, rate.direction, f"{rate.tflops:.1f}", share


def kernel_row(kernel: KernelTime) -> tuple[str, ...]:
    """The function gives a kernel's row."""
    predicted, error = "", ""
    if kernel.predicted_ms is not None:
        predicted = f"{kernel.predicted_ms:.3f}"
        error = f"{kernel.predicted_ms / kernel.measured_ms - 1:+.0%}"
    return (
        kernel.name,
        kernel.shape,
        f"{kernel.measured_ms:.3f}",
        f"{kernel.floor_ms:.3f}",
        f"{kernel.floor_ms / kernel.measured_ms:.0%}",
        predicted,
        error,
    )
