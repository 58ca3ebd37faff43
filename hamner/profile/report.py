"""A step's summary becomes text, Markdown tables that read well on a terminal too."""

from collections.abc import Sequence

from hamner.profile.memory import MemoryTimeline
from hamner.profile.summary import LONG_GAP_US, TOP_KERNELS, KernelRow, Summary

COMPARED_KERNELS = 15
NAME_WIDTH = 56


def describe(summary: Summary) -> str:
    """The function gives the whole summary of one trace."""
    parts = [_headline(summary), _time_table(summary)]
    if summary.phases:
        phases = ", ".join(f"{name} {time:.2f}" for name, time in summary.phases.items())
        parts.append(f"By phase, ms: {phases}.")
    if summary.communication is not None:
        parts.append(_describe_communication(summary))
    if summary.gaps is not None:
        parts.append(_describe_gaps(summary))
    parts.append(_kernel_table(summary))
    return "\n\n".join(parts)


def describe_memory(timeline: MemoryTimeline) -> str:
    """The function gives the peak by kind, one line."""
    peak = timeline.peak
    kinds = " + ".join(f"{kind} {size / 2**30:.3f}" for kind, size in peak.items())
    return f"Memory at its peak, GiB: {kinds} = {sum(peak.values()) / 2**30:.3f}."


def describe_difference(a: Summary, b: Summary) -> str:
    """The function gives what B takes more or less than A."""
    totals = [
        ("step", a.step_ms, b.step_ms),
        *_side_by_side(a.categories, b.categories),
        ("idle", a.idle_ms, b.idle_ms),
    ]
    if a.gaps and b.gaps:
        totals.append(
            ("of it waiting for the CPU", a.gaps.waiting_for_cpu_ms, b.gaps.waiting_for_cpu_ms)
        )
    kernels = _side_by_side(
        *({(k.name, k.category): k.milliseconds for k in s.kernels} for s in (a, b))
    )
    kernels.sort(key=lambda row: -abs(row[2] - row[1]))
    changes = [(key[0][:NAME_WIDTH], *times) for key, *times in kernels[:COMPARED_KERNELS]]
    return "\n\n".join(
        (
            f"A: {a.source}, {a.device or 'CPU'}\nB: {b.source}, {b.device or 'CPU'}",
            _difference_table("ms a step", totals),
            f"Kernels a step: A {a.launches:,.0f}, B {b.launches:,.0f}. The largest changes:",
            _difference_table("kernel, ms a step", changes),
        )
    )


def _headline(summary: Summary) -> str:
    steps = "1 step" if summary.steps == 1 else f"{summary.steps} steps"
    lines = [
        f"{summary.source}: {steps} on {summary.device or 'the CPU'}, "
        f"{summary.step_ms:.2f} ms each, {summary.launches:,.0f} "
        f"{'kernels' if summary.device else 'operations'} a step"
    ]
    if summary.unprofiled_step_ms is not None:
        lines.append(f"Without the profiler a step took {summary.unprofiled_step_ms:.2f} ms.")
    if summary.tokens_per_second is not None:
        utilisation = (
            f"MFU {summary.mfu:.1%}"
            if summary.mfu is not None
            else "MFU not shown: the device's peak is unknown"
        )
        together = f" on {summary.gpus} GPUs" if summary.gpus > 1 else ""
        lines.append(f"{summary.tokens_per_second:,.0f} tokens/s{together}, {utilisation}.")
    if summary.counted_tflops is not None:
        lines.append(
            f"Operations of known shape do {summary.counted_tflops:,.3g} TFLOP/s over the step, "
            "recomputation included."
        )
    return "\n".join(lines)


def _time_table(summary: Summary) -> str:
    rows = sorted(summary.categories.items(), key=lambda item: -item[1])
    rows.append(("idle", summary.idle_ms))
    overlap = sum(summary.categories.values()) - summary.busy_ms
    if overlap > 0.005 * summary.step_ms:
        rows.append(("side by side", -overlap))
    cells = [(name, f"{time:.2f}", f"{time / summary.step_ms:.1%}") for name, time in rows]
    return table(("category", "ms", "of the step"), cells)


def _describe_communication(summary: Summary) -> str:
    total, exposed = summary.communication.milliseconds, summary.communication.exposed_ms
    return (
        f"Communication: {total:.2f} ms a step, waiting for other GPUs included; "
        f"{total - exposed:.2f} ms of it ({1 - exposed / total:.0%}) beside other work, "
        f"{exposed:.2f} ms exposed ({exposed / summary.step_ms:.1%} of the step)."
    )


def _describe_gaps(summary: Summary) -> str:
    gaps = summary.gaps
    lines = [
        f"Idle: {gaps.waiting_for_cpu_ms:.2f} ms waiting for the CPU to launch "
        f"({gaps.waiting_for_cpu_ms / summary.step_ms:.1%} of the step is launch-bound), "
        f"{gaps.between_kernels_ms:.2f} ms between kernels that were queued; "
        f"{gaps.long_gaps:.0f} gaps above {LONG_GAP_US:.0f} us, the longest "
        f"{gaps.longest_us:.0f} us."
    ]
    if gaps.head_start_us is not None:
        lines.append(
            f"The CPU launches kernels {gaps.head_start_us:,.0f} us before they start (median)."
        )
    for name, (times, milliseconds) in summary.waits.items():
        lines.append(f"The CPU waits in {name} {times:.1f} times, {milliseconds:.2f} ms.")
    return "\n".join(lines)


def _kernel_table(summary: Summary) -> str:
    rows = [
        (
            kernel.name[:NAME_WIDTH],
            kernel.category,
            f"{kernel.calls:.0f}",
            f"{kernel.milliseconds:.3f}",
            f"{kernel.milliseconds / summary.step_ms:.1%}",
            _rate(kernel),
            "" if kernel.floor_ms is None else f"{kernel.floor_ms:.3f}",
            "" if kernel.floor_ms is None else f"{kernel.floor_ms / kernel.milliseconds:.0%}",
        )
        for kernel in summary.kernels[:TOP_KERNELS]
    ]
    return table(
        ("kernel", "category", "calls", "ms", "of the step", "achieved", "floor ms", "of floor"),
        rows,
    )


def _rate(kernel: KernelRow) -> str:
    if kernel.tflop_per_s is not None:
        return f"{kernel.tflop_per_s:.3g} TFLOP/s"
    if kernel.gb_per_s is not None:
        digits = ",.0f" if kernel.gb_per_s >= 100 else ".3g"
        return f"{kernel.gb_per_s:{digits}} GB/s"
    return ""


def _side_by_side(a: dict, b: dict) -> list[tuple]:
    """The function gives (key, its value in A, its value in B) of every key; 0 where it lacks."""
    return [(key, a.get(key, 0.0), b.get(key, 0.0)) for key in {**a, **b}]


def _difference_table(head: str, rows: Sequence[tuple[str, float, float]]) -> str:
    return table(
        (head, "A", "B", "B - A"),
        [(name, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}") for name, a, b in rows],
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table has its first column aligned to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        return f"| {' | '.join(padded)} |"

    others = "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    rule = f"|{'-' * (widths[0] + 2)}|{others}"
    return "\n".join((line(header), rule, *map(line, rows)))
