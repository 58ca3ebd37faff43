"""`hamner.train` that writes down when its phases begin and end, for `bench.kills`.

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


class Diary:
    """The diary is told of every phase of a run, by its training thread and its writer's.

    Args:
        path: the file, written at once: whatever kills the process, the line is there.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.step = 0
        """the last one that began"""
        self.in_evaluation = False

    def __call__(self, phase: str, step: int) -> None:
        """The diary notes what begins or ends; see `hamner.train.loop.TrainingLoop`."""
        if phase in ("forward", "graph") and step > self.step:
            self.step = step
            self.note("step", step, "begins")
        elif phase == "step done":
            self.note("step", step, "ends")
        elif phase == "evaluation":
            self.in_evaluation = True
            self.note("evaluation", step, "begins")
        elif self.in_evaluation and phase == "":
            self.in_evaluation = False
            self.note("evaluation", step, "ends")
        elif phase in ("save", "saved"):
            self.note("save", step, "begins" if phase == "save" else "ends")

    def note(self, phase: str, step: int, what: str) -> None:
        """A line is appended."""
        os.write(self.descriptor, f"{phase} {step} {what} {time.monotonic()}\n".encode())


if __name__ == "__main__":
    diary = Diary(Path(sys.argv.pop(1)))
    run_command(lambda args: main(args, on_phase=diary))
