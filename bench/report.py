"""Tables and pictures from the suite's results.

    pytest bench/ --benchmark-only --benchmark-json=results.json
    python -m bench.report results.json --out report

writes report/report.md, throughput.png (tokens/s against memory, with the Pareto front of each
option) and kernels.png (each kernel beside its best peer, as a share of what the card reaches).
`pytest-benchmark compare` compares results of several commits.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hamner.cli import run_command
from hamner.errors import UserError
from hamner.profiling.report import table

OURS = "hamner"


@dataclass(frozen=True)
class ReportConfig:
    """Draw and tabulate the results of `pytest bench/ --benchmark-json=FILE`."""

    results: Annotated[Path, tyro.conf.Positional]
    """pytest-benchmark's JSON"""
    out: Path = Path("bench-report")
    """folder to write report.md and the pictures into"""


@dataclass(frozen=True)
class Results:
    """What a run of the suite found."""

    rows: list[dict]
    """extra_info of every row"""
    misfits: list[dict]
    """what did not fit the memory: row, needs_gib (or None), available_gib"""

    def of_kind(self, *kinds: str) -> list[dict]:
        """Rows about one thing."""
        return [row for row in self.rows if row.get("kind") in kinds]


def read_results(path: Path) -> Results:
    """Read pytest-benchmark's JSON.

    Raises:
        UserError: the file is not such a result.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not pytest-benchmark's JSON: {error}") from error
    benchmarks = document.get("benchmarks") if isinstance(document, dict) else None
    if not isinstance(benchmarks, list):
        raise UserError(
            f"{path} is not pytest-benchmark's JSON: write it with "
            "pytest bench/ --benchmark-only --benchmark-json=FILE"
        )
    rows = [benchmark["extra_info"] for benchmark in benchmarks]
    return Results([row for row in rows if "kind" in row], document.get("misfits", []))


def label(row: dict) -> str:
    """Who trained: a recompute policy of ours, or a trainer."""
    if row["kind"] == "trainer":
        return row["trainer"]
    micro_batches = row["batch_size"] // row["micro_batch_size"]
    return f"hamner, {row['recompute']}" + (f", {micro_batches} passes" * (micro_batches > 1))


def training_table(rows: Iterable[dict], *, short: bool = False) -> str:
    """Options and trainers; `short` leaves out reserved memory and the spread of the steps."""
    header = ["option", "trainer", "tokens/s", "MFU", "GiB", "step ms", "build s", "warm-up s"]
    if not short:
        header += ["GiB reserved", "p10 ms", "p90 ms"]
    cells = []
    for row in sorted(rows, key=lambda row: (row["option"], -row["tokens_per_second"])):
        cells.append(
            [
                row["option"],
                label(row),
                f"{row['tokens_per_second']:,}",
                "" if row.get("mfu") is None else f"{row['mfu']:.1%}",
                _gib(row, "peak_allocated_gib"),
                f"{row['p50_ms']:.1f}",
                f"{row['build_seconds']:.0f}",
                f"{row['warm_up_seconds']:.0f}",
            ]
        )
        if not short:
            cells[-1] += [
                _gib(row, "peak_reserved_gib"),
                f"{row['p10_ms']:.1f}",
                f"{row['p90_ms']:.1f}",
            ]
    return table(header, cells)


def _gib(row: dict, field: str) -> str:
    return f"{row[field]:.2f}" if row.get(field) is not None else ""


def projection_table(rows: Iterable[dict]) -> str:
    """What `hamner.plan` projects for this card beside what was measured, memory allocated."""
    header = ["option", "trainer", "tokens/s projected", "measured", "error"]
    cells = []
    for row in rows:
        speeds = row["projected_tokens_per_second"], row["tokens_per_second"]
        gib = row["projected_gib"], row["peak_allocated_gib"]
        cells.append(
            [row["option"], label(row)]
            + [f"{speed:,}" for speed in speeds]
            + [f"{speeds[0] / speeds[1] - 1:+.1%}"]
            + [f"{value:.2f}" for value in gib]
            + [f"{gib[0] / gib[1] - 1:+.1%}"]
        )
    return table([*header, "GiB projected", "measured", "error"], cells)


def kernel_table(rows: Iterable[dict]) -> str:
    """Each op of ours beside its fastest peer; only rows whose outputs agreed exist."""
    cells = []
    for op, implementations in by_op(rows).items():
        ours = implementations.get(OURS)
        peers = {name: row for name, row in implementations.items() if name != OURS}
        best = min(peers.values(), key=lambda row: row["median_ms"], default=None)
        cells.append(
            (
                op,
                f"{ours['median_ms']:.3f}" if ours else "",
                _rate(ours) if ours else "",
                _share(ours) if ours else "",
                best["implementation"] if best else "",
                f"{best['median_ms']:.3f}" if best else "",
                f"{best['median_ms'] / ours['median_ms']:.2f} x" if ours and best else "",
            )
        )
    return table(("op", "ours ms", "reaches", "of ceiling", "best peer", "ms", "we are"), cells)


def by_op(rows: Iterable[dict]) -> dict[str, dict[str, dict]]:
    """op -> implementation -> row."""
    found: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        found[row["op"]][row["implementation"]] = row
    return found


def _rate(row: dict) -> str:
    if row.get("gb_per_s") is not None:
        return f"{row['gb_per_s']:,.0f} GB/s"
    return f"{row['tflop_per_s']:,.0f} TFLOP/s" if row.get("tflop_per_s") is not None else ""


def _share(row: dict) -> str:
    return f"{row['of_ceiling']:.0%}" if row.get("of_ceiling") is not None else ""


def other_lines(results: Results) -> list[str]:
    """The data pipeline, checkpoints, and what did not fit."""
    lines = [
        f"data from {row['source']}: {row['tokens_per_second']:,} tokens/s"
        for row in results.of_kind("data")
    ]
    lines += [
        f"checkpoint {row['direction']}: {row['mb_per_s']:,} MB/s"
        for row in results.of_kind("checkpoint")
    ]
    for misfit in results.misfits:
        needs = misfit["needs_gib"]
        need = "more than there is" if needs is None else f"{needs:.1f} GiB"
        room = f"of {misfit['available_gib']:.1f} GiB"
        lines.append(f"{misfit['row']}: does not fit, needs {need} {room}")
    return lines


def short_report(results: Results) -> list[str]:
    """What the suite prints at its end."""
    parts = []
    if training := results.of_kind("option", "trainer"):
        parts.append(training_table(training, short=True))
    if projected := [row for row in training if "projected_tokens_per_second" in row]:
        parts.append(projection_table(projected))
    if kernels := results.of_kind("kernel"):
        parts.append(kernel_table(kernels))
    parts.append("\n".join(other_lines(results)))
    return [line for part in parts if part for line in (*part.splitlines(), "")]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (memory, speed) those that no other beats in both, by memory."""
    front: list[tuple[float, float]] = []
    for memory, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or speed > front[-1][1]:
            front.append((memory, speed))
    return front


