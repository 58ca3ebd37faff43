"""What a curve shows of a law before one is fitted."""

import numpy as np
import pytest

from hamner.plan.trend import slowing

TOKENS = np.linspace(1e8, 1e9, 100)


@pytest.mark.parametrize("exponent", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("floor", [0.0, 3.0])
def test_any_law_slows_down(exponent, floor):
    trend = slowing(TOKENS, floor + 2 * (TOKENS / 1e9) ** -exponent, 1e-3)
    assert trend.is_clear
    # The halves' middles are a factor of the root of ten apart.
    assert trend.before / trend.lately == pytest.approx(10 ** (exponent / 2), rel=0.06)


@pytest.mark.parametrize(("power", "lately"), [(1, 0.1), (2, 0.57)])
def test_a_fall_as_fast_or_faster_is_no_law(power, lately):
    doublings = np.log2(TOKENS / 1e8)
    trend = slowing(TOKENS, 5 - 0.1 * doublings**power, 1e-3)
    assert not trend.is_clear
    assert trend.lately == pytest.approx(lately, abs=0.1 * (power - 1) + 1e-6)


def test_noise_of_the_slopes_counts_neighbours_as_one():
    """The error is the spread of the difference over curves whose readings come in eights."""
    random, differences = np.random.default_rng(0), []
    tokens = np.geomspace(1e8, 1e9, 160)
    for _ in range(300):
        noise = np.repeat(random.normal(0, 0.05, 20), 8)
        trend = slowing(tokens, 4 + noise, 0.05)
        differences.append(trend.before - trend.lately)
    assert np.std(differences) == pytest.approx(trend.error, rel=0.15)


def test_a_half_of_two_points_says_nothing():
    tokens = np.array([1.0, 1.1, 5.0, 6.0, 7.0, 8.0])
    assert slowing(tokens, 8 - tokens, 0.1) is None
