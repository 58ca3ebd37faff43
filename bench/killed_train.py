"""`hamner.train` loses its last rank, once a checkpoint is whole.

    python -m bench.killed_train STEP [flags of hamner.train]

When STEP is due, the process waits for the run's first checkpoint and then kills itself, as the
system's out-of-memory killer would.
"""

import os
import signal
import time
from pathlib import Path

from hamner.checkpoint import format as checkpoint
from hamner.cli import run_command
from hamner.parallel.ranks import Rank
from hamner.train.__main__ import main, parse

POLL_SECONDS = 0.05


class Kill:
    """An observer of a run's phases (`hamner.train.step.OnPhase`) ends the process.

    Args:
        step: that is not taken any more.
        checkpoints: folder, of which one must be there.
    """

    def __init__(self, step: int, checkpoints: Path) -> None:
        self.step, self.checkpoints = step, checkpoints

    def __call__(self, phase: str, step: int) -> None:
        """The phase "data" is a step's first."""
        if (phase, step) == ("data", self.step):
            while not checkpoint.find(self.checkpoints):
                time.sleep(POLL_SECONDS)
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(args: list[str]) -> int | None:
    """The command trains; its last rank does not come to the end."""
    step, *flags = args
    rank, more = Rank.read(), {}
    if rank.global_rank == rank.world_size - 1:
        more["on_phase"] = Kill(int(step), parse(flags).folder / "checkpoints")
    return main(flags, **more)


if __name__ == "__main__":
    run_command(train_until_killed)
