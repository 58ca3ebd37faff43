"""Commands and server share the settings by which the next token is chosen. Torch-free."""

import math
from dataclasses import dataclass

from hamner.config.model import flag
from hamner.errors import UserError

PENALTY = 1.1
"""default repetition penalty of what is drawn"""


@dataclass(frozen=True)
class Sampling:
    """These flags choose among the model's next tokens; they apply in this order.

    Raises:
        UserError: a value outside its range.
    """

    repetition_penalty: float | None = None
    """divides the odds of tokens already in the context (CTRL, arXiv:1909.05858); 1 is off;
    default 1.1, and 1 at temperature 0, which is plain greedy decoding"""
    temperature: float = 0.7
    """divides the logits; 0 always takes the likeliest token"""
    top_k: int = 50
    """choose among so many of the likeliest tokens; 0 is off"""
    top_p: float = 0.95
    """choose among the likeliest tokens that together have this probability
    (arXiv:1904.09751); 1 is off"""
    min_p: float = 0.0
    """choose among tokens at least this fraction as likely as the likeliest
    (arXiv:2407.01082); 0 is off"""

    @property
    def penalty(self) -> float:
        """The penalty is the repetition penalty that applies."""
        if self.repetition_penalty is not None:
            return self.repetition_penalty
        return PENALTY if self.temperature else 1.0

    def __post_init__(self) -> None:
        ranges = {
            "repetition_penalty": (0 < self.penalty < math.inf, "above 0 and finite"),
            "temperature": (0 <= self.temperature < math.inf, "0 or above and finite"),
            "top_k": (self.top_k >= 0, "0 or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
        }
        for name, (holds, range_) in ranges.items():
            if not holds:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be {range_}")
