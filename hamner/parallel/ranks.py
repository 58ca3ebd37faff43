"""A rank says which of a job's processes this is, as torchrun set it. Torch-free."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hamner.config.train import CONFIG_FILE


@dataclass(frozen=True)
class Rank:
    """A rank says which process of its job this is; one that nobody launched is the only one."""

    global_rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """on this machine"""
    local_world_size: int = 1
    """processes on this machine"""
    restarts: int = 0
    """times that torchrun has started the job again, `--max-restarts` at most"""

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Rank":
        """`read` gives the rank that torchrun set; without all of its variables there is one."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if any(name not in environment for name in names):
            return cls()
        restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
        return cls(*(int(environment[name]) for name in names), restarts=restarts)

    @property
    def is_main(self) -> bool:
        """Rank 0 is the main one, which prints and writes the run's folder."""
        return self.global_rank == 0

    @property
    def num_machines(self) -> int:
        """The job's machines have as many processes each."""
        return self.world_size // self.local_world_size


def is_restart(run_dir: Path) -> bool:
    """The answer is whether torchrun repeats the command line after a failure, so that it resumes.

    A job that failed before it made `run_dir` starts over.
    """
    return Rank.read().restarts > 0 and (run_dir / CONFIG_FILE).is_file()
