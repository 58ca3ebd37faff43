"""Which of a job's processes this is, as torchrun says in the environment. Torch-free."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hamner.config.train import CONFIG_FILE


@dataclass(frozen=True)
class Place:
    """A process among those of its job; one that nobody launched is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """on this machine"""
    local_world_size: int = 1
    """processes on this machine"""
    restarts: int = 0
    """times that torchrun has started the job again, `--max-restarts` at most"""

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Place":
        """The place torchrun gave this process; without all of its variables it is alone."""
        names = ("rank", "world_size", "local_rank", "local_world_size")
        if any(name.upper() not in environment for name in names):
            return cls()
        return cls(
            **{name: int(environment[name.upper()]) for name in names},
            restarts=int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes the run's folder."""
        return self.rank == 0

    @property
    def num_machines(self) -> int:
        """Machines of the job, each with as many processes."""
        return self.world_size // self.local_world_size


def resume_after_restart(args: Sequence[str], run_dir: Path) -> list[str]:
    """The command line, with `--resume` if torchrun repeats it after a failure.

    A job that failed before it made `run_dir` starts over.
    """
    again = Place.read().restarts and (run_dir / CONFIG_FILE).is_file()
    return [*args, "--resume"] if again and "--resume" not in args else list(args)
