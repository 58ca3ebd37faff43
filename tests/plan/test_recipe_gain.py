"""What a recipe is worth: the line through measured and published ratios, and what follows."""

import math

import pytest

from hamner.config.recipe import RECIPES
from hamner.plan.__main__ import PlanConfig, analyse
from hamner.plan.loss import BESIROGLU, KNOWN_RUN
from hamner.plan.recipe_gain import (
    LAW_DEVIATION,
    LINE_DEVIATION,
    PUBLISHED,
    WIDTH,
    Gain,
    gain,
    loss_at,
    source,
    tokens_to_reach,
)
from hamner.plan.report import caveats, coherence_table, recipes_table, screen

LAW = BESIROGLU.through(*KNOWN_RUN)
SIZE = 320_914_432


def test_a_line_through_two_points():
    """Four times at 100M tokens and 1.5 at 10B: in the middle of the logarithms, sqrt(6)."""
    line = Gain(((1e8, 4.0, 0.1), (1e10, 1.5, 0.2)))
    assert line.log_ratio(1e8) == pytest.approx(math.log(4))
    assert line.log_ratio(1e9) == pytest.approx(math.log(6) / 2)
    # Points lie off the line as what is asked for may.
    few, many = (math.hypot(deviation, LINE_DEVIATION) for deviation in (0.1, 0.2))
    assert line.deviation(1e8) == pytest.approx(math.hypot(few, LINE_DEVIATION))
    assert line.deviation(1e9) == pytest.approx(math.hypot(few / 2, many / 2, LINE_DEVIATION))
    for tokens in (1e8, 7e8, 1e10):
        assert line.tokens(tokens * math.exp(line.log_ratio(tokens))) == pytest.approx(tokens)


def test_points_count_by_their_deviations():
    line = Gain(((1e8, 4.0, 0.1), (1e8, 2.0, 1e3), (1e10, 1.5, 0.2)))
    assert line.log_ratio(1e8) == pytest.approx(math.log(4), abs=1e-6)


def test_the_plan_is_its_own_measure():
    bounds = tokens_to_reach(3.5, "plan", SIZE, LAW)
    assert bounds.middle == LAW.tokens_to_reach(3.5, SIZE)
    assert loss_at(1e10, "plan", SIZE, LAW).middle == LAW.loss(SIZE, 1e10)
    half = loss_at(1e10, "plan", SIZE, LAW).high - LAW.loss(SIZE, 1e10)
    assert half == pytest.approx(WIDTH * LAW_DEVIATION)
    assert tokens_to_reach(2.0, "plan", SIZE, LAW) is None


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_needs_fewer_tokens_and_is_less_certain(recipe):
    plan, other = (tokens_to_reach(3.3, name, SIZE, LAW) for name in ("plan", recipe))
    assert other.middle < plan.middle
    assert other.high / other.low > plan.high / plan.low
    # A run of so many tokens ends there.
    assert loss_at(other.middle, recipe, SIZE, LAW).middle == pytest.approx(3.3)
    tokens, ratio, deviation = PUBLISHED[recipe]
    one, *_ = gain(recipe).points
    assert math.exp(Gain((one, PUBLISHED[recipe])).log_ratio(tokens)) == pytest.approx(ratio)
    # The trend of several short runs turns the line, by less than is uncertain there.
    assert gain(recipe).log_ratio(tokens) == pytest.approx(math.log(ratio), abs=deviation)
    assert gain(recipe).log_ratio(tokens) < gain(recipe).log_ratio(1e8)


def test_no_recipe_is_said_to_end_worse_than_guessing():
    for option, tokens in (("tiny", None), ("a", 1e5)):
        rows = recipes_table(analyse(PlanConfig(option=option, tokens=tokens))).split("\n")[2:]
        assert [row.split("|")[-2].strip() for row in rows] == ["too small for the law"] * 3


def test_the_plan_shows_every_recipe():
    analysis = analyse(PlanConfig(option="a"))
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in recipes_table(analysis).split("\n")
    ]
    assert [row[0] for row in rows[2:]] == list(RECIPES)
    speeds = {row[0]: float(row[1].replace(",", "")) for row in rows[2:]}
    assert speeds["plan"] == speeds["adamw"] > speeds["muon"]
    hours = {row[0]: float(row[2].split()[0]) for row in rows[2:]}
    assert hours["muon"] < hours["adamw"] < hours["plan"]
    assert all("-" in cell for row in rows[2:] for cell in row[2:])
    text = screen(analysis, every_option=False)
    assert source() in text
    assert recipes_table(analysis) in text
    assert source() not in screen(analyse(PlanConfig(option="all")), every_option=True)


def test_memory_and_speed_are_those_of_the_recipe_asked_for():
    plan, muon = (analyse(PlanConfig(option="a", recipe=name)) for name in ("plan", "muon"))
    assert muon.plan.config.optimizer == "muon"
    assert (plan.plan.config.model.qk_norm, muon.plan.config.model.qk_norm) == (False, True)
    assert muon.plan.prediction.peak_gib < plan.plan.prediction.peak_gib
    assert muon.plan.hours > plan.plan.hours
    assert coherence_table(muon) != coherence_table(plan)
    assert len(caveats(muon.plan)) == len(caveats(plan.plan))
