"""What a loss curve has to show before a law is fitted: it falls, and by less with each doubling.

L(D) = floor + scale * D^-exponent falls less in each doubling of the tokens than in the one before,
whatever its three numbers are. A run in its first plateau, or just out of it, does not, and where
noise hides which of the two a log shows, its law would be the prior and not the run.
"""

import math
from typing import NamedTuple

import numpy as np

HUBER_THRESHOLD = 1.345
"""noise deviations beyond which a point counts linearly; 95% efficient on normal noise"""
READINGS_ALIKE = 8
"""neighbouring readings that count as one: the order of the data moves them together"""


class Slowing(NamedTuple):
    """The falls are in nats per doubling of the tokens, in two stretches of equally many."""

    before: float
    lately: float
    error: float
    """standard deviation of their difference"""

    @property
    def is_clear(self) -> bool:
        """The loss falls less lately than before, by more than the standard deviation."""
        return self.before - self.lately > self.error


def slowing(tokens: np.ndarray, loss: np.ndarray, noise: float) -> Slowing | None:
    """The curve is cut at the geometric mean of its ends, and a line in log tokens fitted to each.

    None where a half has fewer than three points.
    """
    doublings = np.log2(tokens)
    is_late = doublings > (doublings[0] + doublings[-1]) / 2
    falls, variance = [], 0.0
    for half in (~is_late, is_late):
        if half.sum() < 3:
            return None
        x = doublings[half] - doublings[half].mean()
        _, slope, _ = huber_lines(x, loss[half], HUBER_THRESHOLD * noise)
        falls.append(-float(slope))
        variance += READINGS_ALIKE * noise**2 / float(x @ x)
    return Slowing(*falls, error=math.sqrt(variance))


def is_falling(tokens: np.ndarray, loss: np.ndarray, noise: float) -> bool:
    """The last fifth of the tokens lies under the three tenths before, by more than noise may do.

    That is two standard errors of a difference of medians.
    """
    share = tokens / tokens[-1]
    recent, earlier = loss[share > 0.8], loss[(share > 0.5) & (share <= 0.8)]
    if not len(earlier):
        return True
    error = 1.25 * noise * math.sqrt(1 / len(recent) + 1 / len(earlier))
    return bool(np.median(recent) < np.median(earlier) - 2 * error)


def huber_lines(
    x: np.ndarray, y: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The function fits y = floor + scale * x along the last axis, floor >= 0, by Huber's loss."""
    weights = np.ones(np.broadcast_shapes(x.shape, y.shape))
    # Iteratively reweighted least squares; the objective is convex, ten rounds settle it.
    for _ in range(10):
        total = weights.sum(-1)
        mean_x, mean_y = (weights * x).sum(-1) / total, (weights * y).sum(-1) / total
        mean_xx, mean_xy = (weights * x * x).sum(-1) / total, (weights * x * y).sum(-1) / total
        scale = (mean_xy - mean_x * mean_y) / (mean_xx - mean_x**2)
        floor = mean_y - scale * mean_x
        # A loss cannot end below zero; on that edge the scale alone is left to fit.
        scale = np.where(floor < 0, mean_xy / mean_xx, scale)
        floor = np.maximum(floor, 0.0)
        error = np.abs(y - floor[..., None] - scale[..., None] * x)
        weights = limit / np.maximum(error, limit)
    objective = np.where(error <= limit, error**2 / 2, limit * (error - limit / 2)).sum(-1)
    return floor, scale, objective
