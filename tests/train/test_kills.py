"""A run that is killed again and again is, in the end, the run that never was."""

import contextlib
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from hamner.checkpoint import format as checkpoint
from tests.corpus import write_predictable
from tests.kills import PHASES, count_lines, start
from tests.train.test_loop import metrics
from tests.train.test_main import SMALL

STEPS = 24
KILLS = 30
"""of training; the preparation of shards has its own"""
BY_CLOCK = "clock"
TIMEOUT = 60
TRAINING_PHASES = [phase for phase in PHASES if phase != "shards"]


class Run:
    """One run folder and its starts."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.output = folder, folder.with_suffix(".txt")
        self.args = [
            *(*SMALL, "--data", str(data), "--run-dir", str(folder), "--steps", str(STEPS)),
            *("--log-every", "1", "--eval-every", "5", "--save-every", "3"),
            *("--keep", "2", "--keep-every", "9", "--lr", "5e-3", "--warmup-steps", "5"),
        ]

    @property
    def next_args(self) -> list[str]:
        """Of the next start; a process killed before it made its folder starts over."""
        resume = (self.folder / "config.json").exists()
        return ["--resume", "--run-dir", str(self.folder)] if resume else self.args

    def start(self, **tracing):
        return start("hamner.train", self.next_args, self.output, **tracing)

    def finish(self) -> None:
        process = self.start()
        process.join(TIMEOUT)
        assert process.exitcode == 0, self.printed

    @property
    def printed(self) -> str:
        return self.output.read_text()

    @property
    def saved_steps(self) -> list[int]:
        return [saved.step for saved in checkpoint.find(self.folder / "checkpoints")]

    def announced_steps(self) -> list[int]:
        """Saves that the last start said were finished."""
        return [int(step) for step in re.findall(r"^saved \S*step_(\d+)$", self.printed, re.M)]

    def final_sums(self) -> dict:
        """SHA-256 of the last weights and moments."""
        last = checkpoint.find(self.folder / "checkpoints")[-1]
        assert last.step == STEPS
        files = json.loads((last.path / "manifest.json").read_text())["files"]
        return {name: files[name]["sha256"] for name in files if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_predictable(tmp_path_factory.mktemp("data") / "data.jsonl")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Run:
    """The run that nobody kills, with how many lines each phase has and how long it takes."""
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", data)
    started = time.monotonic()
    run.lines = count_lines("hamner.train", run.args, run.output)
    run.seconds = time.monotonic() - started
    assert all(run.lines[phase] for phase in TRAINING_PHASES), run.lines
    assert run.saved_steps[-1] == STEPS, run.printed
    assert [record["step"] for record in metrics(run.folder)] == list(range(1, STEPS + 1))
    return run


def assert_same_run(run: Run, undisturbed: Run) -> None:
    assert metrics(run.folder) == metrics(undisturbed.folder)
    assert run.final_sums() == undisturbed.final_sums()
    assert not list((run.folder / "checkpoints").glob(".saving_*"))


@pytest.mark.parametrize("part", range(2))
def test_killed_at_random_moments(part, undisturbed, data, tmp_path):
    """Half of the kills: each phase by line, the rest by the clock; the run goes on in between."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    chance = random.Random(seed)
    moments = [*TRAINING_PHASES, *[BY_CLOCK] * (KILLS // 2 - len(TRAINING_PHASES))]
    chance.shuffle(moments)
    runs = [Run(tmp_path / "run_0", data)]
    finished_saves: set[int] = set()
    while moments:
        run, moment = runs[-1], moments[-1]
        if moment == BY_CLOCK:
            process = run.start()
            process.join(chance.uniform(0, undisturbed.seconds))
            process.kill()
        else:
            # Among the lines of about half a run, so that most starts do not outlive the kill.
            lines = max(1, undisturbed.lines[moment] // 2)
            process = run.start(phase=moment, line=chance.randint(1, lines))
        process.join(TIMEOUT)
        if process.exitcode == 0:
            # It outlived its kill: the same moment, in a new run.
            assert_same_run(run, undisturbed)
            runs.append(Run(tmp_path / f"run_{len(runs)}", data))
            finished_saves = set()
            continue
        assert process.exitcode == -signal.SIGKILL, run.printed
        moments.pop()
        if "resuming" in run.printed and finished_saves:
            # It went on from the newest save that any start before had finished.
            assert f"from {run.folder}/checkpoints/step_" in run.printed
            resumed_from = int(re.search(r"^resuming .*step_(\d+)$", run.printed, re.M)[1])
            assert resumed_from >= max(finished_saves)
        finished_saves |= set(run.announced_steps())
        if finished_saves:
            assert run.saved_steps[-1] >= max(finished_saves)
        for saved in checkpoint.find(run.folder / "checkpoints"):
            saved.verify()
    runs[-1].finish()
    assert_same_run(runs[-1], undisturbed)


def test_killed_before_it_began_leaves_no_output_of_an_earlier_start(data, tmp_path):
    run = Run(tmp_path / "run", data)
    run.output.write_text("saved step_9")
    process = run.start()
    process.kill()
    process.join(TIMEOUT)
    assert "saved" not in run.printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_at_random_moments_loses_nothing(number, undisturbed, data, tmp_path):
    run = Run(tmp_path / "run", data)
    for _ in range(3):
        process = run.start()
        while not ((run.folder / "metrics.jsonl").exists() or process.exitcode is not None):
            time.sleep(0.005)
        time.sleep(random.uniform(0, undisturbed.seconds / 4))
        with contextlib.suppress(ProcessLookupError):  # it may have come to its end already
            os.kill(process.pid, number)
        process.join(TIMEOUT)
        if "stopping: saving first" in run.printed:
            assert process.exitcode == 130, run.printed
            assert run.saved_steps[-1] == metrics(run.folder)[-1]["step"]
        # Else it came before the loop, or as late as the end.
    run.finish()
    assert_same_run(run, undisturbed)


def test_shard_preparation_killed_at_random_moments(data, tmp_path):
    """Killed five times and repeated, it writes the bytes of one that was not."""
    flags = ["--data", str(data), "--vocab-size", "261", "--shard-tokens", "2000"]
    whole, killed, output = tmp_path / "whole", tmp_path / "killed", tmp_path / "output.txt"
    prepare = ["prepare", *flags, "--output"]
    lines = count_lines("hamner.data", [*prepare, str(whole)], output)["shards"]
    for _ in range(5):
        line = random.randint(1, lines // 5)
        process = start("hamner.data", [*prepare, str(killed)], output, phase="shards", line=line)
        process.join(TIMEOUT)
        assert process.exitcode == -signal.SIGKILL, output.read_text()
    process = start("hamner.data", [*prepare, str(killed)], output)
    process.join(TIMEOUT)
    assert process.exitcode == 0, output.read_text()
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
