"""The learning-rate schedule, by tokens, so that batch sizes may change between two starts."""

import math
from dataclasses import dataclass

from hamner.config.options import total_tokens
from hamner.config.train import TrainConfig


@dataclass
class Schedule:
    """Linear warm-up, then cosine from `lr` to `min_lr`."""

    lr: float
    min_lr: float
    warmup_tokens: int
    total_tokens: int
    warmup_steps: int = 0
    """the flag that `warmup_tokens` was made from"""
    length: tuple[int | None, float | None] = (None, None)
    """the flags --steps and --tokens that `total_tokens` was made from"""

    @classmethod
    def of(cls, config: TrainConfig) -> "Schedule":
        """The schedule that the flags describe."""
        return cls(
            lr=config.lr,
            min_lr=config.min_lr,
            warmup_tokens=config.warmup_steps * config.tokens_per_step,
            total_tokens=total_tokens(config),
            warmup_steps=config.warmup_steps,
            length=(config.steps, config.tokens),
        )

    def __call__(self, tokens: int) -> float:
        """The learning rate of the step that ends at `tokens` trained tokens."""
        if tokens < self.warmup_tokens:
            return self.lr * tokens / self.warmup_tokens
        span = max(1, self.total_tokens - self.warmup_tokens)
        progress = min(1.0, (tokens - self.warmup_tokens) / span)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * progress))

    def state_dict(self) -> dict:
        """The schedule in tokens, beside the flags it was made from, for a checkpoint."""
        return {
            "schedule": {
                "warmup_steps": self.warmup_steps,
                "warmup_tokens": self.warmup_tokens,
                "length": list(self.length),
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
        if self.warmup_steps == saved["warmup_steps"]:
            self.warmup_tokens = saved["warmup_tokens"]
        if list(self.length) == saved["length"]:
            self.total_tokens = saved["total_tokens"]
