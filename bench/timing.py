"""How every row about a kernel is timed on a GPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from bench import scale

WARM_UP_CALLS = 3
ROUNDS = 10


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


def use_recordable_stream() -> None:
    """Run from now on on a stream that a CUDA graph can record, which the default one is not."""
    torch.cuda.set_stream(torch.cuda.Stream())


def reset_persisting_l2() -> None:
    """Make the lines that kernels asked the L2 to keep (`evict_last`) lines like any other.

    torch.compile's kernels ask for it. Such lines outlast `do_bench`'s clearing of the L2 and the
    tensor itself: the next tensor in its place is read from cache, which was worth 4% of a small
    kernel's time (profiles/LOG.md, 2026-11-28).

    Raises:
        RuntimeError: the driver refused.
    """
    if torch.cuda.is_initialized():
        status = ctypes.CDLL("libcuda.so.1").cuCtxResetPersistingL2Cache()
        if status != 0:
            raise RuntimeError(f"cuCtxResetPersistingL2Cache failed with CUresult {status}")


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph, so that a row is the GPU's time and not Python's.

    A trainer replays its step as a graph, or launches far ahead of a slower GPU: either way the
    launches cost nothing there.
    """
    for _ in range(WARM_UP_CALLS):
        function()
    graph = torch.cuda.CUDAGraph()
    # Autograd runs a backward on the stream of its forward: it must be the one that records.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    return graph.replay


def waits_for_gpu(function: Callable[[], object]) -> bool:
    """Whether a function waits for the GPU, so that no graph can record it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def timed_as(function: Callable[[], object]) -> tuple[Callable[[], object], str]:
    """What to time for a function, and how that runs: "graph", or "launches" if it waits."""
    function()  # compilation may wait
    if scale.SMOKE or waits_for_gpu(function):
        return function, "launches"
    return graphed(function), "graph"


def quantiles(call: Callable[[], object], *, rep: float = 100) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of a call in milliseconds, L2 cleared before each.

    `rep` is about how long to measure, in milliseconds.
    """
    if scale.SMOKE:
        started = time.perf_counter()
        call()
        milliseconds = (time.perf_counter() - started) * 1e3
        return milliseconds, milliseconds, milliseconds
    return triton.testing.do_bench(call, warmup=rep / 4, rep=rep, quantiles=[0.5, 0.1, 0.9])


def record(
    benchmark,
    function: Callable[[], object],
    ceilings: Ceilings,
    *,
    op: str,
    implementation: str,
    num_bytes: int | None = None,
    flops: int | None = None,
) -> None:
    """Time a function on the GPU, and put what the times mean into extra_info.

    Args:
        benchmark: the fixture; its own columns are wall time with a synchronisation.
        function: what to time.
        ceilings: of this GPU.
        op: what is computed, direction and shape included: rows of one op compare.
        implementation: who computes it.
        num_bytes: that the op must move, for its GB/s.
        flops: that it must compute, for its TFLOP/s; at most one of both is given.
    """
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
    if num_bytes is not None:
        rate["gb_per_s"] = num_bytes / median / 1e6
    elif flops is not None:
        rate["tflop_per_s"] = flops / median / 1e9
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
    """Most memory of one call beyond what is held before it."""
    function()
    if scale.SMOKE:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before
