"""The minutes before the first log line are shown: kernels compile, data arrives, steps go by."""

import contextlib
import math

from hamner.train.log import TrainLog


class FirstSteps(contextlib.AbstractContextManager):
    """In this context the steps are counted until a record of them is shown.

    Args:
        log: of the run.
        is_compiled: whether the first step compiles kernels.
    """

    def __init__(self, log: TrainLog, *, is_compiled: bool) -> None:
        self._log = log
        self._what = "first step" + (", which compiles its kernels" if is_compiled else "")
        self._shown = contextlib.ExitStack()
        self._task = None

    def __enter__(self) -> "FirstSteps":
        task = self._log.display.status.task(self._what)
        self._task = self._shown.enter_context(task)
        return self

    def __exit__(self, *_) -> None:
        self._shown.close()
        self._task = None

    def micro_batch_done(self, done: int, micro_batches: int) -> None:
        """So much of the step is done, which is shown of the first."""
        if self._task is not None and not self._task.unit and micro_batches > 1:
            self._task.note = f"{done:,} of {micro_batches:,} micro-batches"

    def step_done(self, step: int, tokens: int) -> None:
        """A step is done; after the first log line nothing is counted any more.

        Args:
            step: from 1.
            tokens: trained so far.
        """
        if self._task is None:
            return
        if not self._log.is_before_first_line:
            self.__exit__()
            return
        if self._task.total is None:
            config, left = self._log.config, self._log.display.total_tokens - tokens
            # The last step has a line too.
            to_come = math.ceil(left / config.tokens_per_step)
            if config.log_every:
                to_come = min(to_come, -step % config.log_every)
            self._task.what, self._task.unit = "steps to the first log line", "steps"
            self._task.note, self._task.total = "", 1 + to_come
        self._task.advance()
