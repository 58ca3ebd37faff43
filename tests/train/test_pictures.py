"""The pictures of a run are drawn beside it."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hamner.train import pictures
from hamner.train.beside import Beside
from hamner.train.log import AsyncCopy
from hamner.train.loop import TrainingLoop
from hamner.train.pictures import Pictures
from tests.train.test_loop import small_config


def draws(monkeypatch, program: str) -> None:
    """A program takes the place of the one that draws."""
    monkeypatch.setattr(pictures, "COMMAND", (sys.executable, "-S", "-c", program))


NOTE = """
import os, sys
from pathlib import Path
started = Path(sys.argv[1], "started")
with started.open("a") as file:
    print(os.nice(0), os.getsid(0) == os.getpid(), os.environ["OMP_NUM_THREADS"], file=file)
"""
WAITS = NOTE + "open(Path(sys.argv[1], 'go')).read()"
"""until something is written to a pipe"""


def started(folder: Path) -> list[str]:
    return (folder / "started").read_text().splitlines()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def drawn(tmp_path, said):
    made = Pictures(tmp_path, Beside(said.append))
    yield made
    made.close()


def test_one_process_draws_at_a_time(tmp_path, monkeypatch, drawn, said):
    """What is asked for while it does is left out; the last pictures are drawn in any case."""
    draws(monkeypatch, WAITS)
    os.mkfifo(tmp_path / "go")
    for _ in range(3):
        drawn.begin()
    first = drawn.process
    (tmp_path / "go").write_text("")  # opens once the process waits there
    assert first.wait(60) == 0
    assert len(started(tmp_path)) == 1
    draws(monkeypatch, NOTE)
    drawn.finish()
    assert len(started(tmp_path)) == 2
    assert (drawn.process, said) == (None, [])


def test_a_folder_whose_name_looks_like_a_flag_is_drawn(tmp_path, monkeypatch, said):
    monkeypatch.chdir(tmp_path)
    Path("-x").mkdir()
    draws(monkeypatch, "import os, sys; sys.exit(not os.path.isabs(sys.argv[1]))")
    Pictures(Path("-x"), Beside(said.append)).finish()
    assert said == []


def test_the_process_gives_way_and_hears_no_signal_of_the_terminal(tmp_path, monkeypatch, drawn):
    draws(monkeypatch, "import time; time.sleep(1)\n" + NOTE)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    drawn.begin()
    drawn.process.wait(60)
    assert started(tmp_path) == ["19 True 1"]


def test_a_failure_is_said_once_and_the_next_drawing_is_tried(tmp_path, monkeypatch, drawn, said):
    draws(monkeypatch, NOTE + "raise KeyError('loss')")
    for _ in range(3):
        drawn.begin()
        drawn.process.wait(60)
    drawn.finish()
    assert len(started(tmp_path)) == 4
    assert said == [
        "WARNING: drawing the plots failed: KeyError: 'loss'; training goes on",
    ]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "it ended with code -9"),
        ("raise SystemExit('error: no room')", "no room"),
        ("import time; time.sleep(600)", "not done within 0 s"),
    ],
)
def test_how_the_last_drawing_failed_is_said(program, reason, monkeypatch, drawn, said):
    draws(monkeypatch, program)
    if "sleep" in program:
        monkeypatch.setattr(pictures, "LAST_SECONDS", 0.0)
    drawn.finish()
    drawn.close()
    assert said == [f"WARNING: drawing the plots failed: {reason}; the run is whole"]
    assert drawn.process is None


def test_a_run_that_fails_leaves_no_process(drawn, monkeypatch):
    draws(monkeypatch, "import time; time.sleep(600)")
    drawn.begin()
    process = drawn.process
    drawn.close()
    assert process.poll() == -signal.SIGKILL


def test_no_process_is_needed(monkeypatch, drawn, said):
    monkeypatch.setattr(pictures, "COMMAND", ("/nowhere/python",))
    drawn.begin()
    drawn.finish()
    assert said == [
        "WARNING: drawing the plots failed: No such file or directory; training goes on"
    ]


def test_a_run_is_drawn_at_evaluations_and_saves(tmp_path, monkeypatch):
    """Its records are on disk by then, also where numbers come in late as on a GPU."""
    monkeypatch.setattr(AsyncCopy, "is_done", False)
    config = replace(small_config(tmp_path), steps=9, log_every=1, eval_every=4, save_every=3)
    begun = []

    def begin(self):
        records = (self.folder / "metrics.jsonl").read_text().splitlines()
        begun.append((made.progress.step, len(records)))

    monkeypatch.setattr(Pictures, "begin", begin)
    made = TrainingLoop(config)
    with made.run:
        made.run_to_end()
        made.close()
    assert begun == [(3, 3), (4, 4), (6, 6), (8, 8), (9, 9)]


def test_training_does_not_load_matplotlib(tmp_path, with_pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config = replace(small_config(tmp_path), steps=2, eval_every=0, save_every=0)
    made = TrainingLoop(config)
    with made.run:
        made.run_to_end()
        made.close()
    assert {path.name for path in made.run.plots.iterdir()} == {"loss.png", "throughput.png"}
