"""Expert load over a log interval, and the experts that get too little of it."""

import json
from dataclasses import replace

import pytest
import torch

from hamner.model.transformer import RouterStatistics
from hamner.train.router_monitor import (
    RouterMonitor,
    StarvationDetector,
    StarvedExpert,
    describe_routers,
)
from tests.models import MOE

ONE_LAYER = replace(MOE, num_layers=1)
ZERO = torch.zeros(())
GOOD, BAD = torch.tensor(True), torch.tensor(False)


def statistics(load: list[float], entropy: float) -> RouterStatistics:
    return RouterStatistics(ZERO, ZERO, torch.tensor([load]), torch.tensor([entropy]))


def add_step(monitor: RouterMonitor, load: list[float], entropy: float, is_good) -> None:
    monitor.begin_step()
    monitor.add(statistics(load, entropy), 1.0)
    monitor.end_step(is_good)


def read(monitor: RouterMonitor, steps: int) -> dict | None:
    return describe_routers(monitor.end_interval().wait(), steps)


def test_a_step_is_the_mean_of_its_micro_batches_by_their_tokens():
    monitor = RouterMonitor(ONE_LAYER, torch.device("cpu"))
    monitor.begin_step()
    monitor.add(statistics([1.0, 0.0, 0.0, 0.0], 0.0), 1.0)  # of a step that was dropped
    monitor.begin_step()
    monitor.add(statistics([0.5, 0.5, 0.0, 0.0], 0.5), 0.75)
    monitor.add(statistics([0.0, 0.0, 0.5, 0.5], 1.5), 0.25)
    assert monitor.step_load.tolist() == [[0.375, 0.375, 0.125, 0.125]]
    monitor.end_step(GOOD)
    assert read(monitor, 1) == {
        "load": [[0.375, 0.375, 0.125, 0.125]],
        "entropy": [0.75],
        "dropped": [0.0],
    }


def test_an_interval_is_the_mean_of_its_good_steps():
    monitor = RouterMonitor(ONE_LAYER, torch.device("cpu"))
    add_step(monitor, [1.0, 0.0, 0.0, 0.0], 0.5, GOOD)
    add_step(monitor, [float("nan")] * 4, float("nan"), BAD)
    add_step(monitor, [0.0, 1.0, 0.0, 0.0], 1.0, GOOD)
    assert read(monitor, 2)["load"] == [[0.5, 0.5, 0.0, 0.0]]
    add_step(monitor, [0.25, 0.25, 0.25, 0.25], 1.25, GOOD)
    assert read(monitor, 1)["entropy"] == [1.25]
    add_step(monitor, [float("nan")] * 4, float("nan"), BAD)
    assert read(monitor, 0) is None


def test_assignments_that_no_expert_got_are_dropped():
    monitor = RouterMonitor(ONE_LAYER, torch.device("cpu"))
    add_step(monitor, [0.25, 0.25, 0.25, 0.125], 1.0, GOOD)
    assert read(monitor, 1)["dropped"] == [0.125]


LOW, FAIR = [0.4, 0.3, 0.25, 0.05], [0.25] * 4
"""1/16 is a quarter of the fair share of four experts"""


def test_an_expert_is_told_once_after_200_steps():
    detector = StarvationDetector(ONE_LAYER)
    told = [detector.starved([LOW], 50) for _ in range(6)]
    assert told == [[], [], [], [StarvedExpert(0, 3, 0.05)], [], []]


@pytest.mark.parametrize("enough", [FAIR, [0.4, 0.3, 0.2375, 0.0625]])
def test_one_interval_with_enough_starts_the_count_anew(enough):
    detector = StarvationDetector(ONE_LAYER)
    for _ in range(3):
        assert detector.starved([LOW], 50) == []
    assert detector.starved([enough], 50) == []
    told = [detector.starved([LOW], 50) for _ in range(4)]
    assert [len(found) for found in told] == [0, 0, 0, 1]


def test_layers_and_experts_are_judged_apart():
    detector = StarvationDetector(MOE)
    first, second = [0.5, 0.5, 0.0, 0.0], [0.0, 0.3, 0.3, 0.4]
    found = detector.starved([first, second], 200)
    assert [starved[:2] for starved in found] == [(0, 2), (0, 3), (1, 0)]


def test_counts_and_what_was_told_survive_a_resume():
    detector = StarvationDetector(MOE)
    detector.starved([[0.0, 0.3, 0.3, 0.4], FAIR], 200)
    detector.starved([FAIR, LOW], 150)
    resumed = StarvationDetector(MOE)
    resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    found = resumed.starved([[0.0, 0.3, 0.3, 0.4], LOW], 50)
    assert [starved[:2] for starved in found] == [(1, 3)]
    assert resumed.starved([[0.0, 0.3, 0.3, 0.4], LOW], 150) == []
