"""What a run shows on a terminal and elsewhere."""

import io
from dataclasses import replace
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from rich.console import Console

from hamner.config.options import OPTIONS
from hamner.hardware import GPUS
from hamner.train.display import Display, count, duration
from hamner.train.metrics import Mfu, Record

RECORD = Record(
    step=1000,
    tokens=24_576_000,
    loss=3.5,
    val_loss=3.6,
    val_step=1000,
    lr=2e-4,
    grad_norm=0.5,
    tokens_per_second=20_000.0,
    mfu=0.583,
    peak_vram_gib=16.0,
    seconds=1228.8,
    skipped_steps=2,
    sources={},
)


def shown(terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, highlight=False)
    display = Display("hamner a", 10_000_000_000, 22.0)
    display.connect(console)
    with display:
        display.message("resuming")
        display.show(RECORD)
    return output.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_everything_asked_for_is_shown(terminal):
    text = shown(terminal)
    for value in ("resuming", "1,000", "3.5000", "33.1", "3.6000", "2.00e-04", "20,000", "58.3%"):
        assert value in text
    for value in ("16.0/22.0 GiB", "24.58M/10.00B", "5 d 18 h"):
        assert value in text


def test_a_terminal_shows_what_is_under_way_below_the_panel():
    output = io.StringIO()
    display = Display("hamner a", 10_000_000_000, 22.0)
    display.connect(Console(file=output, force_terminal=True, width=120, highlight=False))
    with display:
        display.show(RECORD)
        with display.status.task("evaluating", 40, "rows") as task:
            task.advance(10)
            display.live.refresh()
            shown_by_then = output.getvalue()
    assert "10 of 40 rows (25%)" in shown_by_then
    assert "3.5000" in shown_by_then


def test_a_pipe_gets_a_line_of_what_is_under_way(monkeypatch):
    monkeypatch.setattr("hamner.progress.QUIET_SECONDS", 0.001)
    output, lines = io.StringIO(), SimpleQueue()
    display = Display("hamner a", 10_000_000_000, 22.0)
    log = Console(file=SimpleNamespace(write=lines.put, flush=lambda: None), width=120)
    display.connect(Console(file=output, width=120), log)
    with display, display.status.task("evaluating", 40, "rows") as task:
        task.advance(10)
        while "10 of 40 rows (25%)" not in lines.get(timeout=60):
            pass
    assert "evaluating: 10 of 40 rows (25%)" in output.getvalue()


def test_elsewhere_a_record_is_one_plain_line():
    (line,) = [line for line in shown(False).splitlines() if "loss" in line]
    assert "\x1b" not in line
    assert line.startswith("step 1,000 | loss 3.5000 | ppl 33.1 | val 3.6000 @ 1,000")
    assert line.endswith("skipped 2")


def test_a_sample_does_not_command_the_terminal():
    output = io.StringIO()
    display = Display("hamner a", 10)
    display.connect(Console(file=output, force_terminal=True, width=120, highlight=False))
    display.message("sample: a\x1b[2J\x0eb\x9b1mc é")
    assert output.getvalue() == "sample: a\ufffd[2J\ufffdb\ufffd1mc é\n"


def test_without_a_gpu_no_mfu_and_no_vram_are_shown():
    display = Display("x", 10, None)
    record = Record(**{**vars(RECORD), "mfu": None, "peak_vram_gib": None, "skipped_steps": 0})
    assert not {"MFU", "VRAM", "skipped"} & set(display.fields(record))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (200, "3 min 20 s"),
        (497_000, "5 d 18 h"),
        (10**9, "31 years 251 d"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_what_is_left_is_what_is_not_trained_yet():
    almost = replace(RECORD, tokens=9_999_000_000)
    assert Display("", 10_000_000_000, 22.0).fields(almost)["left"] == "50 s"


def test_count():
    assert [count(n) for n in (5, 24_576, 2.5e6, 1e10)] == ["5", "24.58K", "2.50M", "10.00B"]


def test_mfu_of_option_a_on_a_3090():
    """20,000 tokens/s are 58% of the card's dense bf16 peak."""
    mfu = Mfu(OPTIONS["a"].model, 1024, GPUS["rtx-3090"], "bf16")
    assert round(mfu(20_000), 3) == 0.583
    assert "2.076 GFLOP per token" in mfu.explain()
    assert "71.2 TFLOP/s" in mfu.explain()
    assert "35.6 TFLOP/s" in Mfu(OPTIONS["a"].model, 1024, GPUS["rtx-3090"], "fp32").explain()


def test_unknown_gpu_has_no_mfu():
    mfu = Mfu(OPTIONS["a"].model, 1024, None, "bf16")
    assert mfu(20_000) is None
    assert "peak is unknown" in mfu.explain()
