"""`python -m hamner.plot` draws what runs wrote down, while they train or afterwards."""

import sys

if __package__ != "hamner.plot":
    print("error: start this with python -m hamner.plot", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hamner.cli import read_flags, run_command
from hamner.errors import UserError
from hamner.files import PNG, refuse_foreign, writing

FORMATS = {".png": PNG, ".svg": b"<?xml", ".pdf": b"%PDF"}
"""endings of pictures, and how such a file begins"""
OUTPUT = Path("runs.png")
"""where several runs are drawn if nothing is said"""


@dataclass(frozen=True)
class PlotConfig:
    """Draw one run's pictures anew, or lay several runs beside each other by tokens and by hours.

    Of several, the first is the one that the others are compared with.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of runs, finished or under way"""
    output: Path | None = None
    """picture of all of them, .png, .svg or .pdf; default runs.png, or for one run the pictures in
    its folder's plots/, as training draws them"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name a run's folder, or several to compare: runs/a runs/b")
        if self.output and self.output.suffix not in FORMATS:
            raise UserError(f"--output {self.output} must end in {', '.join(FORMATS)}")
        if output := self.output or (OUTPUT if len(self.runs) > 1 else None):
            refuse_foreign(output, "--output", begins=FORMATS[output.suffix])


def plot(config: PlotConfig) -> list[str]:
    """The function draws what `config` says and returns lines for people.

    Raises:
        UserError: a folder is no run's, the losses cannot be compared, or the picture cannot be
            written.
    """
    # Matplotlib takes a second to load.
    from hamner.checkpoint.run_folder import RunFolder
    from hamner.plot.comparison import compare, draw_comparison, lines_of
    from hamner.plot.run import draw_run

    if len(config.runs) == 1 and config.output is None:
        run = RunFolder(config.runs[0])
        if not run.metrics.is_file():
            if run.config.is_file():
                return [f"nothing to draw: {run.path} has not logged a step yet"]
            raise UserError(f"{run.path} is no run's folder: it has no {run.metrics.name}")
        with writing(str(run.plots)):
            return [f"wrote {path}" for path in draw_run(run)]
    comparison, output = compare(config.runs), config.output or OUTPUT
    with writing(f"--output {output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_comparison(comparison, output)
    return [*lines_of(comparison), f"wrote {output}"]


def main(args: Sequence[str]) -> None:
    print("\n".join(plot(read_flags(PlotConfig, args, "hamner.plot"))))


if __name__ == "__main__":
    run_command(main)
