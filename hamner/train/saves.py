"""The module says when a run saves, and what its checkpoints hold."""

import errno
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from rich.filesize import decimal

import hamner
from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.writer import RETRY_SECONDS, BackgroundSaver, NoSaver
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.parallel.engines import DataParallel, FullySharded
from hamner.parallel.tensors import local
from hamner.train import health
from hamner.train.beside import reason_of
from hamner.train.log import TrainLog
from hamner.train.optimizer import join_masters

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
STATE_FORMAT = 2
"""of state.json"""


class Stateful(Protocol):
    """A part of a run whose state, as JSON, belongs into a checkpoint has these methods: after
    `load_state_dict` it goes on where `state_dict` was taken.

    The keys of all parts stand side by side in state.json, so no two parts share one.
    """

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


@dataclass
class Progress:
    """The progress says how far a run is."""

    step: int = 0
    tokens: int = 0
    """trained so far"""
    val_loss: float | None = None
    """of the last evaluation, nats per token"""
    val_step: int | None = None

    def state_dict(self) -> dict:
        return vars(self).copy()

    def load_state_dict(self, state: dict) -> None:
        for name in vars(self):
            setattr(self, name, state[name])


class Saves:
    """The saves of a run happen in the background while it trains.

    Args:
        log: of the run whose model and optimizer are saved; no checkpoint is ahead of its records.
        progress: of the run.
        parts: make up state.json.
        tokenizer: of the run.
    """

    def __init__(
        self, log: TrainLog, progress: Progress, parts: Sequence[Stateful], tokenizer: Tokenizer
    ) -> None:
        self.log, self.progress, self.parts = log, progress, parts
        self.saver = open_saver(log)
        self.facts = {
            "format": STATE_FORMAT,
            "stage": "pretrain" if log.config.sft is None else "sft",
            "model": log.config.to_json()["model"],
            "tokenizer": tokenizer.fingerprint,
            "optimizer": log.config.optimizer,
            "versions": {"hamner": hamner.__version__, "torch": torch.__version__},
        }
        """of state.json, for the next start to compare"""
        self.last: Checkpoint | None = None
        """the newest checkpoint that is known to be whole"""

    @property
    def is_healthy(self) -> bool:
        """A state is not saved while steps are bad: their cause may be in it."""
        return not self.log.health.bad_in_a_row

    def non_finite(self) -> list[str]:
        """The names are those of the state's tensors that are not finite, in any process; all must
        ask."""
        step = self.log.train_step
        state = {**step.optimizer.parameters, **step.optimizer.state_tensors()}
        found = health.not_finite({name: local(tensor) for name, tensor in state.items()})
        flags = step.processes.all_reduce_max([name in found for name in state])
        return [name for name, flag in zip(state, flags, strict=True) if flag]

    def is_state_lost(self) -> bool:
        """The state is not worth a checkpoint if the last steps, which are all read, were bad and
        it is not finite: that is said. All processes must ask."""
        self.log.flush()
        non_finite = [] if self.is_healthy else self.non_finite()
        if non_finite and not self.log.health.diverged:  # of which the diagnosis says it
            self.log.display.message(f"WARNING: the state{health.describe_lost(non_finite)}")
        return bool(non_finite)

    def lack_of_room(self) -> list[str]:
        """A line warns if the disk has no room for the checkpoints that will stand there at once,
        as it is now; it counts no more than they surely take."""
        config, step, folder = self.log.config, self.log.train_step, self.log.run.checkpoints
        tensors = {**step.model.state_dict(), **step.optimizer.state_tensors()}.values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        left = self.log.display.total_tokens - self.progress.tokens
        steps = max(1, math.ceil(left / config.tokens_per_step))
        number = 1 + (steps - 1) // config.save_every if config.save_every else 1
        if config.keep:  # the new one is whole before the oldest is removed
            number = min(number, max(1, config.keep + 1 - len(checkpoint.find(folder))))
        try:
            free = shutil.disk_usage(folder).free
        except OSError:
            return []
        if free >= number * size:
            return []
        return [
            f"WARNING: the disk of {folder} has {decimal(free)} free, and {number:,} checkpoints "
            f"of {decimal(size)} or more will be written there before one is removed: make room, "
            "or lower --keep"
        ]

    def save(self) -> None:
        """A checkpoint of the last finished step is begun."""
        # The numbers of the steps under way belong to the state.
        self.log.flush()
        state = {**self.facts, "rng": checkpoint.rng_state()}
        for part in self.parts:
            state |= part.state_dict()
        step = self.log.train_step
        self.saver.begin(
            self.progress.step,
            model=step.model.state_dict(),
            optimizer=step.optimizer.state_tensors(),
            state=state,
        )

    def save_when_due(self, is_due: bool) -> bool:
        """A save that is wanted from now on begins now, or once the one before is done or the disk
        takes it.

        Returns:
            Whether one has begun.
        """
        self._note(self.saver.collect())
        # What `save_best` has just begun is this step's checkpoint.
        self.saver.wanted |= is_due and self.saver.step != self.progress.step
        if not self.saver.may_begin(self.is_healthy):
            return False
        # The steps under way may be bad too.
        self.log.flush()
        if not self.is_healthy:
            return False
        self.save()
        return True

    def save_best(self) -> None:
        """This step, the best so far, is saved under its own number: `checkpoint.best` needs it."""
        self._note(self.saver.wait())
        # A bad step leaves the weights as they were, whose loss has just been measured.
        if self.is_healthy or not self.non_finite():
            self.save()

    def save_last(self) -> None:
        """The last finished step is on disk before the run ends, unless its state is lost.

        Raises:
            UserError: the disk does not take it.
        """
        self._note(self.saver.wait())
        if self.is_state_lost() or (self.last and self.last.step == self.progress.step):
            return
        self.save()
        error = self._note(self.saver.wait())
        if error:
            mend = "make room there" if error.errno in NO_ROOM else "mend that"
            raise UserError(
                f"--run-dir {self.log.run.path}: the last checkpoint could not be written "
                f"({reason_of(error)}); {mend} and go on with --resume"
            ) from error

    def save_in_hang(self) -> None:
        """The watchdog's thread saves what can be of a run that waits for data."""
        self._note(self.saver.wait())
        is_newer = self.last is None or self.last.step < self.progress.step
        if self.progress.step and is_newer and not self.is_state_lost():
            self.save()
            self._note(self.saver.wait())

    def _note(self, outcome: Checkpoint | OSError | None) -> OSError | None:
        """The display says how a save ended; the error is returned, if any."""
        if isinstance(outcome, OSError):
            self.log.display.message(
                f"WARNING: step {self.saver.step:,} could not be saved ({reason_of(outcome)}); "
                "earlier checkpoints are whole, training goes on and tries again in "
                f"{RETRY_SECONDS:.0f} s"
            )
            return outcome
        if outcome is not None:
            self.last = outcome
            self.log.display.message(f"saved {outcome.path}")
        return None


def open_saver(log: TrainLog) -> BackgroundSaver | NoSaver:
    """The function opens the writer of checkpoints for the state as the run's engine divides it.

    With DDP rank 0 has everything and saves as one process does, with FSDP2 every process writes
    its shards.
    """
    config, run, step = log.config, log.run, log.train_step
    settings = {
        "keep": config.keep,
        "keep_every": config.keep_every,
        "records": (run.metrics, run.samples),
        "run_files": (run.config, run.tokenizer),
        "join_masters": join_masters,
        "on_phase": step.on_phase,
    }
    if isinstance(step.engine, FullySharded):
        from hamner.checkpoint.sharded import ShardedSaver

        return ShardedSaver(run.checkpoints, step.processes, step.engine.mesh, **settings)
    if isinstance(step.engine, DataParallel) and not log.is_main:
        return NoSaver()
    return BackgroundSaver(run.checkpoints, **settings)
