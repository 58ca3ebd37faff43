"""Processes fail here at a chosen moment; they are started instead of `hamner.train`.

As a module it is a command for torchrun: the first start loses rank 1 in the middle of step 7, the
second one rank 0 in the middle of the first save from step 12 on.
"""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp

from hamner.checkpoint import format as checkpoint
from hamner.cli import run_command
from hamner.parallel.ranks import Rank
from hamner.train.__main__ import main
from hamner.train.step import OnPhase, ignore_phase


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(1_000)


def fail() -> None:
    raise ValueError("a broken\ncard")


def be_interrupted() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def in_step(step: int, fault: Callable[[], None]) -> OnPhase:
    """The fault happens between backward and update of a step, counted from 1."""
    return _at("optimizer", step, fault)


def before_step(step: int, fault: Callable[[], None]) -> OnPhase:
    """The fault happens when a step is due, counted from 1."""
    return _at("data", step, fault)


def _at(phase: str, step: int, fault: Callable[[], None]) -> OnPhase:
    def on_phase(begun: str, of_step: int) -> None:
        if (begun, of_step) == (phase, step):
            fault()

    return on_phase


def in_save(step: int, fault: Callable[[], None]) -> None:
    """The fault happens when the tensors of a checkpoint of `step` or later are on disk; a busy
    machine may still be writing the one before when that of `step` is due."""
    finish_save = checkpoint.finish_save

    def finish_once(temporary, of_step, state):
        if of_step >= step:
            fault()
        return finish_save(temporary, of_step, state)

    checkpoint.finish_save = finish_once


def in_part_of_second_save(fault: Callable[[], None]) -> None:
    """The fault happens when this process, with FSDP2, writes its part of the second checkpoint's
    first file; the first checkpoint has two and is whole."""
    writer, calls = dcp.HuggingFaceStorageWriter, itertools.count(1)
    real_write = writer.write_data

    def write_data(*args):
        if next(calls) == 3:
            fault()
        return real_write(*args)

    writer.write_data = write_data


def once_saved(checkpoints: Path, fault: Callable[[], None]) -> Callable[[], None]:
    """The fault waits for a run's first checkpoint."""

    def wait() -> None:
        while not checkpoint.find(checkpoints):
            time.sleep(0.05)
        fault()

    return wait


if __name__ == "__main__":
    rank, on_phase = Rank.read(), ignore_phase
    if rank.restarts == 0 and rank.global_rank == 1:
        on_phase = in_step(7, die)
    if rank.restarts == 1 and rank.global_rank == 0:
        in_save(12, die)
    sys.argv[0] = "hamner.train"
    run_command(lambda args: main(args, on_phase=on_phase))
