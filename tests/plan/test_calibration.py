"""The intervals of projections on ends of runs that nothing was chosen on."""

from pathlib import Path
from statistics import median

import numpy as np
import pytest

from hamner.plan.projection import _WIDTH
from tests.plan.loss_curves import (
    CALIBRATED,
    HELD_OUT,
    calibrated_width,
    ends,
    markdown_rows,
    outcomes,
)


@pytest.fixture(scope="module")
def held_out():
    return outcomes(*HELD_OUT)


@pytest.mark.parametrize("group", ["drawn", "all"])
def test_80_percent_intervals_cover_held_out_ends(held_out, group):
    found = ends(held_out[group])
    assert len(found) >= 40
    assert 0.75 <= np.mean([end.is_inside for end in found]) <= 0.9


@pytest.mark.parametrize("group", ["drawn", "all"])
def test_the_point_is_near_held_out_ends(held_out, group):
    assert median(abs(end.error) for end in ends(held_out[group])) <= 0.03


def test_few_real_ends_are_projected_and_those_lie_inside(held_out):
    """Runs of a million tokens are in no law yet; nine ends have no share of 75-90%."""
    found = held_out["this project's"]
    assert found.count("too early") > len(found) / 2
    assert all(end.is_inside for end in ends(found))


def test_a_law_is_refused_to_few_long_runs(held_out):
    assert len(ends(held_out["drawn"])) >= 0.95 * len(held_out["drawn"])


def test_the_table_is_what_the_logs_give(held_out):
    document = (Path(__file__).parents[2] / "profiles" / "plan.md").read_text()
    assert "\n".join(markdown_rows(held_out)) in document


def test_the_width_is_what_the_calibration_gives():
    assert pytest.approx(calibrated_width(), abs=0.02) == _WIDTH
    assert not set(CALIBRATED[0]) & set(HELD_OUT[0])
    assert not set(CALIBRATED[1]) & set(HELD_OUT[1])
