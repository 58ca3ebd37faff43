"""Processes that fail at a chosen moment, to be started in place of `hamner.train`.

As a module it is a command for torchrun: the first start loses rank 1 in the middle of step 7, the
second one rank 0 in the middle of the first save from step 12 on.
"""

import os
import signal
import sys
import time
from collections.abc import Callable

from hamner.checkpoint import format as checkpoint
from hamner.cli import run_command
from hamner.parallel.ranks import Rank
from hamner.train.__main__ import main
from hamner.train.loop import Trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(1_000)


def fail() -> None:
    raise ValueError("a broken\ncard")


def be_interrupted() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def in_step(step: int, fault: Callable[[], None]) -> None:
    """Let a fault happen between backward and update of a step, counted from 1."""
    from hamner.train.optimizer import AdamW

    update = AdamW.step

    def step_once(self, *args):
        if self.steps == step - 1:
            fault()
        return update(self, *args)

    AdamW.step = step_once


def before_step(step: int, fault: Callable[[], None]) -> None:
    """Let a fault happen when a step is due, counted from 1."""
    train_step = Trainer.train_step

    def step_once(self, *args):
        if self.step == step - 1:
            fault()
        return train_step(self, *args)

    Trainer.train_step = step_once


def in_save(step: int, fault: Callable[[], None]) -> None:
    """Let a fault happen when the tensors of a checkpoint of `step` or later are on disk; a busy
    machine may still be writing the one before when that of `step` is due."""
    finish_save = checkpoint.finish_save

    def finish_once(temporary, of_step, state):
        if of_step >= step:
            fault()
        return finish_save(temporary, of_step, state)

    checkpoint.finish_save = finish_once


if __name__ == "__main__":
    rank = Rank.read()
    if rank.restarts == 0 and rank.global_rank == 1:
        in_step(7, die)
    if rank.restarts == 1 and rank.global_rank == 0:
        in_save(12, die)
    sys.argv[0] = "hamner.train"
    run_command(main)
