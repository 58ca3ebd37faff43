"""The module draws a step as it ran on the GPU: which kind of work, when."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hamner.files import figure_bytes, write_output
from hamner.profile.categories import CATEGORIES, category_of
from hamner.profile.trace import Trace


def draw(traces: Sequence[Trace], path: Path) -> None:
    """The function writes the last step of each trace as a PNG, all on one scale of time.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = dict(zip(CATEGORIES, colormaps["tab10"].colors, strict=True))
    spans = [_spans(trace) for trace in traces]
    categories = [c for c in CATEGORIES if any(c in by_category for by_category in spans)]
    figure = Figure(figsize=(9, 0.8 + 0.24 * len(categories) * len(traces)), layout="constrained")
    plots = figure.subplots(len(traces), sharex=True, squeeze=False)[:, 0]
    for axes, trace, by_category in zip(plots, traces, spans, strict=True):
        for lane, category in enumerate(categories):
            bars = by_category.get(category, [])
            drawn = axes.broken_barh(bars, (lane - 0.4, 0.8), facecolors=colours[category])
            # A kernel narrower than a pixel tints it instead of being rounded away.
            drawn.set(snap=False, linewidth=0)
        axes.set_yticks(range(len(categories)), categories, fontsize=8)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.set_title(str(trace.path), fontsize=8, loc="left")
    plots[-1].set_xlabel("ms since the step's first kernel")
    write_output(path, figure_bytes(figure))


def _spans(trace: Trace) -> dict[str, list[tuple[float, float]]]:
    """The last step's work has (begin, duration) in ms for each piece, by category."""
    activities = trace.launched_in(trace.steps[-1:])
    begin = activities[0].start
    spans = defaultdict(list)
    for activity in activities:
        span = (activity.start - begin) / 1e3, activity.duration / 1e3
        spans[category_of(activity)].append(span)
    return spans
