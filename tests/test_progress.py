"""Who waits sees what is being done and how far it is, on a terminal and elsewhere."""

import io
import sys
from queue import Empty, SimpleQueue

import pytest
from rich.console import Console

from hamner import progress
from hamner.progress import SILENT, ShownStatus, Task, waiting

SECONDS = 60
"""longest wait for a thread that speaks every millisecond"""


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Lines come every millisecond, and the clock stands still but for the test."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.001)
    return now


@pytest.mark.parametrize(
    ("total", "unit", "done", "text"),
    [
        (4_000, "rows", 1_000, "1,000 of 4,000 rows (25%), 20 s"),
        (4_000, "rows", 5_000, "5,000 of 4,000 rows (100%), 20 s"),
        (0, "rows", 0, "0 of 0 rows (0%), 20 s"),
        (None, "rows", 1_000, "1,000 rows, 50 rows/s, 20 s"),
        (3e9, "bytes", 1.5e9, "1.5 GB of 3.0 GB (50%), 20 s"),
        (None, "bytes", 3e9, "3.0 GB, 150.0 MB/s, 20 s"),
        (None, "", 0, "20 s"),
    ],
)
def test_how_far_is_of_the_total_or_the_rate(clock, total, unit, done, text):
    task = Task("reading", total, unit)
    task.advance(done)
    clock[0] = 20.0
    assert task.how_far() == text
    task.note = "last year's"
    assert task.how_far().endswith("last year's, 20 s")


def test_a_pipe_gets_lines_of_the_innermost_task():
    lines = SimpleQueue()
    status = ShownStatus(Console(file=io.StringIO()), lines.put)
    with status.task("reading [a]"):
        assert lines.get(timeout=SECONDS) == "reading [a]: 0 s"
        with status.task("checking", 8, "tensors") as task:
            task.advance(2)
            while lines.get(timeout=SECONDS) != "checking: 2 of 8 tensors (25%), 0 s":
                pass
        while lines.get(timeout=SECONDS) != "reading [a]: 0 s":
            pass
    while not lines.empty():
        lines.get()
    assert not status.line.under_way


def test_a_terminal_has_one_line_of_the_innermost_task():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100, legacy_windows=False)
    status = ShownStatus(console, lambda line: 1 / 0)
    with status.task("reading [a]"), status.task("checking [b]", 8, "tensors") as task:
        task.advance(2)
        status.line.refresh()
        last = output.getvalue().splitlines()[-1]
    assert "checking [b]" in last
    assert "2 of 8 tensors (25%)" in last
    assert "reading" not in last


def test_the_standard_output_has_none_of_it(capsys):
    out = err = ""
    with waiting("reading [a]") as status, status.task("checking [b]"):
        print("data")
        while "checking [b]: 0 s\n" not in err:
            captured = capsys.readouterr()
            out, err = out + captured.out, err + captured.err
    assert out == "data\n"


def test_what_is_over_soon_leaves_nothing_behind(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 3600)
    with waiting("reading [a]") as status, status.task("checking"):
        pass
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_thread_too():
    lines = SimpleQueue()
    status = ShownStatus(Console(file=io.StringIO()), lines.put)
    with pytest.raises(ZeroDivisionError), status.task("reading"):
        lines.get(timeout=SECONDS)
        raise ZeroDivisionError
    while not lines.empty():
        lines.get()
    with pytest.raises(Empty):
        lines.get(timeout=0.05)


@pytest.mark.parametrize("surroundings", ["another process", "no standard error"])
def test_where_nobody_listens_nothing_is_said(monkeypatch, capsys, surroundings):
    if surroundings == "another process":
        monkeypatch.setenv("RANK", "1")
    else:
        monkeypatch.setattr(sys, "stderr", None)
    with waiting("reading") as status, status.task("checking", 2, "rows") as task:
        task.advance()
    assert capsys.readouterr() == ("", "")


def test_a_silent_status_counts_for_nobody():
    with SILENT.task("reading", 2, "rows") as task:
        task.advance()
    assert task.done == 1
