"""Several runs are laid beside each other: their losses by tokens and by hours, and how far they
are from the first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hamner.checkpoint.run_folder import RunFolder
from hamner.config.train import TrainConfig
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.plan.words import short
from hamner.plot.figure import cut_start, draw_line, show_tokens, write_figure
from hamner.plot.log import RunLog, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NATS, BITS = "nats per token", "bits per byte"


@dataclass(frozen=True)
class Run:
    """A run is what its folder says of it."""

    name: str
    folder: RunFolder
    log: RunLog
    config: TrainConfig | None
    tokenizer: Tokenizer | None
    """the run's own, or None for a folder without its configuration"""

    @classmethod
    def read(cls, path: Path) -> "Run":
        """The method reads a run's folder.

        Raises:
            UserError: it holds no metrics, or the rest of it cannot be read.
        """
        folder = RunFolder(path)
        if not folder.metrics.is_file():
            if folder.config.is_file():
                raise UserError(f"nothing to compare: {path} has not logged a step yet")
            raise UserError(f"{path} is no run's folder: it has no {folder.metrics.name}")
        log = read_log(folder.metrics)
        config = TrainConfig.read(folder.config) if folder.config.is_file() else None
        tokenizer = folder.open_tokenizer(config) if config else None
        return cls(path.resolve().name, folder, log, config=config, tokenizer=tokenizer)

    @property
    def is_sft(self) -> bool:
        return self.config is not None and self.config.sft is not None

    def bits_per_nat(self) -> float | None:
        """One nat per token is so many bits per byte, by the text of the run's validation rows.

        None where the folder has no such rows. A token that ends a text counts, without a byte.
        """
        if self.tokenizer is None or not self.folder.validation.is_file():
            return None
        try:
            targets = load_file(self.folder.validation)["targets"]
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(f"{self.folder.validation} cannot be read: {error}") from error
        targets = targets[targets >= 0]  # the others are not learned
        text = targets[targets != self.tokenizer.eot_id].tolist()
        size = len(self.tokenizer.decode(text).encode())
        return len(targets) / size / math.log(2) if size else None


