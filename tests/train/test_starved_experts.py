"""Expert load over a log interval, and the experts that get too little of it."""

import json
from dataclasses import replace

import pytest

from hamner.train.health import StarvationDetector
from tests.models import MOE

ONE_LAYER = replace(MOE, num_layers=1)
LOW, FAIR = [0.4, 0.3, 0.25, 0.05], [0.25] * 4
"""1/16 is a quarter of the fair share of four experts"""


def test_an_expert_is_reported_once_after_200_steps():
    detector = StarvationDetector(ONE_LAYER)
    reported = [detector.starved([LOW], 50) for _ in range(6)]
    assert reported == [[], [], [], [(0, 3, 0.05)], [], []]


@pytest.mark.parametrize("enough", [FAIR, [0.4, 0.3, 0.2375, 0.0625]])
def test_one_interval_with_enough_starts_the_count_anew(enough):
    detector = StarvationDetector(ONE_LAYER)
    for _ in range(3):
        assert detector.starved([LOW], 50) == []
    assert detector.starved([enough], 50) == []
    reported = [detector.starved([LOW], 50) for _ in range(4)]
    assert [len(found) for found in reported] == [0, 0, 0, 1]


def test_layers_and_experts_are_judged_apart():
    detector = StarvationDetector(MOE)
    first, second = [0.5, 0.5, 0.0, 0.0], [0.0, 0.3, 0.3, 0.4]
    found = detector.starved([first, second], 200)
    assert [starved[:2] for starved in found] == [(0, 2), (0, 3), (1, 0)]


def test_counts_and_what_was_reported_survive_a_resume():
    detector = StarvationDetector(MOE)
    detector.starved([[0.0, 0.3, 0.3, 0.4], FAIR], 200)
    detector.starved([FAIR, LOW], 150)
    resumed = StarvationDetector(MOE)
    resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    found = resumed.starved([[0.0, 0.3, 0.3, 0.4], LOW], 50)
    assert [starved[:2] for starved in found] == [(1, 3)]
    assert resumed.starved([[0.0, 0.3, 0.3, 0.4], LOW], 150) == []
