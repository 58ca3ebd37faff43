"""The first Ctrl-C, SIGTERM or SIGHUP asks a run to stop, the second ends the process at once."""

import contextlib
import os
import signal
import time

from hamner.cli import open_unwaiting

TOGETHER_SECONDS = 0.25
"""signals that come so soon after the first count as the same one: a supervisor may send it to a
process and then to its group"""


class Interrupt:
    """An interrupt is a context in which the first SIGINT, SIGTERM or SIGHUP only sets `requested`.

    A signal that is ignored stays so: `nohup` keeps a run alive when its terminal closes.

    The second is left to the operating system's default: it works even while a long operation
    keeps Python's own handlers waiting. A second SIGHUP counts for nothing.

    Args:
        is_single: false in one of several processes. There the launcher passes signals on, to each
            process, and ends those that take too long: nothing is said here, later signals count
            for nothing, and none comes before the message of an error that ends the loop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, *, is_single: bool) -> None:
        self.is_single = is_single
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self.previous = {
            number: signal.signal(number, self._request)
            for number in self.SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, error: type | None, *_) -> None:
        keeps_quiet = error is not None and not self.is_single
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_IGN if keeps_quiet else handler)

    def _request(self, *_) -> None:
        if self.requested:
            return
        self.requested = True
        if not self.is_single:
            return
        self._say()
        time.sleep(TOGETHER_SECONDS)
        for number in self.previous:
            # A shell whose terminal closes sends SIGHUP, and so does its end: nobody insists.
            is_hangup = number == signal.SIGHUP
            signal.signal(number, signal.SIG_IGN if is_hangup else signal.SIG_DFL)

    def _say(self) -> None:
        """People see that a signal was heard, unless their terminal is gone or stands still."""
        # Not print: the handler may run in the middle of another write.
        own = open_unwaiting(2)
        with contextlib.suppress(OSError):
            os.write(
                2 if own is None else own, b"\nstopping: saving first; once more leaves at once\n"
            )
        if own is not None:
            os.close(own)
