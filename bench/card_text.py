"""A report card for readers is one Markdown file."""

import statistics
from collections.abc import Mapping, Sequence

from bench.card_kernels import attention_op, matmul_op, predicted_ms
from bench.card_step import Load
from hamner.hardware import GIB, Gpu
from hamner.plan.efficiency import Efficiency
from hamner.plan.measured_efficiency import known_gpu
from hamner.plan.report_card import (
    AttentionRate,
    Device,
    KernelTime,
    MatmulRate,
    ReportCard,
    StepMeasurement,
)
from hamner.plan.words import table

KERNEL_COLUMNS = (
    *("kernel", "shape", "measured ms", "floor ms", "of the floor"),
    *("predicted ms", "error"),
)
LEGEND = (
    "The floor is the longer of arithmetic at the card's peak and traffic at its full bandwidth. A "
    "prediction is what the step model counted before this card was measured, the gap to the next "
    "kernel included; its error is predicted over measured, less one, and none stands where the "
    "model leaves a kernel out."
)
CLOCK = (
    "Predictions are at the clock of a step. Large matmuls one after the other take more power, so "
    "where the power limit sets the clock they fall behind theirs; plans leave cubes out."
)


def to_markdown(card: ReportCard, loads: Mapping[str, Load], notes: Sequence[str]) -> str:
    """The function writes the card as a page.

    Args:
        card: what was measured.
        loads: the GPU under each load, by its name, such as "while training".
        notes: sentences on what is missing or otherwise than at the defaults.
    """
    device, (gpu, reached) = card.device, known_gpu(card)
    peak = f"of {gpu.bf16_tflops:,.1f}"
    parts = [
        f"# Report card: {device.gpu}",
        f"{card.date}, Hamner {card.commit}",
        *notes,
        table([("", ""), *environment(device, loads)]),
        "## Training",
        "Option a was not trained."
        if card.step is None
        else table([("option a", ""), *training(card.step)]),
        "## Ceilings",
        f"A copy of 1 GiB: {card.bandwidth_gbs:,.0f} GB/s, "
        f"{card.bandwidth_gbs / gpu.bandwidth_gbs:.0%} of {gpu.bandwidth_gbs:,.0f}.",
        table(
            [
                ("bf16 matmul, m x k x n", "TFLOP/s", peak, "predicted", "error"),
                *(matmul_row(rate, gpu, reached) for rate in card.matmuls),
            ]
        ),
        CLOCK,
        "## Attention",
        table(
            [
                ("T", "head size", "direction", "TFLOP/s", peak, "predicted", "error"),
                *(attention_row(rate, gpu, reached) for rate in card.attention),
            ]
        ),
        "## Kernels",
        table([KERNEL_COLUMNS, *(kernel_row(kernel) for kernel in card.kernels)]),
        LEGEND,
        by_kind(card.kernels),
        "Attach this file and report_card.json to an issue. `python -m hamner.plan --option a "
        "--report-card report_card.json` plans with what they say.",
    ]
    return "\n\n".join(parts) + "\n"


def signed(error: float, digits: int = 0) -> str:
    """The function words an error in percent, without a sign to nothing."""
    return f"{round(error, digits + 2) + 0.0:+.{digits}%}"


def environment(device: Device, loads: Mapping[str, Load]) -> list[tuple[str, str]]:
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
    for when, load in loads.items():
        rows += [
            (f"{name} {when}", spread(values, unit))
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
            "with",
            f"recompute {step.recompute}, micro-batch {step.micro_batch_size}, attention "
            f"{step.attention}",
        ),
        (
            "tokens/s",
            f"{step.tokens_per_second:,.0f} (median of {step.steps} steps; nine of ten above "
            f"{step.tokens_per_second_p10:,.0f}, one of ten above "
            f"{step.tokens_per_second_p90:,.0f})",
        ),
        (
            "projected tokens/s",
            f"{step.projected:,.0f} ({signed(error, 1)}), between {step.projected_low:,.0f} and "
            f"{step.projected_high:,.0f}: measured {'inside' if is_inside else 'outside'}",
        ),
        (
            "memory peak",
            f"{peak:.2f} GiB, projected {projected:.2f} ({signed(projected / peak - 1, 1)})",
        ),
    ]


def matmul_row(rate: MatmulRate, gpu: Gpu, reached: Efficiency) -> tuple[str, ...]:
    """The function gives a matmul's row."""
    op = matmul_op(rate)
    predicted = op.cost.flops / predicted_ms(op, gpu, reached) / 1e9
    return f"{rate.m} x {rate.k} x {rate.n}", *rates(rate.tflops, predicted, gpu)


def attention_row(rate: AttentionRate, gpu: Gpu, reached: Efficiency) -> tuple[object, ...]:
    """The function gives the row of one direction of attention."""
    op = attention_op(rate.seq_len, rate.head_size, rate.direction)
    predicted = op.cost.flops / predicted_ms(op, gpu, reached) / 1e9
    shape = rate.seq_len, rate.head_size, rate.direction
    return *shape, *rates(rate.tflops, predicted, gpu)


def rates(measured: float, predicted: float, gpu: Gpu) -> tuple[str, ...]:
    """The cells are a rate, its share of the peak, and what was predicted, in TFLOP/s."""
    share, error = measured / gpu.bf16_tflops, predicted / measured - 1
    return f"{measured:.1f}", f"{share:.0%}", f"{predicted:.1f}", signed(error)


def kernel_row(kernel: KernelTime) -> tuple[str, ...]:
    """The function gives a kernel's row."""
    predicted, error = "none", ""
    if kernel.predicted_ms is not None:
        predicted = f"{kernel.predicted_ms:.3f}"
        error = signed(kernel.predicted_ms / kernel.measured_ms - 1)
    return (
        kernel.name,
        kernel.shape,
        f"{kernel.measured_ms:.3f}",
        f"{kernel.floor_ms:.3f}",
        f"{kernel.floor_ms / kernel.measured_ms:.0%}",
        predicted,
        error,
    )


def by_kind(kernels: Sequence[KernelTime]) -> str:
    """The sentence has the errors of kinds with several rows, whose sum is what a step takes."""
    kinds: dict[str, list[KernelTime]] = {}
    for kernel in kernels:
        kinds.setdefault(kernel.kind, []).append(kernel)
    errors = []
    for kind, rows in kinds.items():
        if kind and len(rows) > 1:
            predicted = sum(row.predicted_ms for row in rows)
            error = signed(predicted / sum(row.measured_ms for row in rows) - 1)
            errors.append(f"{kind.replace('matmul_grouped', 'grouped')} {error}")
    return (
        "The model has one rate for each kind of kernel, so a kind's sum says more than its rows: "
        f"{', '.join(errors)}."
    )
