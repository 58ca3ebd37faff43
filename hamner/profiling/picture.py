"""Draws a step as it ran on the GPU: which kind of work, when."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hamner.profiling.categories import category_of
from hamner.profiling.trace import Activity, Trace


def last_step(trace: Trace) -> list[Activity]:
    """The work launched within the trace's last step; all of it if it marks none."""
    steps = trace.steps
    return (steps and trace.launched_within(steps[-1], steps[-1])) or trace.activities


def draw(traces: Sequence[Trace], path: Path) -> None:
    """Write the last step of each trace, one below the other on one scale of time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # a training machine has no display
    import matplotlib.pyplot as plt

    spans: list[dict[str, list[tuple[float, float]]]] = []
    for trace in traces:
        activities = last_step(trace)
        begin = min((a.start for a in activities), default=0.0)
        by_category = defaultdict(list)
        for a in activities:
            by_category[category_of(a)].append(((a.start - begin) / 1e3, a.duration / 1e3))
        spans.append(by_category)
    # Longest first, in the same order and colours for all.
    totals = defaultdict(float)
    for by_category in spans:
        for category, bars in by_category.items():
            totals[category] += sum(duration for _, duration in bars)
    categories = sorted(totals, key=totals.get, reverse=True)
    colours = dict(zip(categories, plt.colormaps["tab10"].colors * len(categories), strict=False))

    figure, plots = plt.subplots(
        len(traces),
        figsize=(9, 0.8 + 0.24 * len(categories) * len(traces)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, trace, by_category in zip(plots[:, 0], traces, spans, strict=True):
        for lane, category in enumerate(categories):
            bars = by_category.get(category, [])
            drawn = axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=colours[category])
            # A kernel narrower than a pixel tints it instead of being rounded away.
            drawn.set(snap=False, linewidth=0)
        axes.set_yticks(range(len(categories)), categories, fontsize=8)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.set_title(str(trace.path), fontsize=8, loc="left")
    plots[-1, 0].set_xlabel("ms since the step's first kernel")
    figure.savefig(path, dpi=120)
    plt.close(figure)
