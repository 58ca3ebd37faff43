"""Notices a run that hangs: dumps the stacks of all threads and saves what it can.

Two clocks run. faulthandler's own, in C, dumps the stacks even while a stuck library holds Python's
lock. A Python thread sets that clock back as long as steps end, and once they do not, tells the
user and saves, provided that the training thread is somewhere where nothing is half done.
"""

import contextlib
import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class Watchdog:
    """Context that expects `beat` at least every `minutes`.

    Args:
        minutes: without a beat that count as a hang; 0 never does.
        stacks: file for the stacks; it stays only if something was written.
        on_hang: called in a thread of its own, once a hang, with whether the training thread is
            inside `waiting` (and is kept there until the call returns).
    """

    def __init__(self, minutes: float, stacks: Path, on_hang: Callable[[bool], None]) -> None:
        self.seconds, self.stacks, self.on_hang = 60 * minutes, stacks, on_hang
        self.last_beat = time.monotonic()
        self._at_work = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hamner-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._at_work.acquire()
        if self.seconds:
            self._file = self.stacks.open("a", encoding="utf-8")
            self.beat()
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.seconds:
            self._stop.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if self.stacks.exists() and not self.stacks.stat().st_size:
                self.stacks.unlink()
        self._at_work.release()

    def beat(self) -> None:
        """A step has ended."""
        self.last_beat = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the training thread waits for something with its state whole, as between steps."""
        self._at_work.release()
        try:
            yield
        finally:
            self._at_work.acquire()

    def _watch(self) -> None:
        """Body of the thread."""
        armed_for = told_of = None
        # The stacks come first: the call may let the training thread go on.
        patience = self.seconds + min(1.0, self.seconds / 4)
        while True:
            beat = self.last_beat
            if beat != armed_for:
                left = max(1e-3, beat + self.seconds - time.monotonic())
                faulthandler.dump_traceback_later(left, repeat=True, file=self._file)
                armed_for = beat
            elif time.monotonic() > beat + patience and beat != told_of:
                told_of = beat
                self._tell()
            if self._stop.wait(self.seconds / 20):
                return

    def _tell(self) -> None:
        is_waiting = self._at_work.acquire(blocking=False)
        try:
            self.on_hang(is_waiting)
        finally:
            if is_waiting:
                self._at_work.release()
