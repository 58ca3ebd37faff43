"""A process is stopped as by Ctrl-Z and goes on."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.kills import CONTEXT


def stop() -> None:
    """This process is stopped, at once and whatever the machine is busy with."""
    os.kill(os.getpid(), signal.SIGSTOP)


def run_with_a_stop(function: Callable[..., None], *args) -> int:
    """`function(*args)` runs in a process of its own, which goes on a second and a half after it
    has called `stop`; the result is its exit code."""
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    while process.is_alive() and not _is_stopped(process.pid):
        time.sleep(0.01)
    assert process.is_alive(), "it ended without a stop"
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    return process.exitcode


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
