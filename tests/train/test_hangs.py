"""Hangs: stacks on disk, and a call that may save."""

import subprocess
import sys
import threading
import time

from hamner.train.health import Watchdog

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


def test_stacks_are_dumped_even_while_a_library_holds_the_lock(tmp_path):
    """A call that never gives the interpreter's lock back: no Python thread can run."""
    script = (
        "import ctypes, sys, time\n"
        "from pathlib import Path\n"
        "from hamner.train.health import Watchdog\n"
        "with Watchdog(0.2 / 60, Path(sys.argv[1]), lambda _: None):\n"
        "    time.sleep(0.1)\n"
        "    ctypes.PyDLL(None).sleep(2)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "stacks.txt")], check=True)
    assert "<string>" in (tmp_path / "stacks.txt").read_text()
