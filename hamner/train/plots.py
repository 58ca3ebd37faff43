"""Pictures of a run, drawn from its metrics.jsonl."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

from hamner.checkpoint.run_folder import RunFolder
from hamner.files import read_records

# Draw to files: a training machine has no display.
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402


def draw(run: RunFolder) -> list[Path]:
    """Write loss, throughput, VRAM (with a GPU) and routers (of a mixture) over tokens.

    Returns the files.
    """
    records = [r for r in read_records(run.metrics) if _is_number(r.get("tokens"))]
    if not records:
        return []
    files = [
        _figure(run.plots / "loss.png", "cross-entropy, nats per token", records, _loss),
        _figure(
            run.plots / "throughput.png",
            "tokens/s",
            records,
            lambda axes, records: _line(axes, records, "tokens_per_second", "tokens/s"),
        ),
    ]
    if any(_is_number(r.get("peak_vram_gib")) for r in records):
        files.append(
            _figure(
                run.plots / "vram.png",
                "peak allocated, GiB",
                records,
                lambda axes, records: _line(axes, records, "peak_vram_gib", "VRAM"),
            )
        )
    routed = [r for r in records if _is_routed(r.get("router"))]
    if routed:
        files.append(_router_figure(run.plots / "router.png", routed))
    return files


def _loss(axes, records: list[dict]) -> None:
    _line(axes, records, "loss", "training")
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


def _line(axes, records: list[dict], field: str, label: str) -> None:
    points = [(r["tokens"], r[field]) for r in records if _is_number(r.get(field))]
    axes.plot([x for x, _ in points], [y for _, y in points], label=label, linewidth=1)


def _is_number(value: object) -> bool:
    """Whether a value of a file that anyone may have written can be drawn."""
    return isinstance(value, int | float) and abs(value) < 1e300


def _is_routed(router: object) -> bool:
    """Whether a record's routers can be drawn: loads and an entropy for each of their layers."""
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


def _router_figure(path: Path, records: list[dict]) -> Path:
    """Above, the most and the least loaded expert of each layer; below, the layers' entropy."""
    figure, (load, entropy) = plt.subplots(2, figsize=(7, 7), sharex=True, layout="constrained")
    _expert_load(load, records)
    _router_entropy(entropy, records)
    return _finish(figure, path)


def _expert_load(axes, records: list[dict]) -> None:
    """Two lines a layer; 1 is the fair share, 1 / experts of the assignments."""
    for layer, color in _layer_colors(records):
        for least_or_most, style in ((max, "-"), (min, "--")):
            points = [
                (r["tokens"], least_or_most(shares[layer]) * len(shares[layer]))
                for r in records
                if layer < len(shares := r["router"]["load"])
            ]
            axes.plot(*zip(*points, strict=True), style, color=color, linewidth=1)
    axes.axhline(1.0, color="black", linewidth=0.8, label="fair share")
    axes.set(ylabel="load / fair share: most (-), least (--)")
    axes.legend()


def _router_entropy(axes, records: list[dict]) -> None:
    for layer, color in _layer_colors(records):
        points = [
            (r["tokens"], values[layer])
            for r in records
            if layer < len(values := r["router"]["entropy"])
        ]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=f"layer {layer}")
    axes.set(ylabel="router entropy, nats")
    axes.legend(fontsize="xx-small", ncols=4)


def _layer_colors(records: list[dict]) -> list[tuple[int, tuple]]:
    """A color for each layer, from the first to the last along one scale."""
    layers = max(len(r["router"]["load"]) for r in records)
    scale = plt.get_cmap("viridis")
    return [(layer, scale(layer / layers)) for layer in range(layers)]


def _figure(path: Path, ylabel: str, records: list[dict], plot: Callable) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    plot(axes, records)
    axes.set(ylabel=ylabel)
    return _finish(figure, path)


def _finish(figure, path: Path) -> Path:
    """Give the panels, which share it, their axis of tokens; write and close the figure."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.axes[-1].set(xlabel="tokens")
    figure.axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
