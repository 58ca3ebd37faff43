"""A run of `hamner.train` is started again and again; the module says what it came to."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hamner.checkpoint import format as checkpoint
from hamner.errors import UserError
from hamner.files import read_records

RESULT_FILE = "result.json"


def make_output(output: Path, names: Sequence[str]) -> None:
    """The folder of some runs is made anew; what earlier ones of the same names left in it goes.

    Raises:
        UserError: it holds something else, which stays.
    """
    own = (RESULT_FILE, *names)
    try:
        if output.exists():
            for path in output.iterdir():
                if not path.name.startswith(own):
                    raise UserError(
                        f"--output {output} is not a folder of earlier results, it holds "
                        f"{path.name}: give a new folder"
                    )
            shutil.rmtree(output)
        output.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be made anew ({error.strerror}): give another folder"
        ) from error


class RestartedRun:
    """A run has a folder, and is started in it by a command.

    Args:
        output: folder of the run's folder, and of what its starts print.
        name: of the run.
        command: `python -m` what, and its arguments before those of `hamner.train`.
        flags: of `hamner.train` at the first start.
    """

    def __init__(
        self, output: Path, name: str, command: Sequence[str], flags: Sequence[str]
    ) -> None:
        self.folder, self.output = output / name, output / f"{name}.txt"
        self.command = [sys.executable, "-m", *command]
        self.flags = [*flags, "--run-dir", str(self.folder)]

    def start(self, *flags: str) -> subprocess.Popen:
        """The method starts the run, or goes on with it once it has a folder.

        Args:
            flags: of this start alone.
        """
        own = self.flags
        if (self.folder / "config.json").exists():
            own = ["--resume", "--run-dir", str(self.folder)]
        with self.output.open("ab") as file:
            return subprocess.Popen([*self.command, *own, *flags], stdout=file, stderr=file)

    @property
    def saved_step(self) -> int:
        """The property gives the step of the newest checkpoint; 0 without one."""
        found = checkpoint.find(self.folder / "checkpoints")
        return found[-1].step if found else 0

    def losses(self) -> dict[int, tuple]:
        """The method gives the loss, validation loss and gradient norm of each logged step."""
        records = list(read_records(self.folder / "metrics.jsonl"))
        assert len(records) == len({record["step"] for record in records}), "a step came twice"
        return {r["step"]: (r["loss"], r["val_loss"], r["grad_norm"]) for r in records}

    def sums(self) -> dict[str, str]:
        """The method gives the SHA-256 of weights and optimizer state in the last checkpoint."""
        last = checkpoint.find(self.folder / "checkpoints")[-1]
        last.verify()
        files = json.loads((last.path / checkpoint.MANIFEST_FILE).read_text())["files"]
        names = (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE)
        return {name: files[name]["sha256"] for name in names}


def is_same(one: RestartedRun, other: RestartedRun) -> bool:
    """The function says and prints whether two runs have the same losses, weights and moments, bit
    for bit."""
    losses, others = one.losses(), other.losses()
    same_losses, same_weights = losses == others, one.sums() == other.sums()
    final = max(losses)
    print(f"losses and gradient norms of {len(losses)} logged steps are the same: {same_losses}")
    if not same_losses:
        steps = sorted(losses.keys() | others.keys())
        first = next(step for step in steps if losses.get(step) != others.get(step))
        print(f"first difference, step {first:,}: {losses.get(first)}, {others.get(first)}")
    print(f"step {final:,}: loss, validation loss, gradient norm {losses[final]}")
    print(f"weights and optimizer state are the same bit for bit: {same_weights}")
    return same_losses and same_weights
