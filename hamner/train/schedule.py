"""The learning-rate schedule goes by tokens, so that batch sizes may change between two starts."""

import math

from hamner.config.options import total_tokens
from hamner.config.train import TrainConfig


class Schedule:
    """The learning rate warms up linearly to `lr`, then falls to `min_lr` as `--decay` says.

    Args:
        config: the run, whose flags describe the schedule.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.warmup_tokens = config.warmup_steps * config.tokens_per_step
        self.total_tokens = total_tokens(config)

    def __call__(self, tokens: int) -> float:
        """The result is the learning rate of the step that ends at `tokens` trained tokens."""
        lr, min_lr = self.config.lr, self.config.min_lr
        if tokens < self.warmup_tokens:
            return lr * tokens / self.warmup_tokens
        decay, first = self.config.decay, self.warmup_tokens
        if decay == "wsd":
            first = max(first, self.total_tokens * (1 - self.config.decay_fraction))
        span = max(1, self.total_tokens - first)
        progress = min(1.0, max(0.0, (tokens - first) / span))
        if decay == "cosine":
            return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))
        return lr + (min_lr - lr) * progress

    def state_dict(self) -> dict:
        """The state is the schedule in tokens, beside the flags that the tokens were made from."""
        return {
            "schedule": {
                "warmup_steps": self.config.warmup_steps,
                "warmup_tokens": self.warmup_tokens,
                "length": [self.config.steps, self.config.tokens],
                "total_tokens": self.total_tokens,
            }
        }

    def load_state_dict(self, state: dict) -> None:
        """The schedule goes on as before in tokens, whatever a step is now.

        Another `--batch-size` or `--seq-len` makes the same number of steps another number of
        tokens. So a flag that is as it was keeps its tokens, and only one that was changed counts
        anew.
        """
        saved = state["schedule"]
        if self.config.warmup_steps == saved["warmup_steps"]:
            self.warmup_tokens = saved["warmup_tokens"]
        if [self.config.steps, self.config.tokens] == saved["length"]:
            self.total_tokens = saved["total_tokens"]
