"""Pictures of a run, drawn from its metrics.jsonl."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

from hamner.run_folder import RunFolder, read_records

# Draw to files: a training machine has no display.
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402


def draw(run: RunFolder) -> list[Path]:
    """Write loss, throughput and, with a GPU, VRAM over tokens; returns the files."""
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


def _figure(path: Path, ylabel: str, records: list[dict], plot: Callable) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    plot(axes, records)
    axes.set(xlabel="tokens", ylabel=ylabel)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
