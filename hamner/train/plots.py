"""The pictures of a run are drawn from its metrics.jsonl."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from hamner.checkpoint.run_folder import RunFolder
from hamner.files import read_records


def draw(run: RunFolder) -> list[Path]:
    """`draw` draws loss, throughput, VRAM (with a GPU) and routers (of a mixture) over tokens,
    and returns the files."""
    records = [r for r in read_records(run.metrics) if _is_number(r.get("tokens"))]
    if not records:
        return []
    speed = partial(_line, field="tokens_per_second", ylabel="tokens/s", label="tokens/s")
    files = [
        _figure(run.plots / "loss.png", records, _loss),
        _figure(run.plots / "throughput.png", records, speed),
    ]
    if any(_is_number(r.get("peak_vram_gib")) for r in records):
        peak = partial(_line, field="peak_vram_gib", ylabel="peak allocated, GiB", label="VRAM")
        files.append(_figure(run.plots / "vram.png", records, peak))
    routed = [r for r in records if _is_routed(r.get("router"))]
    if routed:
        path = run.plots / "router.png"
        files.append(_figure(path, routed, _expert_load, _router_entropy))
    return files


def _loss(axes, records: list[dict]) -> None:
    _line(axes, records, "loss", ylabel="cross-entropy, nats per token", label="training")
    # Every record repeats the latest evaluation: draw it where it was made.
    validation = [
        r for r in records if r.get("val_step") == r["step"] and _is_number(r.get("val_loss"))
    ]
    if validation:
        tokens = [r["tokens"] for r in validation]
        axes.plot(tokens, [r["val_loss"] for r in validation], "o-", label="validation")
    spikes = [(s["tokens"], s["loss"]) for r in records for s in r.get("spikes", ())]
    if spikes:
        axes.plot(*zip(*spikes, strict=True), "rx", label="spike")
    skipped = [
        later["tokens"]
        for earlier, later in zip([{}, *records], records, strict=False)
        if later.get("skipped_steps", 0) > earlier.get("skipped_steps", 0)
    ]
    for number, tokens in enumerate(skipped):
        axes.axvline(
            tokens, color="red", alpha=0.3, linewidth=1, label="" if number else "skipped steps"
        )
    axes.legend()


def _line(axes, records: list[dict], field: str, ylabel: str, label: str) -> None:
    points = [(r["tokens"], r[field]) for r in records if _is_number(r.get(field))]
    axes.plot([x for x, _ in points], [y for _, y in points], label=label, linewidth=1)
    axes.set(ylabel=ylabel)


def _is_number(value: object) -> bool:
    """The answer is whether a value, of a file that anyone may have written, can be drawn."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _is_routed(router: object) -> bool:
    """Routers can be drawn if a record has loads and an entropy for each of their layers."""
    if not isinstance(router, dict):
        return False
    load, entropy = router.get("load"), router.get("entropy")
    return (
        isinstance(load, list)
        and isinstance(entropy, list)
        and 0 < len(load) == len(entropy)
        and all(isinstance(shares, list) and shares for shares in load)
        and all(_is_number(value) for values in (*load, entropy) for value in values)
    )


def _expert_load(axes, records: list[dict]) -> None:
    """The panel has the most and the least loaded expert of each layer; 1 is the fair share, 1 /
    experts of the assignments."""
    for _, color, points in _layers(records, "load"):
        tokens = [x for x, _ in points]
        for least_or_most, style in ((max, "-"), (min, "--")):
            loads = [least_or_most(shares) * len(shares) for _, shares in points]
            axes.plot(tokens, loads, style, color=color, linewidth=1)
    axes.axhline(1.0, color="black", linewidth=0.8, label="fair share")
    axes.set(ylabel="load / fair share: most (-), least (--)")
    axes.legend()


def _router_entropy(axes, records: list[dict]) -> None:
    for layer, color, points in _layers(records, "entropy"):
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=f"layer {layer}")
    axes.set(ylabel="router entropy, nats")
    axes.legend(fontsize="xx-small", ncols=4)


def _layers(records: list[dict], field: str) -> Iterator[tuple[int, tuple, list[tuple]]]:
    """The iterator gives each layer, its color along one scale, and a router field over tokens."""
    routers = [(r["tokens"], r["router"][field]) for r in records]
    layers = max(len(values) for _, values in routers)
    scale = colormaps["viridis"]
    for layer in range(layers):
        points = [(tokens, values[layer]) for tokens, values in routers if layer < len(values)]
        yield layer, scale(layer / layers), points


def _figure(path: Path, records: list[dict], *plots: Callable) -> Path:
    """The function writes a figure of panels, one above the other, that share their axis of tokens.

    Args:
        path: of the figure.
        records: that are drawn.
        plots: of (axes, records) draw a panel each.
    """
    # Not pyplot's, which belongs to a screen.
    figure = Figure(figsize=(7, 1 + 3 * len(plots)), layout="constrained")
    panels = figure.subplots(len(plots), sharex=True, squeeze=False)
    for axes, plot in zip(panels.flat, plots, strict=True):
        plot(axes, records)
        axes.grid(alpha=0.3)
    axes.set(xlabel="tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=120)
    return path
