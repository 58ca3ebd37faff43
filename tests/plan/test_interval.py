"""An interval is the sum of its causes, each done by hand, and moves with clock and power."""

import math
from dataclasses import replace

import pytest

from hamner.errors import UserError
from hamner.hardware import GPUS
from hamner.plan.efficiency import EFFICIENCIES, efficiency
from hamner.plan.interval import find_gain, find_interval

RTX_3090 = GPUS["rtx-3090"]
REACHED = EFFICIENCIES["RTX 3090"]
MILLISECONDS = {"matmul": 60.0, "attention": 10.0, "norm": 20.0, "loss": 5.0, "gaps": 5.0}


def interval_of(**ranges):
    reached = replace(REACHED, ranges=ranges, why=dict.fromkeys(ranges, "a reason"))
    return find_interval(MILLISECONDS, 1000, reached)


@pytest.mark.parametrize(
    ("cause", "share"),
    [
        ("clock", 0.70),
        ("matmul", 0.60),
        ("attention", 0.10),
        ("bandwidth", 0.25),
        ("model", 1.0),
        ("stand-in", 1.0),
    ],
)
def test_a_cause_moves_the_work_that_it_is_about(cause, share):
    interval = interval_of(**{cause: (0.8, 1.25)})
    assert interval.best == pytest.approx(10_000)
    assert interval.low == pytest.approx(10_000 / (1 + share * 0.25))
    assert interval.high == pytest.approx(10_000 / (1 - share * 0.2))
    (found,) = interval.causes
    assert found.slowest == pytest.approx(interval.low / interval.best - 1)
    assert str(found) == f"{cause} {found.slowest:+.0%} to {found.fastest:+.0%} (a reason)"


def test_causes_add_up_as_squares_and_the_largest_is_named_first():
    interval = interval_of(model=(0.95, 1.05), clock=(0.8, 1.1), attention=(0.8, 1.25))
    assert [cause.name for cause in interval.causes] == ["clock", "model", "attention"]
    slowest = [math.log(1 + cause.slowest) ** 2 for cause in interval.causes]
    assert math.log(interval.best / interval.low) == pytest.approx(math.sqrt(sum(slowest)))


def test_reasons_that_are_another_cards_say_so():
    whose = dict(efficiency(GPUS["rtx-4090"]).why)
    assert whose.pop("stand-in").startswith("the RTX 3090's shares of peak: ")
    assert whose == {name: f"as of the RTX 3090: {why}" for name, why in REACHED.why.items()}


def test_nothing_unknown_is_no_interval():
    interval = interval_of()
    assert interval.low == interval.best == interval.high
    assert interval.hours(36e6) == pytest.approx((1, 1))


def test_a_measured_speed_lies_below_inside_or_above():
    interval = interval_of(model=(0.9, 1.1))
    positions = [interval.position(speed) for speed in (8_999, 9_001, 10_999, 11_001)]
    assert positions == ["below", "inside", "inside", "above"]


def test_a_known_clock_scales_arithmetic_and_is_no_cause_any_more():
    slow = REACHED.at_clock(RTX_3090, 1695 / 2)
    assert slow.flops == {kind: share / 2 for kind, share in REACHED.flops.items()}
    assert slow.bandwidth == REACHED.bandwidth
    assert slow.ranges["clock"] == (0.98, 1.02)
    # Of a card whose own clock under load is known, that one counts.
    own = replace(REACHED, clock_mhz=1500.0).at_clock(RTX_3090, 1500)
    assert own.flops == REACHED.flops


def test_a_power_limit_scales_the_clock_by_the_cube_root():
    limited = REACHED.at_power(RTX_3090, 350 / 8)
    assert limited.flops["matmul"] == pytest.approx(REACHED.flops["matmul"] / 2)
    # At worst the speed goes with the power.
    low, high = REACHED.ranges["clock"]
    assert limited.ranges["clock"] == pytest.approx((1 / 4, high))
    assert REACHED.at_power(RTX_3090, 400).ranges["clock"] == (low, high)
    assert REACHED.at_power(RTX_3090, 350).flops == pytest.approx(REACHED.flops)


def test_a_card_without_known_clock_or_power():
    unknown = replace(RTX_3090, name="X", clock_mhz=None, power_w=None)
    with pytest.raises(UserError, match="--clock 1500: the clock of the X is not known"):
        REACHED.at_clock(unknown, 1500)
    with pytest.raises(UserError, match="--power-limit 280: the power limit of the X is not known"):
        REACHED.at_power(unknown, 280)


def test_a_gain_is_sure_of_what_both_steps_share():
    """Half of a step of 100 ms becomes 10 ms of another kind, and the rest stays."""
    before, after = {"matmul": 50.0, "norm": 50.0}, {"int8": 10.0, "norm": 50.0}

    def gain_of(**ranges):
        reached = replace(REACHED, ranges=ranges, why=dict.fromkeys(ranges, "a reason"))
        return find_gain(before, after, reached)

    shared = gain_of(model=(0.8, 1.25))
    assert shared.low == shared.best == shared.high == pytest.approx(100 / 60)
    own = gain_of(int8=(0.5, 2.0))
    assert (own.low, own.high) == (pytest.approx(100 / 70), pytest.approx(100 / 55))
    # Slower matmuls leave more to gain, slower memory less.
    clock, memory = gain_of(clock=(0.5, 1.0)), gain_of(bandwidth=(0.5, 1.0))
    assert (clock.low, clock.high) == (clock.best, pytest.approx(150 / 70))
    assert (memory.low, memory.high) == (pytest.approx(150 / 110), memory.best)
    both = gain_of(int8=(0.5, 1.0), bandwidth=(0.5, 1.0))
    changes = [math.log(own.best / x.low) for x in (own, memory)]
    assert math.log(both.best / both.low) == pytest.approx(math.hypot(*changes))
