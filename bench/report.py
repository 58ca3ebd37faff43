"""Tables and pictures are made from the suite's results.

    pytest bench/ --benchmark-only --benchmark-json=results.json --rows rows.jsonl
    python -m bench.report results.json --out report

writes report/report.md, throughput.png (tokens/s against memory, with the Pareto front of each
option), kernels.png and int8.png (each kernel beside its peers, as a share of what the card
reaches). rows.jsonl has the same rows, each from the moment it was finished: of a suite that was
cut off it is what is left. `pytest-benchmark compare` compares results of several commits.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from bench import compile_ahead
from hamner.cli import read_flags, run_command
from hamner.errors import UserError
from hamner.profile.report import table

OURS = "hamner"
PROJECTIONS = (
    ("projected_tokens_per_second", "tokens_per_second"),
    ("projected_gib", "peak_allocated_gib"),
)
"""fields of an option's row: projected, measured"""
PANELS_A_ROW = 4
"""of the picture of throughput"""
BLUES = {"none": "#6baed6", "selective": "#2171b5", "full": "#08306b"}
PEERS = ("C1", "C3", "C2", "C5", "C4", "C8")


@dataclass(frozen=True)
class ReportConfig:
    """Draw and tabulate the results of `pytest bench/`."""

    results: Annotated[Path, tyro.conf.Positional]
    """file of --benchmark-json or of --rows"""
    out: Path = Path("bench-report")
    """folder to write report.md and the pictures into"""


@dataclass(frozen=True)
class Results:
    """The results are what a run of the suite found."""

    rows: list[dict]
    """extra_info of every row"""
    misfits: list[dict]
    """what did not fit the memory: row, needs_gib (or None), available_gib"""
    compiled: dict | None = None
    """what was compiled before the first row (bench/compile_ahead.py)"""

    def of_kind(self, *kinds: str) -> list[dict]:
        """The method gives rows about one thing."""
        return [row for row in self.rows if row.get("kind") in kinds]


