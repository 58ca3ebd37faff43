"""Figures are files that are whole, drawn of a few thousand points however long the run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hamner.files import figure_bytes, write_whole
from hamner.plan.words import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 1_500
"""of a line; a picture has no more pixels across"""
START = 0.03
"""share of the tokens whose loss may lie above the picture of a long run, or all that follows
would be flat"""
LONG = 200
"""records of such a run"""


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """The function gives the means of neighbouring points, so that MAX_POINTS are left.

    Args:
        x, y: (n,); points whose y is not finite are left out.

    Returns:
        x, y, and the lowest and the highest y of those that each point stands for.
    """
    kept = np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) <= MAX_POINTS:
        return x, y, y, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)
    starts, counts = edges[:-1], np.diff(edges)
    sums = (np.add.reduceat(values, starts) / counts for values in (x, y))
    return *sums, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def draw_line(axes: "Axes", x: np.ndarray, y: np.ndarray, *, label: str, **style) -> None:
    """The function draws a line; where it stands for many points, their range behind it."""
    at, mean, low, high = thin(x, y)
    (line,) = axes.plot(at, mean, label=label, **{"linewidth": 1} | style)
    if (high > low).any():
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def cut_start(
    axes: "Axes", curves: Iterable[tuple[np.ndarray, np.ndarray]], *others: float
) -> None:
    """The picture of long curves ends above what they were after their first tokens.

    Args:
        axes: with the curves.
        curves: tokens and losses, (n,) each.
        others: losses that are to be seen too.
    """
    shown = list(others)
    for tokens, loss in curves:
        later = loss[np.isfinite(loss) & (tokens >= START * tokens[-1])]
        if len(later) < LONG:
            return
        shown += [later.min(), later.max()]
    margin = 0.05 * (max(shown) - min(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)


def show_tokens(axes: "Axes") -> None:
    """The axis across is of tokens: 2B, 500M."""
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(tokens)))


def write_panels(path: Path, panels: Iterable[Callable[["Axes"], None]]) -> Path:
    """The function writes panels, one above the other, that share their axis of tokens.

    Raises:
        OSError: the disk does not take it; a picture that was there is as it was.
    """
    panels = list(panels)
    # Not pyplot's, which belongs to a screen.
    figure = Figure(figsize=(7, 1 + 3 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), sharex=True, squeeze=False).flat
    for axes, panel in zip(rows, panels, strict=True):
        panel(axes)
        axes.grid(alpha=0.3)
    show_tokens(axes)
    return write_figure(path, figure)


def write_figure(path: Path, figure: Figure) -> Path:
    """The function writes a figure in the format of its file's ending.

    Raises:
        OSError: the disk does not take it; a picture that was there is as it was.
    """
    write_whole(path, figure_bytes(figure, path.suffix.removeprefix(".")))
    return path
