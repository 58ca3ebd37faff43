"""Hangs: stacks on disk, and a call that may save."""

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

from hamner.train.health import Watchdog
from tests.kills import CONTEXT
from tests.stops import run_with_a_stop, stop

MINUTES = 0.2 / 60


def test_each_hang_dumps_the_stacks_and_calls_once(tmp_path):
    calls, called = [], threading.Event()

    def on_hang(is_waiting: bool) -> None:
        calls.append(is_waiting)
        called.set()

    with Watchdog(MINUTES, tmp_path / "stacks.txt", on_hang) as watchdog:
        a_function_that_hangs(called)
        time.sleep(0.3)
        assert calls == [False]
        # The next one, perhaps days later, is another hang.
        called.clear()
        watchdog.beat()
        assert called.wait(30)
    assert calls == [False, False]
    assert "a_function_that_hangs" in (tmp_path / "stacks.txt").read_text()


def a_function_that_hangs(until: threading.Event) -> None:
    assert until.wait(30)


def test_a_wait_with_the_state_whole_can_be_saved(tmp_path):
    """The training thread does not go on before the save is done."""
    order, called = [], threading.Event()

    def on_hang(is_waiting: bool) -> None:
        order.append(is_waiting)
        called.set()
        time.sleep(0.1)
        order.append("saved")

    with Watchdog(MINUTES, tmp_path / "stacks.txt", on_hang) as watchdog:
        with watchdog.waiting():
            assert called.wait(30)
        order.append("trains")
    assert order == [True, "saved", "trains"]


def test_a_run_that_steps_leaves_nothing(tmp_path):
    calls = []
    with Watchdog(2 / 60, tmp_path / "stacks.txt", calls.append) as watchdog:
        for _ in range(30):
            time.sleep(0.1)
            watchdog.beat()
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_zero_minutes_never_hang(tmp_path):
    with Watchdog(0, tmp_path / "stacks.txt", lambda _: 1 / 0) as watchdog, watchdog.waiting():
        assert "hamner-watchdog" not in {thread.name for thread in threading.enumerate()}
    assert list(tmp_path.iterdir()) == []


def run_here(function: Callable[..., None], *args) -> int:
    """`function(*args)` runs in a process of its own; the result is its exit code."""
    process = CONTEXT.Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def hold_the_lock(stacks: Path) -> None:
    with Watchdog(MINUTES, stacks, print):
        time.sleep(0.1)
        ctypes.PyDLL(None).sleep(2)


def test_stacks_are_dumped_even_while_a_library_holds_the_lock(tmp_path):
    """A call that never gives the interpreter's lock back: no Python thread can run."""
    assert run_here(hold_the_lock, tmp_path / "stacks.txt") == 0
    assert "in hold_the_lock" in (tmp_path / "stacks.txt").read_text()


def come_and_go(depth: int) -> list:
    return [depth, come_and_go(depth - 1)] if depth else []


def run_on(stacks: Path) -> None:
    def work() -> None:
        while not stopped.is_set():
            come_and_go(800)

    stopped = threading.Event()
    sys.setswitchinterval(1e-4)
    threads = [threading.Thread(target=work) for _ in range(4)]
    with Watchdog(0.01 / 60, stacks, lambda _: None):
        for thread in threads:
            thread.start()
        time.sleep(2)
        stopped.set()
        for thread in threads:
            thread.join()


def test_stacks_of_threads_that_run_on_do_not_crash(tmp_path):
    """Deep frames come and go while they are written down, again and again."""
    assert run_here(run_on, tmp_path / "stacks.txt") == 0
    assert "in come_and_go" in (tmp_path / "stacks.txt").read_text()


def go_on_after_a_stop(stacks: Path, hung: Event) -> None:
    with Watchdog(1 / 60, stacks, lambda _: hung.set()):
        time.sleep(0.25)
        stop()
        time.sleep(0.25)


def test_time_in_which_the_process_is_stopped_does_not_count(tmp_path):
    """Half a second without a beat, cut in two by a second and a half, is no hang of a second."""
    hung = CONTEXT.Event()
    assert run_with_a_stop(go_on_after_a_stop, tmp_path / "stacks.txt", hung) == 0
    assert not hung.is_set()


def test_stacks_that_cannot_be_written_keep_nothing_up(tmp_path):
    """A full pipe takes the place of a disk that hangs."""
    os.mkfifo(tmp_path / "stacks.txt")
    reader = os.open(tmp_path / "stacks.txt", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "stacks.txt", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    called = threading.Event()
    with Watchdog(MINUTES, tmp_path / "stacks.txt", lambda _: called.set()):
        assert called.wait(30)
        os.close(reader)
    os.close(writer)
