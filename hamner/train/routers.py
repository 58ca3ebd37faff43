"""How evenly a mixture's routers share the work: measured on the device, judged at log lines."""

from typing import NamedTuple

import torch
from torch import Tensor

from hamner.config.model import ModelConfig
from hamner.model.transformer import RouterStatistics
from hamner.train.readback import Readback


class RouterMonitor:
    """Sums what the routers did over the steps since the last log line; nothing waits for the GPU.

    Args:
        model: shape of a mixture of experts.
        device: of the sums.
    """

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        layers, experts = model.num_layers, model.num_experts
        # Columns: the experts' load, then the entropy.
        self.step_sum = torch.zeros((layers, experts + 1), device=device)
        self.interval_sum = torch.zeros((layers, experts + 1), device=device)

    @property
    def step_load(self) -> Tensor:
        """(layers, experts) fp32 shares of the assignments of the step so far."""
        return self.step_sum[:, :-1]

    def begin_step(self) -> None:
        """Forget the step before, or one that was dropped half-way."""
        self.step_sum.zero_()

    def add(self, router: RouterStatistics, share: float) -> None:
        """Take in a micro-batch that is `share` of the step's tokens."""
        self.step_sum += torch.cat((router.load, router.entropy[:, None]), dim=1) * share

    def end_step(self, is_good: Tensor) -> None:
        """Count the step to the interval if `is_good`, () bool on the device."""
        self.interval_sum += torch.where(is_good, self.step_sum, 0.0)

    def end_interval(self) -> Readback:
        """Start to read the interval's sums back, for `describe_routers`, and begin another."""
        sums = Readback(self.interval_sum)
        self.interval_sum.zero_()
        return sums


def describe_routers(interval_sum: Tensor, steps: int) -> dict | None:
    """An interval's means for the metrics (see `Record.router`).

    Args:
        interval_sum: from `RouterMonitor.end_interval`, on the CPU.
        steps: good ones in the interval; without any there is nothing to tell.
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

    Each is told once. An interval counts for an expert when its mean load is that low.

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
        self.told = [[False] * model.num_experts for _ in range(model.num_layers)]

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
                if low[expert] >= self.STEPS and not self.told[layer][expert]:
                    self.told[layer][expert] = True
                    found.append(StarvedExpert(layer, expert, share))
        return found

    def state_dict(self) -> dict:
        """For `load_state_dict`: JSON, part of a checkpoint."""
        return {"low_steps": [list(row) for row in self.low_steps], "told": [*map(list, self.told)]}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        self.low_steps, self.told = state["low_steps"], state["told"]
