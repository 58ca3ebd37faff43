"""How evenly a mixture's routers share the work, judged at log lines."""

from typing import NamedTuple

from torch import Tensor

from hamner.config.model import ModelConfig


def describe_routers(interval_sum: Tensor, steps: int) -> dict | None:
    """An interval's means for the metrics (see `Record.router`).

    Args:
        interval_sum: (layers, experts + 1) sums of `StepResult.router`, on the CPU.
        steps: good ones in the interval; without any there is no mean.
    """
    if not steps:
        return None
    means = (interval_sum.double() / steps).tolist()
    load = [layer[:-1] for layer in means]
    return {
        "load": load,
        "entropy": [layer[-1] for layer in means],
        # Load is counted from what each expert was handed, so what is missing was dropped;
        # beyond six digits there is only fp32's rounding.
        "dropped": [abs(round(1.0 - sum(layer), 6)) for layer in load],
    }


class StarvedExpert(NamedTuple):
    """An expert that gets too little to learn from."""

    layer: int
    expert: int
    load: float
    """share of the layer's assignments in the latest interval"""


class StarvationDetector:
    """Finds experts that stay under a quarter of their fair share, 1 / experts, for 200 steps.

    Each is reported once. An interval counts for an expert when its mean load is that low.

    Args:
        model: shape of a mixture of experts.
    """

    LEAST_SHARE = 0.25
    """of the fair share"""
    STEPS = 200

    def __init__(self, model: ModelConfig) -> None:
        self.threshold = self.LEAST_SHARE / model.num_experts
        self.low_steps = [[0] * model.num_experts for _ in range(model.num_layers)]
        """by layer and expert: steps in a row with a low load"""
        self.reported = [[False] * model.num_experts for _ in range(model.num_layers)]

    def starved(self, load: list[list[float]], steps: int) -> list[StarvedExpert]:
        """Experts that have now been low for long enough, each for the first time.

        Args:
            load: by layer and expert, mean over an interval.
            steps: of the interval.
        """
        found = []
        for layer, shares in enumerate(load):
            for expert, share in enumerate(shares):
                low = self.low_steps[layer]
                low[expert] = low[expert] + steps if share < self.threshold else 0
                if low[expert] >= self.STEPS and not self.reported[layer][expert]:
                    self.reported[layer][expert] = True
                    found.append(StarvedExpert(layer, expert, share))
        return found

    def state_dict(self) -> dict:
        """For `load_state_dict`: JSON, part of a checkpoint."""
        return {
            "low_steps": [list(row) for row in self.low_steps],
            "told": [*map(list, self.reported)],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        self.low_steps, self.reported = state["low_steps"], state["told"]
