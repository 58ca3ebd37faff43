"""The ceilings that kernels are held against are what the GPU at hand reaches, measured."""

import torch

from bench import scale
from bench.timing import Ceilings, quantiles
from hamner.plan import costs

COPY_BYTES = 1 << 30
MATMUL = 8192


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