@dataclass(frozen=True)
class Comparison:
    """The comparison holds every run against the first, in one unit of the loss."""

    runs: Sequence[Run]
    unit: str
    scales: Sequence[float]
    """of each run: the unit's value of one nat per token"""
    remarks: Sequence[str]
    """what a reader of the losses must know"""

    def loss(self, index: int, field: str = "loss") -> np.ndarray:
        """The method gives a run's losses in the unit, (n,)."""
        return self.scales[index] * self.runs[index].log[field]

    def last_loss(self, index: int, field: str) -> float | None:
        """The method gives a run's newest loss in the unit."""
        last = self.runs[index].log.last(field)
        return None if last is None else self.scales[index] * last

    def difference(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The method says by how much a run's training loss is above the first's, where both have
        been.

        Returns:
            tokens and differences, (m,) each, at the run's own readings; the first's are
            interpolated.
        """
        (first, ours), (tokens, losses) = (self._readings(i) for i in (0, index))
        shared = (tokens >= first[0]) & (tokens <= first[-1]) if len(first) else tokens < 0
        tokens, losses = tokens[shared], losses[shared]
        return tokens, losses - np.interp(tokens, first, ours) if len(tokens) else losses

    def _readings(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        loss = self.loss(index)
        kept = np.isfinite(loss)
        return self.runs[index].log["tokens"][kept], loss[kept]


def compare(paths: Sequence[Path]) -> Comparison:
    """The function reads runs and finds the unit in which their losses can be compared.

    Raises:
        UserError: one of them is no run, or its losses cannot be compared with the others'.
    """
    runs = [Run.read(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        named = zip(runs, paths, strict=True)
        runs = [replace(run, name=str(path)) for run, path in named]
    remarks = []
    unknown = [run.name for run in runs if run.tokenizer is None]
    if unknown:
        remarks.append(
            f"{', '.join(unknown)}: no config.json, so its tokenizer is taken for the others'"
        )
    if len({run.is_sft for run in runs}) == 2:
        tuned = ", ".join(run.name for run in runs if run.is_sft)
        remarks.append(f"{tuned}: fine-tuning, whose loss is that of the answers alone")
    tokenizers = {run.tokenizer.fingerprint: run.name for run in runs if run.tokenizer}
    if len(tokenizers) < 2:
        return Comparison(runs, NATS, [1.0] * len(runs), remarks)
    scales = [run.bits_per_nat() for run in runs]
    missing = [run.name for run, scale in zip(runs, scales, strict=True) if scale is None]
    if missing:
        a, b = list(tokenizers.values())[:2]
        raise UserError(
            f"{a} and {b} have different tokenizers, so their losses per token cannot be compared, "
            f"and {', '.join(missing)} has no validation rows to count bytes by: compare runs with "
            "one tokenizer, or by python -m hamner.evaluate"
        )
    remarks.append(
        "the tokenizers differ: losses are in bits per byte, by the bytes of each run's validation "
        "rows"
    )
    return Comparison(runs, BITS, scales, remarks)


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """The function draws losses by tokens and by hours, and their differences from the first run.

    Raises:
        OSError: the disk does not take it; a picture that was there is as it was.
    """
    runs = comparison.runs
    rows = 2 if len(runs) > 1 else 1
    figure = Figure(figsize=(11, 1 + 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False, height_ratios=(2, 1)[:rows])
    by_tokens, by_hours = grid[0]
    by_hours.sharey(by_tokens)
    for index, run in enumerate(runs):
        style = {"color": colormaps["tab10"](index % 10), "label": run.name}
        draw = partial(_draw_losses, comparison=comparison, index=index, style=style)
        draw(by_tokens, run.log["tokens"])
        draw(by_hours, run.log["seconds"] / 3600)
        if len(runs) > 1:
            draw_line(grid[1, 0], *comparison.difference(index), **style)
            speed = run.log["tokens_per_second"]
            draw_line(grid[1, 1], run.log["tokens"], speed, **style)
    by_tokens.set_ylabel(f"loss, {comparison.unit}")
    curves = [(run.log["tokens"], comparison.loss(index)) for index, run in enumerate(runs)]
    cut_start(by_tokens, curves)
    by_hours.set_xlabel("hours of training")
    if len(runs) > 1:
        grid[1, 0].set_ylabel(f"above {runs[0].name}")
        grid[1, 1].set_ylabel("tokens/s")
    for axes in (by_tokens, *grid[1:].flat):
        show_tokens(axes)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    by_tokens.legend(fontsize="small", title="line: training, points: validation")
    write_figure(path, figure)


def _draw_losses(
    axes: "Axes", x: np.ndarray, comparison: Comparison, index: int, style: dict
) -> None:
    """The function draws a run's training loss, and its validation loss as points."""
    draw_line(axes, x, comparison.loss(index), **style)
    validation = comparison.loss(index, "val_loss")
    made = np.isfinite(validation) & np.isfinite(x)
    style = {"color": style["color"], "markeredgecolor": "white"}
    axes.plot(x[made], validation[made], "o", markersize=4, **style)


def lines_of(comparison: Comparison) -> list[str]:
    """The lines have what is to be known of the losses, and a table with a row for each run."""
    titles = ("", "tokens", "hours", "tokens/s", "training", "validation", "above", "largest")
    rows = [titles, *(_row(comparison, index) for index in range(len(comparison.runs)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"note: {remark}" for remark in comparison.remarks]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    unit = f"losses at the end in {comparison.unit}"
    if len(comparison.runs) > 1:
        unit += (
            f"; above {comparison.runs[0].name}: mean difference of the training losses at the "
            "same tokens, and the largest one"
        )
    return [*lines, unit]


def _row(comparison: Comparison, index: int) -> list[str]:
    """The row is of texts, empty where nothing is known."""
    run, difference = comparison.runs[index], comparison.difference(index)[1]
    seconds, speeds = run.log.last("seconds"), run.log["tokens_per_second"]
    known = speeds[np.isfinite(speeds)]
    losses = [comparison.last_loss(index, name) for name in ("loss", "val_loss")]
    is_compared = index > 0 and len(difference) > 0
    return [
        run.name,
        short(run.log.last("tokens")),
        "" if seconds is None else f"{seconds / 3600:.2f}",
        f"{np.median(known):,.0f}" if len(known) else "",
        *("" if loss is None else f"{loss:.4f}" for loss in losses),
        f"{difference.mean():+.4f}" if is_compared else "",
        f"{np.abs(difference).max():.4f}" if is_compared else "",
    ]
