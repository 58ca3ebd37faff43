"""The intervals of projections on ends of runs that nothing was chosen on."""

from pathlib import Path
from statistics import median

import numpy as np
import pytest

from hamner.plan.projection import _WIDTH
from tests.plan.loss_curves import CALIBRATED, HELD_OUT, calibrated_width, ends, markdown_rows


@pytest.fixture(scope="module")
def held_out():
    return ends(*HELD_OUT)


@pytest.mark.parametrize("group", ["drawn", "this project's", "all"])
def test_80_percent_intervals_cover_held_out_ends(held_out, group):
    found = held_out[group]
    assert len(found) >= 40
    assert 0.75 <= np.mean([end.is_inside for end in found]) <= 0.9


def test_the_point_is_near_the_ends_of_runs_of_the_known_kind(held_out):
    """Small logs have more noise in their ends than that."""
    assert median(abs(end.error) for end in held_out["drawn"]) <= 0.03


def test_the_table_is_what_the_logs_give(held_out):
    document = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    assert "\n".join(markdown_rows(held_out)) in document


def test_the_width_is_what_the_calibration_gives():
    assert pytest.approx(calibrated_width(), abs=0.02) == _WIDTH
    assert not set(CALIBRATED[0]) & set(HELD_OUT[0])
    assert not set(CALIBRATED[1]) & set(HELD_OUT[1])
