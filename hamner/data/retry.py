"""The module reads on after errors: a run of days must outlive the bad minutes of its sources."""

import logging
import random
import time
from collections.abc import Iterator

from hamner.data.documents import Extent, TextSource
from hamner.data.shuffle import State
from hamner.errors import UserError

logger = logging.getLogger(__name__)

#: In a row without a new document before a source is given up.
ATTEMPTS = 10
#: Before the second attempt; the delay is doubled each time, with jitter, up to the longest.
FIRST_DELAY_SECONDS = 1.0
MAX_DELAY_SECONDS = 60.0


class RetriedSource:
    """A source of text is read on, after an error, from behind its last document.

    A `UserError` says that the content is wrong and is raised at once: another attempt would find
    the same. Anything else may pass, and is tried again. A source that was given up and is asked
    again gets one attempt. Messages name it as the user wrote it.
    """

    def __init__(self, source: TextSource, name: str) -> None:
        self._source, self._name = source, name
        self._failures = 0
        self.identity = source.identity

    def extent(self, seed: int, epoch: int, state: State | None) -> Extent:
        return self._source.extent(seed, epoch, state)

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The iterator gives one epoch, each document with the state to go on after it.

        Raises:
            UserError: no document in `ATTEMPTS` attempts, or a row that is none.
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
                if self._failures >= ATTEMPTS:
                    failures, self._failures = self._failures, ATTEMPTS - 1
                    raise UserError(
                        f"--data {self._name}: given up after {failures} attempts in a row "
                        f"({reason}); check the network or disk that it comes from"
                    ) from error
                wait = delay(self._failures)
                failed = f"--data {self._name}: {reason}"
                logger.warning("%s; attempt %d in %.0f s", failed, self._failures + 1, wait)
                time.sleep(wait)


def delay(failures: int) -> float:
    """The function gives the seconds to wait after so many failures in a row."""
    longest = min(MAX_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2 ** (failures - 1))
    return longest * random.uniform(0.5, 1.0)


def one_line(error: BaseException) -> str:
    """The function gives the message of an error on one line, or its type when there is none."""
    return " ".join(str(error).split()) or type(error).__name__
