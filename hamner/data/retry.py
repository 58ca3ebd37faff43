"""The module reads on after errors: a run of days must outlive the bad minutes of its sources."""

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hamner.data.documents import TextSource
from hamner.data.shuffle import State
from hamner.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """A `Retry` says when to try again, and when to give up.

    Attributes:
        attempts: in a row without a new document before the source is given up.
        first_delay_seconds: before the second attempt; doubled each time, with jitter.
        max_delay_seconds: the longest of the delays.
    """

    attempts: int = 10
    first_delay_seconds: float = 1.0
    max_delay_seconds: float = 60.0

    def delay(self, failures: int) -> float:
        """The function gives the seconds to wait after so many failures in a row."""
        longest = min(self.max_delay_seconds, self.first_delay_seconds * 2 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


class RetriedSource:
    """A source of text that is read on, after an error, from behind its last document.

    A `UserError` says that the content is wrong and is raised at once: another attempt would find
    the same. Anything else may pass, and is tried again.

    Args:
        source: to read.
        name: of the source in messages, as the user wrote it.
        retry: when to give up. A source that was given up and is asked again gets one attempt.
    """

    def __init__(self, source: TextSource, name: str, retry: Retry | None = None) -> None:
        self._source = source
        self._name = name
        self._retry = retry or Retry()
        self._failures = 0

    def identity(self) -> State:
        return self._source.identity()

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The iterator gives one epoch, each document with the state to go on after it.

        Raises:
            UserError: no document in `Retry.attempts` attempts, or a row that is none.
        """
        while True:
            try:
                for text, after in self._source.documents(seed, epoch, state):
                    state = after
                    self._failures = 0
                    yield text, state
                return
            except UserError:
                raise
            except Exception as error:
                self._failures += 1
                reason = f"{type(error).__name__}: {one_line(error)}"
                if self._failures >= self._retry.attempts:
                    failures, self._failures = self._failures, self._retry.attempts - 1
                    raise UserError(
                        f"--data {self._name}: given up after {failures} attempts in a row "
                        f"({reason}); check the network or disk that it comes from"
                    ) from error
                delay = self._retry.delay(self._failures)
                logger.warning(
                    "--data %s: %s; attempt %d in %.0f s",
                    self._name,
                    reason,
                    self._failures + 1,
                    delay,
                )
                time.sleep(delay)


def one_line(error: Exception) -> str:
    """The function gives the message of an error on one line, or its type when there is none."""
    return " ".join(str(error).split()) or type(error).__name__
