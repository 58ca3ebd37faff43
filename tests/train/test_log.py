"""The queue of numbers on their way to the host, and what the log makes of them."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hamner.checkpoint.run_folder import RunFolder
from hamner.data.batch import Batch
from hamner.model.int8 import Operand
from hamner.train.display import Display
from hamner.train.health import StepReading
from hamner.train.log import LogLine, TrainLog
from hamner.train.step import StepResult, TrainStep
from tests.models import MOE
from tests.train.test_loop import metrics, small_config
from tests.waiting import no_waiting

ROWS = torch.zeros(2, 3, dtype=torch.int64)
BATCH = Batch(ROWS, ROWS.clone(), ROWS.int())
LINE = LogLine(None, None, {})


@pytest.fixture(scope="module")
def step(tmp_path_factory, request) -> TrainStep:
    """A mixture of two layers and four experts, whose steps are scripted here."""
    config = small_config(tmp_path_factory.mktemp("log"))
    return TrainStep(replace(config, model=replace(MOE, num_layers=2, max_seq_len=64)))


@pytest.fixture
def log(step, tmp_path) -> TrainLog:
    run = RunFolder(tmp_path)
    made = TrainLog(run, step, Display("test", 100, None))
    made.start(0, 0)
    return made


def result(
    loss: float, norm: float = 1.0, load=(0.25,) * 4, entropy: float = 1.0, device="cpu"
) -> StepResult:
    router = torch.tensor([[*load, entropy]] * 2, device=device)
    numbers = (torch.tensor(number, device=device) for number in (loss, norm))
    return StepResult(*numbers, 6, router, None)


def record(log: TrainLog, *results: StepResult) -> None:
    first = log.last.step if log.last else 0
    for step, made in enumerate(results, first + 1):
        log.record(launched(step), made)


def launched(step: int) -> StepReading:
    return StepReading(step, tokens=6 * step, lr=1e-3, batch=BATCH)


def test_an_interval_is_the_mean_of_its_good_steps(log, tmp_path):
    record(
        log,
        result(3.5, load=(1.0, 0.0, 0.0, 0.0), entropy=0.5),
        result(math.nan, load=(math.nan,) * 4, entropy=math.nan),
        result(2.5, load=(0.0, 1.0, 0.0, 0.0)),
    )
    log.request_line(LINE)
    record(log, result(7.0, norm=0.5, load=(0.25, 0.25, 0.25, 0.125)))
    log.request_line(replace(LINE, val_loss=1.0, val_step=4))
    first, second = metrics(tmp_path)
    assert (first["step"], first["loss"], first["skipped_steps"]) == (3, 3.0, 1)
    assert first["router"] == {
        "load": [[0.5, 0.5, 0.0, 0.0]] * 2,
        "entropy": [0.75] * 2,
        "dropped": [0.0] * 2,
    }
    assert (second["loss"], second["grad_norm"], second["val_loss"]) == (7.0, 0.5, 1.0)
    assert second["router"]["dropped"] == [0.125] * 2
    kept = [path.name for path in (tmp_path / "bad_steps").iterdir()]
    assert kept == ["step_00000002.safetensors"]


def test_an_interval_without_a_good_step_has_no_loss(log, tmp_path):
    record(log, result(math.inf), result(1.0, norm=math.inf))
    log.request_line(LINE)
    (row,) = metrics(tmp_path)
    assert row["loss"] is None
    assert row["router"] is None if "router" in row else True
    assert log.health.bad_in_a_row == row["skipped_steps"] == 2


def test_a_resumed_log_finishes_the_interval(log, step, tmp_path):
    good = [result(3.1), result(2.2, load=(0.5, 0.5, 0.0, 0.0)), result(1.3)]
    record(log, *good[:2], result(math.nan))
    log.starvation.low_steps[1][2] = 150
    log.int8_guard.fallen[Operand(1, "down", "input")] = 3
    resumed = TrainLog(RunFolder(tmp_path), step, Display("", 100, None))
    state = json.loads(json.dumps(log.state_dict()))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.start(3, 18)
    record(log, good[2])
    resumed.record(launched(4), good[2])
    for each in (log, resumed):
        each.request_line(LINE)
    whole, half = metrics(tmp_path)
    assert whole == half


@pytest.mark.gpu
def test_a_step_is_recorded_without_waiting_for_the_gpu(log):
    record(log, result(3.0, device="cuda"))
    torch.cuda.synchronize()
    log.drain(max_pending=1)
    assert log.last.step == 1
    made = result(2.0, device="cuda")
    torch.cuda.synchronize()
    with no_waiting():
        torch.cuda._sleep(1_000_000_000)
        log.record(launched(2), made)
        assert log.last.step == 1
    log.drain()
    assert log.last.step == 2


@pytest.mark.gpu
def test_the_host_stays_a_step_ahead_at_most(log):
    for step in (1, 2, 3):
        made = result(3.0, device="cuda")
        torch.cuda._sleep(300_000_000)
        log.record(launched(step), made)
    assert log.last.step == 2
    assert len(log.queue) == 1
