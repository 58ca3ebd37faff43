"""A row about a kernel is recorded with its times and with what they are of the GPU's ceilings."""

from collections.abc import Callable

import torch

from bench import scale
from bench.ceilings import Ceilings
from bench.timing import quantiles, timed_as
from hamner.plan.costs import Cost

ROUNDS = 10


def record(
    benchmark,
    function: Callable[[], object],
    ceilings: Ceilings,
    *,
    op: str,
    implementation: str,
    cost: Cost,
) -> None:
    """The function times another on the GPU, and puts what the times mean into extra_info.

    Args:
        benchmark: the fixture; its own columns are wall time with a synchronisation.
        function: what to time.
        ceilings: of this GPU.
        op: what is computed, direction and shape included: rows of one op compare, as a group.
        implementation: who computes it.
        cost: of the op; its rate is that of the FLOPs, if there are any, else of the bytes.
    """
    benchmark.group = op
    if scale.COMPILE_ONLY:
        function()
        return
    peak = _peak_bytes(function)
    timed, how = timed_as(function)
    median, p10, p90 = quantiles(timed)
    info = {
        "kind": "kernel",
        "op": op,
        "implementation": implementation,
        "timed": how,
        "median_ms": round(median, 5),
        "p10_ms": round(p10, 5),
        "p90_ms": round(p90, 5),
        "peak_mib": None if peak is None else round(peak / 2**20, 1),
    }
    rate = {}
    if cost.flops:
        rate["tflop_per_s"] = cost.flops / median / 1e9
    elif cost.bytes:
        rate["gb_per_s"] = cost.bytes / median / 1e6
    if rate:
        info |= {name: round(value, 1) for name, value in rate.items()}
        info["of_ceiling"] = round(ceilings.share(**rate), 4)
    benchmark.extra_info.update(info)

    def synchronised() -> None:
        function()
        if not scale.SMOKE:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=scale.pick(ROUNDS, 1), warmup_rounds=1)


def _peak_bytes(function: Callable[[], object]) -> int | None:
    """The function gives the most memory of one call beyond what is held before it."""
    function()
    if scale.SMOKE:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before
