"""The pictures of one run are drawn from what it wrote down, beside what was planned."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps

from hamner.checkpoint.run_folder import RunFolder
from hamner.config.options import total_tokens
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.files import read_records
from hamner.plan.projection import LossFit, fit_run
from hamner.plan.run_curve import Reading, RunCurve, join_readings
from hamner.plan.words import short
from hamner.plot.figure import cut_start, draw_line, write_panels
from hamner.plot.log import RunLog, number, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AHEAD = 2.0
"""how far the expected loss is drawn: so many times the tokens seen, or to the run's end"""


def draw_run(run: RunFolder) -> list[Path]:
    """The function draws loss, throughput, VRAM (with a GPU) and routers (of a mixture) over tokens
    into the run's folder, and returns the files.

    Raises:
        UserError: there is nothing to draw.
        OSError: the disk does not take it.
    """
    log = read_log(run.metrics)
    loss = partial(_draw_loss, log=log, expected=expect(run, log))
    drawn = {"loss.png": [loss]}
    fields = {
        "throughput.png": ("tokens_per_second", "tokens_per_second", "tokens/s"),
        "vram.png": ("peak_vram_gib", "peak_gib", "peak allocated, GiB"),
    }
    planned = _read_plan(run)
    for name, (field, key, label) in fields.items():
        if log.has(field):
            measured = partial(_draw_measured, log=log, field=field, label=label)
            drawn[name] = [partial(measured, planned=planned.get(key))]
    if log.routed:
        drawn["router.png"] = [
            partial(_draw_expert_load, routed=log.routed),
            partial(_draw_router_entropy, routed=log.routed),
        ]
    run.plots.mkdir(exist_ok=True)
    return [write_panels(run.plots / name, panels) for name, panels in drawn.items()]


class ExpectedLoss:
    """The loss that is expected of a run, with the interval that holds it in 80% of runs.

    Args:
        fit: of the run so far.
        curve: that was fitted.
        end: logged tokens at which the run is to end.
    """

    def __init__(self, fit: LossFit, curve: RunCurve, end: float) -> None:
        seen = float(curve.tokens[-1])
        self.seen, self.end, self.fit, self.start = seen, max(end, seen), fit, curve.start
        first = curve.start + 0.1 * fit.tokens_seen
        self.tokens = np.linspace(first, min(self.end, AHEAD * seen), 100)  # as logged
        self.loss, self.low, self.high = np.array([self.at(t) for t in self.tokens]).T

    def at(self, tokens: float) -> tuple[float, float, float]:
        """The loss after so many logged tokens, and its bounds, are in nats."""
        trained = tokens - self.start
        return self.fit.loss(trained), *self.fit.interval(trained)

    def __str__(self) -> str:
        loss, low, high = self.at(self.end)
        return (
            f"expected: {loss:.2f} at {short(self.end)} tokens, {low:.2f} to {high:.2f} in "
            "80% of runs"
        )


def expect(run: RunFolder, log: RunLog) -> ExpectedLoss | None:
    """The function says what loss the plan expects of a run, where a law fits it so far.

    It does not of fine-tuning, and not of a folder without its configuration.
    """
    try:
        config = TrainConfig.read(run.config)
        if config.sft is not None:
            return None
        names = ("step", "tokens", "loss", "lr")
        rows = np.stack([log[name] for name in names])
        rows[3] = np.nan_to_num(rows[3])
        kept = np.isfinite(rows).all(0) & (rows[1] > 0)
        readings = (Reading(*row) for row in rows.T[kept].tolist())
        curve = join_readings(run.metrics, readings, math.log(config.model.vocab_size))
        end = total_tokens(config)
        return ExpectedLoss(fit_run(curve, end), curve, end)
    except UserError:  # NoLaw among them
        return None