def draw_throughput(rows: Sequence[dict], path: Path) -> None:
    """Tokens/s against memory: one panel an option, its Pareto front as a line."""
    plt = _pyplot()
    options = sorted({row["option"] for row in rows})
    figure, panels = plt.subplots(
        1, len(options), figsize=(5 * len(options), 4.5), layout="constrained", squeeze=False
    )
    for axes, option in zip(panels[0], options, strict=True):
        points = [row for row in rows if row["option"] == option]
        for row in points:
            at = row["peak_allocated_gib"], row["tokens_per_second"]
            is_ours = label(row).startswith(OURS)
            axes.plot(*at, "o" if is_ours else "s", color="C0" if is_ours else "C1")
            axes.annotate(label(row), at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        front = pareto([(r["peak_allocated_gib"], r["tokens_per_second"]) for r in points])
        axes.plot(*zip(*front, strict=True), color="gray", linewidth=0.8, zorder=0)
        axes.set(title=option, xlabel="peak GiB allocated", ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens/s")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_kernels(rows: Sequence[dict], path: Path) -> None:
    """The share of the card's measured ceiling that every implementation of an op reaches."""
    plt = _pyplot()
    ops = by_op(rows)
    names = sorted({row["implementation"] for row in rows}, key=lambda name: (name != OURS, name))
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.45 * len(ops)), layout="constrained")
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        shares = [
            (position + number * height, found[name]["of_ceiling"])
            for position, found in enumerate(ops.values())
            if name in found
        ]
        axes.barh(*zip(*shares, strict=True), height=height, label=name)
    axes.set_yticks([position + 0.4 - height / 2 for position in range(len(ops))], list(ops))
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the ceiling measured on this card (copy or 8192^3 matmul)")
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # a training machine has no display
    import matplotlib.pyplot as plt

    return plt


def describe_conditions(rows: Sequence[dict]) -> str:
    """Where and with what the rows were measured; rows of several machines are told apart."""
    found = {
        ", ".join(f"{name} {value}" for name, value in row["conditions"].items())
        for row in rows
        if "conditions" in row
    }
    return "\n".join(f"Measured on: {line}." for line in sorted(found))


def write_report(config: ReportConfig) -> Path:
    """Write the tables and the pictures; returns the Markdown file.

    Raises:
        UserError: the results cannot be read, hold no row of the suite, or cannot be written.
    """
    results = read_results(config.results)
    if not results.rows and not results.misfits:
        raise UserError(f"{config.results} holds no row of this suite")
    training = results.of_kind("option", "trainer")
    kernels = results.of_kind("kernel")
    parts = ["# Benchmarks", describe_conditions(results.rows)]
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        if training:
            parts += ["## Training", training_table(training)]
        if projected := [row for row in training if "projected_tokens_per_second" in row]:
            parts += ["## Plan against measurement", projection_table(projected)]
        # Without a GPU there is no memory to draw against.
        if placed := [row for row in training if row.get("peak_allocated_gib") is not None]:
            draw_throughput(placed, config.out / "throughput.png")
            parts.append("![Throughput against memory](throughput.png)")
        if kernels:
            parts += ["## Kernels", kernel_table(kernels)]
        if compared := [row for row in kernels if row.get("of_ceiling") is not None]:
            draw_kernels(compared, config.out / "kernels.png")
            parts.append("![Kernels against ceilings](kernels.png)")
        if lines := other_lines(results):
            parts += ["## Other", "\n".join(f"- {line}" for line in lines)]
        report = config.out / "report.md"
        report.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be written: {error.strerror}") from error
    return report


def main(args: Sequence[str]) -> None:
    """Write the report, as the command line says."""
    config = tyro.cli(ReportConfig, args=args, prog="python -m bench.report")
    print(f"wrote {write_report(config)}")


if __name__ == "__main__":
    run_command(main)
