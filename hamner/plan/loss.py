"""The loss is expected before a run by the Chinchilla form L(N, D) = E + A / N^alpha + B / D^beta.

Its coefficients are published ones, from another tokenizer and corpus: compare options by them, do
not trust an absolute value. What a size really reaches is one measured run's curve.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

TOKENS_PER_PARAMETER = 20
COHERENT_LOSS = 3.5
"""nats per token (perplexity 33), above which samples were incoherent text"""
FLUENT_LOSS = 3.3
"""nats per token (perplexity 27): the goal after that"""


@dataclass(frozen=True)
class LossLaw:
    """The law is L(N, D) = E + A / N^alpha + B / D^beta, nats a token; N parameters, D tokens."""

    source: str
    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float

    def capacity_term(self, parameters: float) -> float:
        """More parameters could still remove this, nats."""
        return self.a / parameters**self.alpha

    def data_term(self, tokens: float) -> float:
        """More tokens could still remove this, nats."""
        return self.b / tokens**self.beta

    def loss(self, parameters: float, tokens: float) -> float:
        """This loss is expected after training `parameters` on `tokens`."""
        return self.irreducible + self.capacity_term(parameters) + self.data_term(tokens)

    def tokens_to_reach(self, loss: float, parameters: float) -> float | None:
        """The loss is `loss` after this many tokens; None where the model is too small for it."""
        left = loss - self.irreducible - self.capacity_term(parameters)
        return (self.b / left) ** (1 / self.beta) if left > 0 else None

    def through(self, parameters: float, tokens: float, loss: float) -> "LossLaw":
        """The law is shifted through a measured run: another tokenizer, corpus, schedule."""
        shift = loss - self.loss(parameters, tokens)
        return replace(self, irreducible=self.irreducible + shift)


HOFFMANN = LossLaw("Hoffmann et al. 2022, arXiv:2203.15556", 1.69, 406.4, 0.34, 410.7, 0.28)
# The default: Hoffmann et al.'s parametric fit had not converged, and implies some 70 tokens per
# parameter where their other two methods say 20; this re-fit of the same runs agrees with those.
BESIROGLU = LossLaw(
    "Besiroglu et al. 2024, arXiv:2404.10102", 1.8172, 482.01, 0.3478, 2085.43, 0.3658
)


KNOWN_RUN = 163_609_344, 2.45e9, 3.41
"""parameters, tokens and loss of option `current` at 24 x 1024, learning rate 2e-4 throughout"""
KNOWN_CURVE = {49e6: 5.20, 98e6: 4.46, 491e6: 3.67, 1e9: 3.53, 2e9: 3.43, 2.45e9: 3.41}
"""tokens: training loss of that run, means of 100 steps, from the end of its warm-up on"""


def reached_loss(parameters: float, tokens: float) -> float | None:
    """Training that is in order reaches this loss: the known run's, by the law for another size.

    None where that run was still warming up.
    """
    if tokens < min(KNOWN_CURVE):
        return None
    size, end, _ = KNOWN_RUN
    curve = np.array(list(KNOWN_CURVE.items())).T
    measured = np.interp(math.log(tokens), np.log(curve[0]), curve[1])
    measured += BESIROGLU.capacity_term(parameters) - BESIROGLU.capacity_term(size)
    return float(measured + BESIROGLU.data_term(max(tokens, end)) - BESIROGLU.data_term(end))


def compute_optimal_tokens(parameters: float) -> float:
    """After this many tokens a larger model would have been the better use of the same FLOPs."""
    return TOKENS_PER_PARAMETER * parameters
