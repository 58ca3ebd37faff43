"""The ceilings that kernels are held against are what the GPU at hand reaches, measured."""

from dataclasses import dataclass

import torch

from bench import scale
from bench.timing import quantiles
from hamner.plan import costs

COPY_BYTES = 1 << 30
MATMUL = 8192


@dataclass(frozen=True)
class Ceilings:
    """The ceilings are of this GPU, in this session."""

    copy_gb_per_s: float
    """a 1 GiB copy: bytes read and written (10^9) a second"""
    matmul_tflop_per_s: float
    """8192^3, in the rows' dtype"""

    def share(self, *, gb_per_s: float | None = None, tflop_per_s: float | None = None) -> float:
        """This share of the ceiling is achieved."""
        if tflop_per_s is not None:
            return tflop_per_s / self.matmul_tflop_per_s
        return gb_per_s / self.copy_gb_per_s


def measure() -> Ceilings:
    """The function measures both."""
    size = scale.pick(COPY_BYTES, 1 << 16)
    source = torch.ones(size, dtype=torch.uint8, device=scale.device())
    target = torch.empty_like(source)
    copy_ms, *_ = quantiles(lambda: target.copy_(source))
    n = scale.pick(MATMUL, 64)
    a = torch.randn(n, n, device=scale.device()).to(scale.dtype())
    out = torch.empty_like(a)
    matmul_ms, *_ = quantiles(lambda: torch.mm(a, a, out=out))
    return Ceilings(2 * size / copy_ms / 1e6, costs.matmul(n, n, n).flops / matmul_ms / 1e9)
