"""What the GPU at hand reaches at best, measured: the ceilings that kernels are held against."""

from dataclasses import dataclass

import torch

from bench import scale
from bench.timing import quantiles

COPY_BYTES = 1 << 30
MATMUL = 8192


@dataclass(frozen=True)
class Ceilings:
    """Of this GPU, in this session."""

    copy_gb_per_s: float
    """a 1 GiB copy: bytes read and written (10^9) a second"""
    matmul_tflop_per_s: float
    """8192^3, in the rows' dtype"""

    def share(self, *, gb_per_s: float | None = None, tflop_per_s: float | None = None) -> float:
        """What is achieved of the ceiling."""
        if tflop_per_s is not None:
            return tflop_per_s / self.matmul_tflop_per_s
        return gb_per_s / self.copy_gb_per_s


def measure() -> Ceilings:
    """Measure both."""
    size = scale.pick(COPY_BYTES, 1 << 16)
    source = torch.ones(size, dtype=torch.uint8, device=scale.device())
    target = torch.empty_like(source)
    copy_ms, *_ = quantiles(lambda: target.copy_(source))
    n = scale.pick(MATMUL, 64)
    a = torch.randn(n, n, device=scale.device()).to(scale.dtype())
    out = torch.empty_like(a)
    matmul_ms, *_ = quantiles(lambda: torch.mm(a, a, out=out))
    return Ceilings(2 * size / copy_ms / 1e6, 2 * n**3 / matmul_ms / 1e9)
