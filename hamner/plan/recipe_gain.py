"""What a recipe is worth is a ratio: tokens that `plan` needs by those that it needs, for one loss.

The ratio's logarithm is linear in that of the tokens, fitted to what this project's own runs came
to (recipe_ratios.json, which `python -m bench.recipes fit` writes from committed results) and, at
the length of a whole run, to what is published: nothing here was ever run that far. The loss that
`plan` reaches is that of a scaling law; both are uncertain, and so are the intervals.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hamner.config.recipe import Recipe
from hamner.files import read_json
from hamner.plan.loss import LossLaw

RATIOS = Path(__file__).with_name("recipe_ratios.json")
PUBLISHED: dict[Recipe, tuple[float, float, float]] = {
    "adamw": (10e9, 1.24, 0.15),
    "muon": (10e9, 1.50, 0.25),
}
"""tokens, ratio and the standard deviation of its logarithm: a retuned AdamW 1.1 to 1.4 times
(inferred from StepLaw's runs and arXiv:2507.07101), and Muon 1.18 to 1.25 times a tuned AdamW at
12B to 48B tokens and 300M parameters (the Marin project's sweep)"""
LAW_DEVIATION = 0.15
"""nats by which a scaling law through one run of another size, corpus and schedule is taken to be
off"""
LINE_DEVIATION = 0.15
"""of the ratio's logarithm from the line: what is between short runs and published ones need not be
one"""
WIDTH = 1.2816
"""half an 80% interval in standard deviations"""


@dataclass(frozen=True)
class Bounds:
    """A value has an 80% interval."""

    middle: float
    low: float
    high: float

    def times(self, factor: float) -> "Bounds":
        return Bounds(self.middle * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Gain:
    """A gain is the line of a recipe's ratio.

    Args:
        points: tokens of the recipe, ratio, standard deviation of its logarithm; none for `plan`.
    """

    points: Sequence[tuple[float, float, float]]

    @functools.cached_property
    def _line(self) -> tuple[np.ndarray, np.ndarray]:
        """The line has an intercept and a slope in ln(tokens), and their covariance."""
        tokens, ratios, deviations = np.array(self.points).T
        # Or many short runs, which share their data, would say more than there is to know of long
        # ones.
        deviations = np.hypot(deviations, LINE_DEVIATION)
        design = np.stack([np.ones_like(tokens), np.log(tokens)], axis=1) / deviations[:, None]
        covariance = np.linalg.inv(design.T @ design)
        return covariance @ design.T @ (np.log(ratios) / deviations), covariance

    def log_ratio(self, tokens: float) -> float:
        """The method gives ln(ratio) where the recipe has trained on `tokens`."""
        if not self.points:
            return 0.0
        return float(self._line[0] @ (1.0, math.log(tokens)))

    def deviation(self, tokens: float) -> float:
        """The method gives the standard deviation of `log_ratio`."""
        if not self.points:
            return 0.0
        at = np.array([1.0, math.log(tokens)])
        return math.sqrt(at @ self._line[1] @ at + LINE_DEVIATION**2)

    def tokens(self, of_plan: float) -> float:
        """The recipe needs so many tokens for the loss that `plan` has after `of_plan`."""
        if not self.points:
            return of_plan
        intercept, slope = self._line[0]
        return math.exp((math.log(of_plan) - intercept) / (1 + slope))


def gain(recipe: Recipe) -> Gain:
    """The function gives a recipe's line through its measured ratios and the published one."""
    if recipe not in PUBLISHED:
        return Gain(())
    measured = read_json(RATIOS)["ratios"][recipe]
    return Gain((*(tuple(point) for point in measured), PUBLISHED[recipe]))


def source() -> str:
    """The text names the runs that the ratios were measured on."""
    return read_json(RATIOS)["source"]


def tokens_to_reach(loss: float, recipe: Recipe, parameters: float, law: LossLaw) -> Bounds | None:
    """A run with this recipe ends at `loss` if it has so many tokens.

    Args:
        law: of `plan`.

    Returns:
        None where the model is too small for it.
    """
    by_plan = law.tokens_to_reach(loss, parameters)
    if by_plan is None:
        return None
    line = gain(recipe)
    tokens = line.tokens(by_plan)
    # Of the logarithm of the tokens; nats become that by the law's slope.
    deviation = math.hypot(LAW_DEVIATION / _slope(law, by_plan), line.deviation(tokens))
    factor = math.exp(WIDTH * deviation)
    return Bounds(tokens, tokens / factor, tokens * factor)


def loss_at(tokens: float, recipe: Recipe, parameters: float, law: LossLaw) -> Bounds:
    """A run of `tokens` with this recipe ends at this loss; `law` is that of `plan`."""
    line = gain(recipe)
    by_plan = tokens * math.exp(line.log_ratio(tokens))
    loss = law.loss(parameters, by_plan)
    deviation = math.hypot(LAW_DEVIATION, _slope(law, by_plan) * line.deviation(tokens))
    return Bounds(loss, loss - WIDTH * deviation, loss + WIDTH * deviation)


def _slope(law: LossLaw, tokens: float) -> float:
    """The law falls by so many nats an e-fold of tokens."""
    return law.beta * law.data_term(tokens)
