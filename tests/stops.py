"""A process is stopped as by Ctrl-Z and goes on."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event

from tests.kills import CONTEXT


def run_with_a_stop(function: Callable[..., None], *args) -> int:
    """`function(begun, *args)` runs in a process of its own, which is stopped for a second and a
    half once it has set `begun`; the result is its exit code."""
    begun: Event = CONTEXT.Event()
    process = CONTEXT.Process(target=function, args=(begun, *args))
    process.start()
    assert begun.wait(30)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    return process.exitcode