def _read_plan(run: RunFolder) -> dict[str, tuple[float, ...]]:
    """The function reads what was projected, by name: lowest, expected and highest, or one number.

    Beside a number in plan.jsonl's `projected` there may be its bounds, such as
    `tokens_per_second_interval`.
    """
    planned: dict[str, tuple[float, ...]] = {}
    for row in read_records(run.plan):
        projected = row.get("projected")
        for name, value in projected.items() if isinstance(projected, dict) else ():
            bounds = projected.get(f"{name}_interval")
            bounds = bounds if isinstance(bounds, list) and len(bounds) == 2 else [value, value]
            values = tuple(number(value) for value in (bounds[0], value, bounds[1]))
            if all(map(math.isfinite, values)):
                planned[name] = values
    return planned


def _draw_loss(axes: "Axes", log: RunLog, expected: ExpectedLoss | None) -> None:
    tokens, loss = log["tokens"], log["loss"]
    if expected:
        style = {"color": "tab:green", "linewidth": 1}
        axes.plot(expected.tokens, expected.loss, "--", label=str(expected), **style)
        band = expected.low, expected.high
        axes.fill_between(expected.tokens, *band, color="tab:green", alpha=0.15, linewidth=0)
    draw_line(axes, tokens, loss, label="training", color="tab:blue")
    made = np.isfinite(log["val_loss"])
    if made.any():
        style = {"color": "tab:orange", "markersize": 3 if made.sum() > 50 else 6}
        axes.plot(tokens[made], log["val_loss"][made], "o-", label="validation", **style)
    if len(log.spikes):
        axes.plot(*log.spikes.T, "rx", label="spike")
    skipped = tokens[np.diff(np.nan_to_num(log["skipped_steps"]), prepend=0) > 0]
    for at in skipped:
        label = "skipped steps" if at == skipped[0] else ""
        axes.axvline(at, color="red", alpha=0.3, linewidth=1, label=label)
    others = [*log.spikes[:, 1], *(expected.low[-1:] if expected else ())]
    cut_start(axes, [(tokens, loss)], *others)
    axes.set(ylabel="cross-entropy, nats per token")
    axes.legend(fontsize="small")


def _draw_measured(
    axes: "Axes", log: RunLog, field: str, label: str, planned: tuple[float, ...] | None
) -> None:
    draw_line(axes, log["tokens"], log[field], label="measured")
    if planned:
        low, expected, high = planned
        axes.axhline(expected, color="tab:green", linestyle="--", linewidth=1, label="projected")
        if high > low:
            axes.axhspan(low, high, color="tab:green", alpha=0.15, label="its interval")
        axes.legend(fontsize="small")
    axes.set(ylabel=label)


def _draw_expert_load(axes: "Axes", routed: list[tuple[float, dict]]) -> None:
    """The panel has the most and the least loaded expert of each layer; 1 is the fair share, 1 /
    experts of the assignments."""
    for _, color, points in _layers(routed, "load"):
        tokens = [x for x, _ in points]
        for least_or_most, style in ((max, "-"), (min, "--")):
            loads = [least_or_most(shares) * len(shares) for _, shares in points]
            axes.plot(tokens, loads, style, color=color, linewidth=1)
    axes.axhline(1.0, color="black", linewidth=0.8, label="fair share")
    axes.set(ylabel="load / fair share: most (-), least (--)")
    axes.legend()


def _draw_router_entropy(axes: "Axes", routed: list[tuple[float, dict]]) -> None:
    for layer, color, points in _layers(routed, "entropy"):
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=f"layer {layer}")
    axes.set(ylabel="router entropy, nats")
    axes.legend(fontsize="xx-small", ncols=4)


def _layers(
    routed: list[tuple[float, dict]], field: str
) -> Iterator[tuple[int, tuple, list[tuple]]]:
    """The iterator gives each layer, its color along one scale, and a router field over tokens."""
    layers = max(len(router[field]) for _, router in routed)
    scale = colormaps["viridis"]
    for layer in range(layers):
        points = [
            (tokens, router[field][layer])
            for tokens, router in routed
            if layer < len(router[field])
        ]
        yield layer, scale(layer / layers), points
