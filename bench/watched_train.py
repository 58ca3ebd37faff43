"""The command is `hamner.train` that writes down when its phases begin and end, for `bench.kills`.

python -m bench.watched_train DIARY [flags of hamner.train]

A line of DIARY is PHASE, the step, `begins` or `ends` and the seconds of the monotonic clock. A
phase that a killed process was in has no end there.
"""

import os
import sys
import time
from pathlib import Path

from hamner.cli import run_command
from hamner.train.__main__ import main

FIRST_OF_A_STEP = ("forward", "graph")
"""the training step's phases of which one is the first"""


class Diary:
    """An observer of a run's phases (`hamner.train.step.OnPhase`) writes them down for good."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.last_step = 0
        """that began in this start"""
        self.evaluated: int | None = None
        """step of the evaluation under way"""

    def __call__(self, phase: str, step: int) -> None:
        """A phase begins, and with it the one before has ended; saves go on beside the others."""
        if phase in ("save", "saved"):
            self.note("save", step, "begins" if phase == "save" else "ends")
            return
        if self.evaluated is not None:
            self.note("evaluation", self.evaluated, "ends")
            self.evaluated = None
        if phase in FIRST_OF_A_STEP and step > self.last_step:
            self.last_step = step
            self.note("step", step, "begins")
        elif phase == "step done":
            self.note("step", step, "ends")
        elif phase == "evaluation":
            self.evaluated = step
            self.note("evaluation", step, "begins")

    def note(self, phase: str, step: int, what: str) -> None:
        """A line is written at once: whatever kills the process, it is there."""
        os.write(self.descriptor, f"{phase} {step} {what} {time.monotonic()}\n".encode())


if __name__ == "__main__":
    diary = Diary(Path(sys.argv.pop(1)))
    run_command(lambda args: main(args, on_phase=diary))
