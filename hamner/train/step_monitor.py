"""Loss and gradient norm of every step, read back without waiting for the GPU.

A step's two numbers are copied to the host behind the step itself and looked at once they are
there, a step or two later. Until then its batch is kept, so that the batch of a bad step can be
written down.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hamner.data.batch import Batch
from hamner.train.readback import Readback

MOST_UNDER_WAY = 1
"""steps that may still run when the host goes on: the GPU never runs out of work, and when a step's
numbers come in the clock shows the GPU's time, not that of a launch"""


@dataclass(frozen=True)
class StepReading:
    """What one step turned out to be."""

    step: int
    tokens: int
    """trained when it was done"""
    lr: float
    loss: float
    """cross-entropy, nats per token"""
    grad_norm: float
    """global, before clipping"""
    batch: Batch

    @property
    def is_bad(self) -> bool:
        """Whether the update was skipped because loss or gradient was not finite."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


class StepMonitor:
    """Hands out the readings of steps in their order."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Readback, tuple]] = deque()

    @property
    def under_way(self) -> int:
        """Steps whose readings were not handed out yet."""
        return len(self._under_way)

    def record(
        self, step: int, tokens: int, lr: float, batch: Batch, loss: Tensor, grad_norm: Tensor
    ) -> None:
        """Start to read a step back.

        Args:
            step, tokens, lr, batch: as in `StepReading`.
            loss, grad_norm: 0-d fp32, on the device.
        """
        values = Readback(torch.stack((loss, grad_norm)))
        self._under_way.append((values, (step, tokens, lr, batch)))

    def arrived(self, *, most_under_way: int = MOST_UNDER_WAY) -> Iterator[StepReading]:
        """Readings that have come in; all but the latest `most_under_way` are waited for."""
        while self._under_way:
            values, (step, tokens, lr, batch) = self._under_way[0]
            if len(self._under_way) <= most_under_way and not values.arrived:
                return
            loss, grad_norm = values.wait().tolist()
            self._under_way.popleft()
            yield StepReading(step, tokens, lr, loss, grad_norm, batch)


class SpikeDetector:
    """Marks losses far above the recent ones.

    The score is the robust z-score (Iglewicz & Hoaglin 1993): the distance from the median of the
    last `WINDOW` losses in units of 1.4826 x their median absolute deviation, which equals the
    standard deviation of a normal distribution and which a few spikes do not move.

    Args:
        recent: losses before this start, oldest first.
    """

    WINDOW = 128
    LEAST = 32
    """losses before anything is judged"""
    THRESHOLD = 6.0
    LEAST_DEVIATION = 1e-3
    """nats per token; a run that has converged does not spike in the last digits"""

    def __init__(self, recent: list[float]) -> None:
        self.recent: deque[float] = deque(recent, maxlen=self.WINDOW)

    def score(self, loss: float) -> float | None:
        """The z-score if this finite loss is a spike, else None; it then counts as recent."""
        score = None
        if len(self.recent) >= self.LEAST:
            losses = torch.tensor(self.recent, dtype=torch.float64)
            median = losses.median()
            deviation = 1.4826 * (losses - median).abs().median().item()
            score = (loss - median.item()) / max(deviation, self.LEAST_DEVIATION)
        self.recent.append(loss)
        return score if score is not None and score > self.THRESHOLD else None
