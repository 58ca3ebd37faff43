"""What a recipe saves: the tokens with which two recipes reach the same loss.

A recipe's losses are those of the ends of its runs, whose schedules have decayed, at several
lengths; between them the loss is linear in the logarithm of the tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95

Ends = Mapping[int, float]
"""validation loss at the end of a run, by its tokens"""


@dataclass(frozen=True)
class Crossing:
    """A crossing is where a recipe has a loss."""

    tokens: float
    is_inside: bool
    """between two lengths that were run, rather than extrapolated from the two nearest"""


def tokens_at(loss: float, ends: Ends) -> Crossing | None:
    """The function gives the tokens with which a recipe reaches a loss.

    Returns:
        None where fewer than two lengths were run, or more tokens do not help at that end.
    """
    points = sorted(ends.items())
    if len(points) < 2:
        return None
    pairs = list(zip(points, points[1:], strict=False))
    inside = [pair for pair in pairs if pair[0][1] >= loss >= pair[1][1]]
    (few, high), (many, low) = (inside or [pairs[0] if loss > points[0][1] else pairs[-1]])[0]
    if high <= low:
        return None
    share = (high - loss) / (high - low)
    return Crossing(few * (many / few) ** share, bool(inside))


@dataclass(frozen=True)
class Ratio:
    """A ratio is how many times one thing takes another, over several seeds."""

    mean: float
    """geometric"""
    low: float
    high: float
    """of the 95% interval, by Student's t on the logarithms"""
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        """The method takes the mean over seeds; one value has no interval."""
        logs = np.log(values)
        mean = float(logs.mean())
        half = float(half_interval(logs)) if len(logs) > 1 else math.inf
        high = math.exp(mean + half) if math.isfinite(half) else math.inf
        return cls(math.exp(mean), math.exp(mean - half), high, tuple(values))

    def p_above(self, bound: float) -> float | None:
        """The method gives the one-sided p of the ratio being at most `bound`; None of one
        value."""
        if len(self.values) < 2:
            return None
        logs = np.log(self.values)
        if np.ptp(logs) == 0:
            return 0.0 if logs[0] > math.log(bound) else 1.0
        return float(stats.ttest_1samp(logs, math.log(bound), alternative="greater").pvalue)


def half_interval(values: Sequence[float]) -> float:
    """The number is half of the mean's 95% interval by Student's t; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values)


def with_interval(mean: float, half: float) -> str:
    """The text is a number of nats with its interval; NaN is a number that is not known."""
    if math.isnan(mean):
        return "not known"
    if math.isnan(half):
        return f"{mean:+.4f} (no interval)"
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


@dataclass(frozen=True)
class Trend:
    """A trend says how a ratio changes with the length of the runs."""

    per_doubling: Ratio
    """factor of the ratio for twice the tokens"""
    at: Ratio
    """the ratio at the length asked for, on the lines through each seed's points"""


def trend(ratios: Sequence[Mapping[int, float]], tokens: float) -> Trend | None:
    """The function fits a line to each seed's ratios, in logarithms, and takes it to `tokens`.

    Args:
        ratios: of each seed, by tokens.

    Returns:
        None with fewer than two lengths.
    """
    lines = [
        np.polyfit(np.log(list(own)), np.log(list(own.values())), 1)
        for own in ratios
        if len(own) > 1
    ]
    if not lines:
        return None
    return Trend(
        Ratio.of([2.0**slope for slope, _ in lines]),
        Ratio.of([math.exp(slope * math.log(tokens) + base) for slope, base in lines]),
    )