def read_results(path: Path) -> Results:
    """The function reads pytest-benchmark's JSON, or the lines of `--rows`.

    Raises:
        UserError: the file is neither.
    """
    try:
        documents = _documents(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no result of the suite: {error}") from error
    results = Results([], [])
    for document in documents:
        match document:
            case {"benchmarks": [*benchmarks]}:
                results.rows.extend(benchmark["extra_info"] for benchmark in benchmarks)
                results.misfits.extend(document.get("misfits", []))
                results = replace(results, compiled=document.get("compile_ahead"))
            case {"extra_info": row}:
                results.rows.append(row)
            case {"misfit": misfit}:
                results.misfits.append(misfit)
            case {"compile_ahead": compiled}:
                results = replace(results, compiled=compiled)
            case _:
                raise UserError(
                    f"{path} is no result of the suite: write one with "
                    "pytest bench/ --benchmark-only --benchmark-json=FILE, or --rows FILE"
                )
    return replace(results, rows=[row for row in results.rows if "kind" in row])


def _documents(text: str) -> list:
    """The function gives the objects of the lines; a last line that was not written to its end is
    none."""
    try:
        return [json.loads(text)]
    except ValueError:
        lines = text.split("\n")[:-1]
        if not lines:
            raise
        return [json.loads(line) for line in lines]


def label(row: dict) -> str:
    """The function says who trained: a recompute policy of ours, or a trainer."""
    if row["kind"] == "trainer":
        return row["trainer"]
    micro_batches = row["batch_size"] // row["micro_batch_size"]
    return f"hamner, {row['recompute']}" + (f", {micro_batches} passes" * (micro_batches > 1))


def training_table(rows: Iterable[dict], *, short: bool = False) -> str:
    """The function tabulates options and trainers; `short` leaves out reserved memory and the
    spread of the steps."""
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
    """The function gives what `hamner.plan` projects for this card beside what was measured, memory
    allocated."""
    header = ["option", "policy", "micro-batch"]
    header += ["tokens/s projected", "measured", "error", "GiB projected", "measured", "error"]
    cells = []
    for row in rows:
        cells.append([row["option"], row["recompute"], str(row["micro_batch_size"])])
        for (projected, measured), number in zip(PROJECTIONS, (",", ".2f"), strict=True):
            cells[-1] += [f"{row[projected]:{number}}", f"{row[measured]:{number}}"]
            cells[-1].append(f"{row[projected] / row[measured] - 1:+.1%}")
    return table(header, cells)


def largest_errors(rows: Sequence[dict]) -> str:
    """The function gives the worst of the projections, in a sentence."""
    found = []
    for (projected, measured), name in zip(PROJECTIONS, ("speed", "memory"), strict=True):
        worst = max(rows, key=lambda row: abs(row[projected] / row[measured] - 1))
        where = f"{worst['option']}, {worst['recompute']}, {worst['micro_batch_size']}"
        found.append(f"{name} {worst[projected] / worst[measured] - 1:+.1%} ({where})")
    return f"Largest errors of {len(rows)} projections: {'; '.join(found)}."


def kernel_table(rows: Iterable[dict], *, short: bool = False) -> str:
    """The table has each op of ours beside its fastest peer, and unless `short` every other; only
    rows whose outputs agreed exist.

    Another version of ours, as "hamner grouped" is, is no peer.
    """
    cells = []
    for op, implementations in by_op(rows).items():
        ours = implementations.pop(OURS, None)
        others = sorted(implementations.values(), key=lambda row: row["median_ms"])
        peers = (row for row in others if not row["implementation"].startswith(OURS))
        best = next(peers, None)
        cells.append(
            [
                op,
                f"{ours['median_ms']:.3f}" if ours else "",
                _rate(ours) if ours else "",
                _share(ours) if ours else "",
                best["implementation"] if best else "",
                f"{best['median_ms']:.3f}" if best else "",
                f"{best['median_ms'] / ours['median_ms']:.2f} x" if ours and best else "",
            ]
        )
        if not short:
            named = (
                f"{row['implementation']} {row['median_ms']:.3f}"
                for row in others
                if row is not best
            )
            cells[-1].append("; ".join(named))
    header = ["op", "ours ms", "reaches", "of ceiling", "best peer", "ms", "we are"]
    return table(header if short else [*header, "others, ms"], cells)


def by_op(rows: Iterable[dict]) -> dict[str, dict[str, dict]]:
    """The function maps each op to its rows by implementation."""
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
    """The lines are about the data pipeline, checkpoints, what did not fit, and what was compiled
    ahead."""
    lines = [] if results.compiled is None else [compile_ahead.describe(results.compiled)]
    lines += [
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
        parts += [projection_table(projected), largest_errors(projected)]
    if kernels := results.of_kind("kernel"):
        parts.append(kernel_table(kernels, short=True))
    parts.append("\n".join(other_lines(results)))
    return [line for part in parts if part for line in (*part.splitlines(), "")]


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (memory, speed) the function gives those that no other beats in both, by memory."""
    front: list[tuple[float, float]] = []
    for memory, speed in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or speed > front[-1][1]:
            front.append((memory, speed))
    return front


def draw_throughput(rows: Sequence[dict], path: Path) -> None:
    """The picture has tokens/s against memory: one panel an option, its Pareto front as a line.

    Our recompute policies are blue circles, empty where the batch goes in several passes; other
    trainers are squares, and a ring is ours as it ran beside them.
    """
    plt = _pyplot()
    options = list(dict.fromkeys(row["option"] for row in rows))
    columns = min(PANELS_A_ROW, len(options))
    lines = -(-len(options) // columns)
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=(0.8 + 2.7 * columns, 1.0 + 2.4 * lines),
        layout="constrained",
        squeeze=False,
    )
    markers = _markers(rows)
    for axes, option in zip(panels.flat, options, strict=False):
        points = [row for row in rows if row["option"] == option]
        front = pareto([_place(row) for row in points])
        axes.plot(*zip(*front, strict=True), color="gray", linewidth=1, zorder=0)
        for row in points:
            axes.plot(*_place(row), **markers[label(row)])
        axes.set_title(option, fontsize=10)
        axes.set(ylim=(0, 1.12 * max(row["tokens_per_second"] for row in points) / 1e3))
        axes.set(xlim=(0, 1.08 * max(row["peak_allocated_gib"] for row in points)))
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("thousand tokens/s", fontsize=8)
    for axes in panels.flat[len(options) - columns : len(options)]:
        axes.set_xlabel("peak GiB allocated", fontsize=8)
    for axes in panels.flat[len(options) :]:
        axes.set_axis_off()
    handles = [plt.Line2D([], [], **marker) for marker in markers.values()]
    handles.append(plt.Line2D([], [], color="gray", linewidth=1, label="Pareto front"))
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend(handles=handles, **place)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _markers(rows: Sequence[dict]) -> dict[str, dict]:
    """The function gives how each trainer is drawn, ours first."""
    found: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: (not label(row).startswith(OURS), row["kind"])):
        if (name := label(row)) in found:
            continue
        style = {"linestyle": "none", "label": name, "markersize": 6}
        if row["kind"] == "option":
            color, passes = BLUES.get(row["recompute"], "C9"), row["batch_size"]
            passes //= row["micro_batch_size"]
            style |= {"marker": "o", "color": color}
            if passes > 1:
                style |= {"markerfacecolor": "none", "markersize": 5 + passes / 2}
        elif name == OURS:
            style |= {"marker": "o", "color": "black", "markerfacecolor": "none", "markersize": 10}
            style["label"] = f"{name}, beside the other trainers"
        else:
            peers = sum(marker["marker"] == "s" for marker in found.values())
            style |= {"marker": "s", "color": PEERS[peers % len(PEERS)]}
        found[name] = style
    return found


def _place(row: dict) -> tuple[float, float]:
    return row["peak_allocated_gib"], row["tokens_per_second"] / 1e3


def draw_kernels(rows: Sequence[dict], path: Path) -> None:
    """The function gives the share of the card's measured ceiling that every implementation of an
    op reaches."""
    plt = _pyplot()
    names = sorted({row["implementation"] for row in rows}, key=lambda name: (name != OURS, name))
    bars: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    ticks, position = {}, 0.0
    for op, found in by_op(rows).items():
        ticks[op] = position + (len(found) - 1) / 2
        for name in filter(found.__contains__, names):
            bars[name].append((position, found[name]["of_ceiling"]))
            position += 1
        position += 1  # between ops
    figure, axes = plt.subplots(figsize=(8, 1.0 + 0.13 * position), layout="constrained")
    for number, (name, shares) in enumerate(bars.items()):
        axes.barh(
            *zip(*shares, strict=True), height=0.9, label=name, color=plt.cm.tab20(number % 20)
        )
    axes.set_yticks(list(ticks.values()), list(ticks))
    axes.set_ylim(position - 1, -1)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel(
        "share of the ceiling measured on this card (copy or 8192^3 matmul)", fontsize=8
    )
    axes.tick_params(labelsize=7)
    figure.legend(loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")  # a training machine has no display
    import matplotlib.pyplot as plt

    return plt


def describe_conditions(rows: Sequence[dict]) -> str:
    """The lines say where and with what the rows were measured; rows of several machines have their
    own."""
    found = {
        ", ".join(f"{name} {value}" for name, value in row["conditions"].items())
        for row in rows
        if "conditions" in row
    }
    return "\n".join(f"Measured on: {line}." for line in sorted(found))


def write_report(config: ReportConfig) -> Path:
    """The function writes the tables and the pictures, and returns the Markdown file.

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
            parts.append(largest_errors(projected))
        # Without a GPU there is no memory to draw against; ours with other flags is in the table.
        placed = [row for row in training if row.get("peak_allocated_gib") is not None]
        if placed := [row for row in placed if not label(row).startswith(f"{OURS} --")]:
            draw_throughput(placed, config.out / "throughput.png")
            parts.append("![Throughput against memory](throughput.png)")
        if kernels:
            parts += ["## Kernels", kernel_table(kernels)]
        compared = [row for row in kernels if row.get("of_ceiling") is not None]
        for is_int8, name, title in ((False, "kernels.png", "Kernels"), (True, "int8.png", "int8")):
            if drawn := [row for row in compared if ("int8" in row["op"]) is is_int8]:
                draw_kernels(drawn, config.out / name)
                parts.append(f"![{title} against ceilings]({name})")
        if lines := other_lines(results):
            parts += ["## Other", "\n".join(f"- {line}" for line in lines)]
        report = config.out / "report.md"
        report.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be written: {error.strerror}") from error
    return report


def main(args: Sequence[str]) -> None:
    """The command writes the report, as the command line says."""
    config = read_flags(ReportConfig, args, "bench.report")
    print(f"wrote {write_report(config)}")


if __name__ == "__main__":
    run_command(main)
