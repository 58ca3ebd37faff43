"""`hamner.train` that writes down when its phases begin and end, for `bench.kills`.

python -m bench.watched_train DIARY [flags of hamner.train]

A line of DIARY is PHASE, the step, `begins` or `ends` and the seconds of the monotonic clock. A
phase that a killed process was in has no end there.
"""

import os
import sys
import time
from pathlib import Path

from hamner.checkpoint import format as checkpoint
from hamner.cli import run_command
from hamner.train.__main__ import main
from hamner.train.loop import Trainer


def watch(path: Path) -> None:
    """Have the phases written down from now on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    train_step, finish_step = Trainer.train_step, Trainer.finish_step
    evaluate, save = Trainer.evaluate, checkpoint.save

    def note(phase: str, step: int, what: str) -> None:
        # Written at once: whatever kills the process, the line is there.
        os.write(descriptor, f"{phase} {step} {what} {time.monotonic()}\n".encode())

    def watched_train_step(trainer, *args):
        note("step", trainer.step + 1, "begins")
        return train_step(trainer, *args)

    def watched_finish_step(trainer, *args):
        finish_step(trainer, *args)
        note("step", trainer.step, "ends")

    def watched_evaluate(trainer):
        note("evaluation", trainer.step, "begins")
        evaluate(trainer)
        note("evaluation", trainer.step, "ends")

    def watched_save(folder, step, **parts):
        note("save", step, "begins")
        saved = save(folder, step, **parts)
        note("save", step, "ends")
        return saved

    Trainer.train_step, Trainer.finish_step = watched_train_step, watched_finish_step
    Trainer.evaluate, checkpoint.save = watched_evaluate, watched_save


if __name__ == "__main__":
    watch(Path(sys.argv.pop(1)))
    run_command(main)
