"""An interval says between which speeds a projected run should lie, and why it is that wide."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hamner.plan.efficiency import Efficiency

_ARITHMETIC = {"matmul", "int8", "attention"}
_AFFECTED = {
    "clock": _ARITHMETIC,
    # Rates of int8 are multiples of those of bf16.
    "matmul": {"matmul", "int8"},
    "int8": {"int8"},
    "attention": {"attention"},
}
"""cause: the categories of work that it makes faster or slower"""
_NEITHER = {"gaps", "communication"}
"""categories that are neither arithmetic nor traffic of memory"""


@dataclass(frozen=True)
class Cause:
    """A cause is one reason why a speed is not known better."""

    name: str
    slowest: float
    """change of tokens/s if it were at its low end and all else as projected, such as -0.1"""
    fastest: float
    why: str

    def __str__(self) -> str:
        return f"{self.name} {self.slowest:+.0%} to {self.fastest:+.0%} ({self.why})"


@dataclass(frozen=True)
class Interval:
    """About nine of ten runs should lie in it."""

    low: float
    """tokens/s, as the next two"""
    best: float
    high: float
    causes: tuple[Cause, ...]
    """the one that matters most first"""

    def hours(self, tokens: float) -> tuple[float, float]:
        """A run of so many tokens takes this long at best, and at worst."""
        return tokens / self.high / 3600, tokens / self.low / 3600

    def position(self, tokens_per_second: float) -> str:
        """The word says where a measured speed lies: inside, below or above."""
        if tokens_per_second < self.low:
            return "below"
        return "above" if tokens_per_second > self.high else "inside"


def find_interval(milliseconds: Mapping[str, float], tokens: int, reached: Efficiency) -> Interval:
    """The function says between which speeds a step should lie.

    Causes have nothing to do with each other, so their effects on the logarithm of the time add up
    as squares.

    Args:
        milliseconds: of the step, by category.
        tokens: of the step.
        reached: the efficiencies that the times are from, with their ranges.
    """
    step = sum(milliseconds.values())
    best, causes, squares = tokens / step * 1e3, [], [0.0, 0.0]
    for name, factors in reached.ranges.items():
        changes = [step / _step_at(milliseconds, name, factor) for factor in factors]
        squares = [s + math.log(c) ** 2 for s, c in zip(squares, changes, strict=True)]
        causes.append(Cause(name, changes[0] - 1, changes[1] - 1, reached.why[name]))
    low, high = (math.exp(math.sqrt(total)) for total in squares)
    causes.sort(key=lambda cause: cause.slowest - cause.fastest)
    return Interval(best / low, best, best * high, tuple(causes))


@dataclass(frozen=True)
class Gain:
    """A gain is how many times faster one step is than another on the same card."""

    low: float
    """where about nine of ten should lie, as in `Interval`"""
    best: float
    high: float


def find_gain(before: Mapping[str, float], after: Mapping[str, float], reached: Efficiency) -> Gain:
    """The function says between which gains the change from one step to another should lie.

    What makes both steps slower, such as the clock, says little of the gain.

    Args:
        before, after: milliseconds of both steps, by category, from the same efficiencies.
        reached: those efficiencies, with their ranges.
    """
    best, squares = sum(before.values()) / sum(after.values()), [0.0, 0.0]
    for name, factors in reached.ranges.items():
        gains = (_step_at(before, name, f) / _step_at(after, name, f) for f in factors)
        changes = [math.log(gain / best) for gain in gains]
        squares[0] += min(0.0, *changes) ** 2
        squares[1] += max(0.0, *changes) ** 2
    low, high = (math.exp(math.sqrt(total)) for total in squares)
    return Gain(best / low, best, best * high)


def _step_at(milliseconds: Mapping[str, float], cause: str, factor: float) -> float:
    """The step takes so many milliseconds if the work that the cause affects is `factor` times as
    fast."""
    affected = sum(ms for kind, ms in milliseconds.items() if _affects(cause, kind))
    return sum(milliseconds.values()) + affected * (1 / factor - 1)


def _affects(cause: str, category: str) -> bool:
    if cause == "bandwidth":
        return category not in _ARITHMETIC | _NEITHER
    return category in _AFFECTED.get(cause, {category})
