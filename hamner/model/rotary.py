"""RoPE's tables (arXiv:2104.09864) are made here, or stretched beyond the lengths trained on.

Pair i of d / 2 turns by theta^(-2 i / d) a position. To use positions up to s times those of
pre-training, `--rope-scaling`

    linear  turns every pair s times slower (position interpolation, arXiv:2306.15595)
    ntk     raises theta to theta s^(d / (d - 2)): the slowest pair turns s times slower, the
            fastest as before (NTK-aware scaling, in section 3.1 of arXiv:2309.00071)
    yarn    leaves pairs that turn often within a sequence, slows those that never complete a turn
            s times, blends between, and sharpens attention by 0.1 ln s + 1 (arXiv:2309.00071)

The functions agree with those of Hugging Face's transformers to the last fp32 digit or so, so that
an exported model computes the same.
"""

import math

import torch
from torch import Tensor

from hamner.config.model import ModelConfig

YARN_FAST_TURNS, YARN_SLOW_TURNS = 32, 1
"""turns within the trained length from which a pair is left, and up to which it is slowed"""


def rotary_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """The tables hold cosines and sines of the positions 0 to length - 1.

    Returns:
        cos and sin, (length, head_size / 2) fp32.
    """
    # fp64, since positions times frequencies lose digits early in fp32.
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies(config))
    scale = attention_factor(config)
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


def frequencies(config: ModelConfig) -> Tensor:
    """Each pair turns by so many radians a position, (head_size / 2,) fp64."""
    size, factor = config.head_size, config.rope_scaling_factor
    exponent = torch.arange(0, size, 2, dtype=torch.float64) / size
    unscaled = scaled_theta(config) ** -exponent
    if config.rope_scaling == "linear":
        return unscaled / factor
    if config.rope_scaling == "yarn":
        kept = _yarn_share_kept(config)
        return unscaled * kept + unscaled / factor * (1 - kept)
    return unscaled


def scaled_theta(config: ModelConfig) -> float:
    """The result is RoPE's base, raised by NTK-aware scaling."""
    if config.rope_scaling == "ntk":
        size = config.head_size
        return config.rope_theta * config.rope_scaling_factor ** (size / (size - 2))
    return config.rope_theta


def attention_factor(config: ModelConfig) -> float:
    """Cos and sin are multiplied by the factor; scores grow by its square."""
    if config.rope_scaling == "yarn":
        return 0.1 * math.log(config.rope_scaling_factor) + 1
    return 1.0


def _yarn_share_kept(config: ModelConfig) -> Tensor:
    """Each pair stays as it was by a share, 1 for fast ones, 0 for slow ones, (head_size / 2,)."""
    size = config.head_size

    def pair_of(turns: float) -> float:
        """The (fractional) pair `pair_of(n)` turns n times within the trained length."""
        period = config.rope_scaling_from / (turns * 2 * math.pi)
        return size * math.log(period) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_of(YARN_FAST_TURNS)), 0)
    high = min(math.ceil(pair_of(YARN_SLOW_TURNS)), size - 1)
    pairs = torch.arange(size // 2, dtype=torch.float64)
    # Equal ends would divide by zero: the ramp is then a step.
    return 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
