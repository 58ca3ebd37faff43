"""Loss curves of several runs in one plot, and how far apart they are.

    python -m bench.loss_curves runs/triton runs/torch runs/triton-seed1 --output curves.png

The first run is the one the others are compared with: below the curves, their difference from it.
Two runs that differ only in their seed show how much of a difference is noise.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

from hamner.checkpoint.run_folder import RunFolder


def read_curve(run: Path) -> dict[int, float]:
    """The function gives the training loss by step."""
    lines = RunFolder(run).metrics.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if record["loss"] is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the picture, .png or .svg")
    arguments = parser.parse_args()
    curves = {run.name: read_curve(run) for run in arguments.runs}
    first, *others = curves

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    for name, curve in curves.items():
        top.plot(curve.keys(), curve.values(), label=name, linewidth=1)
    for name in others:
        steps = sorted(curves[first].keys() & curves[name].keys())
        differences = [curves[name][step] - curves[first][step] for step in steps]
        bottom.plot(steps, differences, label=f"{name} - {first}", linewidth=1)
        mean = sum(map(abs, differences)) / len(differences)
        most = max(map(abs, differences))
        print(f"{name} against {first}: mean |difference| {mean:.4f}, most {most:.4f} nats")
    top.set_ylabel("training loss, nats per token")
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
