"""The module reads on after errors: a run of days must outlive the bad minutes of its sources."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from hamner.data.documents import Extent, Split, TextSource, TokenSource
from hamner.data.shuffle import State
from hamner.errors import UserError

logger = logging.getLogger(__name__)

Document = TypeVar("Document", str, np.ndarray)

#: In a row without a new document before a source is given up.
ATTEMPTS = 10
#: Before the second attempt; the delay is doubled each time, with jitter, up to the longest.
FIRST_DELAY_SECONDS = 1.0
MAX_DELAY_SECONDS = 60.0


class RetriedSource:
    """A source of text or tokens is read on, after an error, from behind its last document.

    A `UserError` says that the content is wrong and is raised at once: another attempt would find
    the same. Anything else may pass, and is tried again. A source that was given up and is asked
    again gets one attempt. Messages name it as the user wrote it.
    """

    def __init__(self, source: TextSource | TokenSource, name: str) -> None:
        self._source, self._name = source, name
        self._failures = 0
        self.identity = source.identity

    def extent(self, seed: int, epoch: int, state: State | None) -> Extent:
        return self._source.extent(seed, epoch, state)

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The iterator gives one epoch of text; see `_read_on`."""
        return self._read_on(lambda after: self._source.documents(seed, epoch, after), state)

    def tokens(
        self, split: Split, seed: int, epoch: int, state: State | None
    ) -> Iterator[tuple[np.ndarray, State]]:
        """The iterator gives one epoch of tokens; see `_read_on`."""
        return self._read_on(lambda after: self._source.tokens(split, seed, epoch, after), state)

    def _read_on(
        self, read: Callable[[State | None], Iterator[tuple[Document, State]]], state: State | None
    ) -> Iterator[tuple[Document, State]]:
        """The iterator gives one epoch, each document with the state to go on after it.

        Raises:
            UserError: no document in `ATTEMPTS` attempts, or a row that is none.
        """
        while True:
            try:
                for document, after in read(state):
                    state = after
                    self._failures = 0
                    yield document, state
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
