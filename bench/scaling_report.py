"""The tables and the picture of `bench.scaling` are made from its rows."""

from collections.abc import Sequence
from pathlib import Path

from bench.conditions import in_words
from bench.scaling_job import Row
from hamner.profile.report import table

TIMES = ("data_ms", "communication_ms", "exposed_ms")
WANTED = {("ddp", 4): 3.85, ("ddp", 8): 7.6, ("fsdp", 8): 7.2}
"""times one GPU, by engine and GPUs, on GPUs with links of their own"""


def row_of(result: dict) -> Row:
    """The function gives the row that a result is of."""
    return Row(**{name: result[name] for name in Row.__dataclass_fields__ if name in result})


def describe(results: Sequence[dict], moved: Sequence[dict], failures: dict[str, str]) -> str:
    """The function gives the tables of what was measured, and what was not.

    Args:
        results: rows.
        moved: runs that were killed and resumed on other GPUs.
        failures: reasons by name.
    """
    parts = [f"Conditions: {c}." for c in dict.fromkeys(in_words(r["conditions"]) for r in results)]
    linked = [r for r in results if r["transport"] == "links" and _is_speed(r)]
    if linked:
        head = ("option", "GPUs", "engine", "graph", "GB/s", "tokens/s", "p10-p90", "peak GiB")
        head += ("x one GPU", "wanted", "losses apart", "norms apart, %")
        head += ("data ms", "messages ms", "exposed ms")
        parts.append(table(head, [_scaling_cells(r, results) for r in linked]))
    parts += _compare_times(linked)
    if moved:
        head = ("option", "killed on", "resumed on", "from step", "of", "losses apart", "then")
        parts.append(table((*head, "norms apart, %"), [_moved_cells(r) for r in moved]))
    slow = [_slow_cells(r, results) for r in results if r["transport"] != "links"]
    if slow:
        head = ("link", "GB/s", "option", "micro-batches", "bucket MiB", "ms a step", "tokens/s")
        parts.append(table((*head, "x one GPU"), slow))
    parts += [f"Not measured: {name}: {reason}." for name, reason in failures.items()]
    return "\n\n".join(parts)


def draw(results: Sequence[dict], path: Path) -> None:
    """The function draws how many times as fast as one GPU several are, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from hamner.plot.figure import write_figure

    by_row = _by_row(results)
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for r in results:
        one = by_row.get((r["option"], "one", 1))
        if one and r["gpus"] > 1 and r["transport"] == "links" and _is_speed(r):
            line = lines.setdefault((r["option"], r["engine"]), {1: 1.0})
            line[r["gpus"]] = _speed(r) / _speed(one)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot()
    most = max((gpus for line in lines.values() for gpus in line), default=1)
    axes.plot((1, most), (1, most), color="grey", linestyle="--", linewidth=1, label="linear")
    for (option, engine), line in sorted(lines.items()):
        x, y = zip(*sorted(line.items()), strict=True)
        axes.plot(x, y, marker="o", label=f"{option}, {engine}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("times one GPU, tokens/s")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, figure)


def _by_row(results: Sequence[dict]) -> dict[tuple[str, str, int], dict]:
    """The function gives what is compared with: rows of one GPU, by the micro-batches of a step."""
    return {
        (r["option"], r["engine"], r["micro_batches"]): r
        for r in results
        if r["engine"] == "one" and not r["again"]
    }


def _is_speed(result: dict) -> bool:
    """The function says whether its speed counts: a reference has only losses."""
    return result["micro_batches"] == 1


def _speed(result: dict, percentile: str = "p50") -> float:
    """The function gives tokens/s of all GPUs."""
    return result["tokens_per_step"] / result[f"{percentile}_ms"] * 1e3


def _times_one(result: dict, results: Sequence[dict]) -> str:
    """The function gives the ratio to one GPU, or its range where that was measured twice."""
    ratios = {
        f"{_speed(result) / _speed(one):.3f}"
        for one in results
        if (one["option"], one["engine"]) == (result["option"], "one") and _is_speed(one)
    }
    return "-".join(sorted(ratios, key=float))


def _apart(result: dict, results: Sequence[dict]) -> tuple[str, str]:
    """The function gives the largest differences to one GPU that takes the same batch: of losses,
    and of gradient norms in % of them."""
    reference = _by_row(results).get((result["option"], "one", result["gpus"]))
    if not (reference and result["losses"]):
        return "", ""
    losses = zip(reference["losses"], result["losses"], strict=True)
    norms = zip(reference["grad_norms"], result["grad_norms"], strict=True)
    return (
        f"{max(abs(a - b) for a, b in losses):.5f}",
        f"{100 * max(abs(b / a - 1) for a, b in norms):.3f}",
    )


def _compare_times(results: Sequence[dict]) -> list[str]:
    """The function gives the table that says where the time of several GPUs goes, if there are
    traces of them and of one."""
    one = _by_row(results)
    traced = [
        (f"{r['option']}, {r['engine']} on {r['gpus']}", r["parts_ms"], reference["parts_ms"])
        for r in results
        if r["gpus"] > 1 and "parts_ms" in r and (reference := one.get((r["option"], "one", 1)))
    ]
    if not traced:
        return []
    names = dict.fromkeys(name for _, *both in traced for times in both for name in times)
    rows = [
        (name, *(f"{times.get(name, 0) - alone.get(name, 0):+.2f}" for _, times, alone in traced))
        for name in names
    ]
    return [table(("ms a step more than one GPU", *(title for title, *_ in traced)), rows)]


def _scaling_cells(result: dict, results: Sequence[dict]) -> tuple[str, ...]:
    return (
        result["option"],
        str(result["gpus"]),
        result["engine"],
        "yes" if result["cuda_graph"] else "no",
        _link(result),
        f"{_speed(result):,.0f}",
        f"{_speed(result, 'p90'):,.0f}-{_speed(result, 'p10'):,.0f}",
        f"{result['peak_gib']:.1f}",
        _times_one(result, results),
        str(WANTED.get((result["engine"], result["gpus"]), "")),
        *_apart(result, results),
        *(f"{result[name]:.2f}" if name in result else "" for name in TIMES),
    )


def _moved_cells(result: dict) -> tuple[str, ...]:
    return (
        result["option"],
        str(result["before"]),
        str(result["after"]),
        str(result["resumed_from"]),
        str(result["steps"]),
        f"{result['apart']:.5f}",
        f"{result['apart_after']:.5f}",
        f"{100 * result['norms_apart']:.3f}",
    )


def _link(result: dict) -> str:
    """The function gives GB/s of an all-reduce."""
    return "" if result["bus_gbs"] is None else f"{result['bus_gbs']:.1f}"


def _slow_cells(result: dict, results: Sequence[dict]) -> tuple[str, ...]:
    return (
        result["transport"],
        _link(result),
        result["option"],
        str(result["micro_batches"]),
        str(result["bucket_mib"]),
        f"{result['p50_ms']:.1f}",
        f"{_speed(result):,.0f}",
        _times_one(result, results),
    )
