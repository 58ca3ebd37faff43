"""A run is killed on some GPUs and resumed on others; its losses and gradient norms stay those of
the run left in peace."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import launch
from bench.launch import TOO_LONG
from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import append_record
from hamner.files import read_objects, read_records

STEPS, SAVE_EVERY, KILL_STEP = 20, 8, 12
"""of a run; before its KILL_STEP is taken, the last process is killed, the first checkpoint being
whole"""
LEARNING = ("--lr", "1e-4", "--warmup-steps", "1")
"""of a run: in the warm-up of an option nothing would be learned that a resume could lose"""
START_SECONDS = 150
"""longest that a start may take"""
RESULTS = "moves.jsonl"


@dataclass(frozen=True)
class Move:
    """A run begins on so many GPUs and ends on so many."""

    option: str
    before: int
    after: int

    @property
    def name(self) -> str:
        """The name says what moves from where to where."""
        return f"{self.option}, killed on {self.before} and resumed on {self.after}"


class Moves:
    """Runs of one option and one batch are compared with the one that stays on all GPUs.

    Args:
        output: folder of the results, and of the runs beside them.
        option: of `hamner.train`.
        gpus: all.
        flags: of `hamner.train` that say the batch of all GPUs, and more.
    """

    def __init__(self, output: Path, option: str, gpus: int, flags: Sequence[str]) -> None:
        self.output, self.option, self.gpus = output, option, gpus
        self.flags = [
            *(*flags, "--option", option, "--steps", str(STEPS), "--save-every", str(SAVE_EVERY)),
            *("--keep", "1", "--log-every", "1", "--eval-every", "0", "--sample-every", "0"),
            *("--parallel", "fsdp", *LEARNING),
        ]

    def missing(self) -> list[Move]:
        """The method gives the moves that are not in the results yet."""
        done = {Move(r["option"], r["before"], r["after"]) for r in read(self.output)}
        moves = (Move(self.option, self.gpus, 1), Move(self.option, 1, self.gpus))
        return [move for move in moves if move not in done]

    def measure(self, move: Move, end: float) -> str | None:
        """The method kills and resumes a run, and appends how far its losses and norms are from
        those of the undisturbed one.

        Returns:
            Why it failed, or None.
        """
        stayed, moved = self._folder("stayed"), self._folder(f"{move.before}-to-{move.after}")
        if len(records(stayed)) < STEPS:
            failure = self._start(["hamner.train"], stayed, self.gpus, end=end, is_new=True)
            if failure:
                return failure
            shutil.rmtree(stayed / "checkpoints")  # gigabytes, and of no use any more
        killed = ["bench.killed_train", str(KILL_STEP)]
        sentence = self._start(killed, moved, move.before, end=end, is_new=True)
        if sentence in (None, TOO_LONG) or not checkpoint.find(moved / "checkpoints"):
            return f"it was not killed: {sentence}"
        resume = ["hamner.train", "--resume"]
        failure = self._start(resume, moved, move.after, end=end)
        if failure:
            return failure
        resumed_from = step_gone_on_from(self._said(moved, is_new=False))
        if resumed_from is None:
            return f"{moved} did not go on from a checkpoint"
        one, other = records(stayed), records(moved)
        if one.keys() != other.keys():
            return f"{moved} has {len(other)} steps and {stayed} has {len(one)}"
        shutil.rmtree(moved / "checkpoints")
        losses = {s: abs(one[s]["loss"] - other[s]["loss"]) for s in one}
        norms = [other[s]["grad_norm"] / one[s]["grad_norm"] - 1 for s in one]
        result = {
            **asdict(move),
            "steps": STEPS,
            "resumed_from": resumed_from,
            "apart": max(losses.values()),
            "apart_after": max(losses[s] for s in losses if s > resumed_from),
            "norms_apart": max(map(abs, norms)),
            "sentence": sentence,
        }
        append_record(self.output / RESULTS, result)
        print(f"{move.name}: losses {result['apart']:.5f} apart", flush=True)
        return None

    def _folder(self, name: str) -> Path:
        return self.output / f"{self.option}-{name}"

    def _said(self, folder: Path, *, is_new: bool) -> Path:
        """What a run says is in a file beside its folder, for its resume in another."""
        return folder.with_name(f"{folder.name}{'' if is_new else '-resumed'}.txt")

    def _start(
        self, command: list[str], folder: Path, count: int, *, end: float, is_new: bool = False
    ) -> str | None:
        """A run is begun anew or goes on."""
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
            command = [*command, *self.flags]
        return launch.launch(
            [*command, "--run-dir", str(folder)],
            count,
            self._said(folder, is_new=is_new),
            limit=min(end, time.monotonic() + START_SECONDS),
        )


def records(folder: Path) -> dict[int, dict]:
    """The function gives the record of each step of a run, if it has begun."""
    return {r["step"]: r for r in read_records(folder / "metrics.jsonl")}


def step_gone_on_from(said: Path) -> int | None:
    """The function gives the step of the checkpoint that a resumed run says it has read; None where
    it started over, which would give the same losses."""
    found = re.search(r"^resuming .* from .*step_(\d+)$", said.read_text(), re.MULTILINE)
    return found and int(found[1])


def read(output: Path) -> list[dict]:
    """The function gives the results so far."""
    return list(read_objects(output / RESULTS))
