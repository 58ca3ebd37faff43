"""When a run saves, and what its checkpoints hold."""

from collections.abc import Callable, Mapping
from typing import Protocol

from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.run_folder import RecordLog, RunFolder
from hamner.checkpoint.writer import RETRY_SECONDS, BackgroundSaver, NoSaver
from hamner.errors import UserError
from hamner.train.display import Display
from hamner.train.step import TrainStep


class Stateful(Protocol):
    """A part of a run whose state belongs into a checkpoint.

    The keys of all parts stand side by side in state.json, so no two parts share one.
    """

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class Saves:
    """The saves of a run, in the background while it trains.

    Args:
        run: the run's folder.
        step: whose model and optimizer are saved.
        saver: writes the checkpoints.
        parts: the rest of state.json, by name.
        facts: of the run, which also stand in state.json.
        records: files of records that a checkpoint must not be ahead of.
        drain: waits for the numbers of the steps under way, which belong to the state.
        display: for people.
    """

    def __init__(
        self,
        run: RunFolder,
        step: TrainStep,
        saver: BackgroundSaver | NoSaver,
        *,
        parts: Mapping[str, Stateful],
        facts: dict,
        records: tuple[RecordLog, ...],
        drain: Callable[[], None],
        display: Display,
    ) -> None:
        self.run, self.step, self.saver = run, step, saver
        self.parts, self.facts, self.records = parts, facts, records
        self.drain, self.display = drain, display
        self.last: Checkpoint | None = None
        """the newest checkpoint that is known to be whole"""
        self.is_state_lost = False
        """whether the state is not finite, so that it is not worth a checkpoint"""

    def save(self, step: int) -> None:
        """A checkpoint of `step`, the last finished one, is begun."""
        self.drain()
        for log in self.records:
            log.flush()
        state = dict(self.facts)
        for part in self.parts.values():
            state |= part.state_dict()
        self.saver.begin(
            step,
            model=self.step.model.state_dict(),
            optimizer=self.step.optimizer.state_tensors(),
            state=state,
        )

    def save_when_due(self, step: int, *, is_due: bool, is_healthy: bool) -> None:
        """A save is begun: now, or once the save before is done or the disk takes it.

        Args:
            step: the last finished one.
            is_due: whether one is wanted from now on.
            is_healthy: not while steps are bad: their cause may be in the state.
        """
        self._note(self.saver.collect())
        self.saver.wanted |= is_due
        if self.saver.may_begin(is_healthy):
            self.save(step)

    def save_best(self, step: int, *, is_healthy: bool) -> None:
        """This step, the best so far, is saved under its own number: `checkpoint.best` needs it."""
        self._note(self.saver.wait())
        if is_healthy:
            self.save(step)

    def save_last(self, step: int) -> None:
        """The last finished step is on disk before the run ends, unless its state is lost.

        Raises:
            UserError: the disk does not take it.
        """
        self._note(self.saver.wait())
        if self.is_state_lost or (self.last is not None and self.last.step == step):
            return
        self.save(step)
        error = self._note(self.saver.wait())
        if error:
            raise UserError(
                f"--run-dir {self.run.path}: the last checkpoint could not be written "
                f"({error.strerror}); make room there and go on with --resume"
            ) from error

    def save_in_hang(self, step: int) -> None:
        """What can be saved of a run that waits for data is, by the watchdog's thread."""
        self._note(self.saver.wait())
        if step and (self.last is None or self.last.step < step):
            self.save(step)
            self._note(self.saver.wait())

    def _note(self, outcome: Checkpoint | OSError | None) -> OSError | None:
        """How a save ended is said; returns the error, if any."""
        if isinstance(outcome, OSError):
            self.display.message(
                f"WARNING: step {self.saver.step:,} could not be saved ({outcome.strerror}); "
                "earlier checkpoints are whole, training goes on and tries again in "
                f"{RETRY_SECONDS:.0f} s"
            )
            return outcome
        if outcome is not None:
            self.last = outcome
            self.display.message(f"saved {outcome.path}")
        return None
