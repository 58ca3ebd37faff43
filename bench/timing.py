"""Every row about a kernel is timed on a GPU in this way."""

import ctypes
import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
import triton

from bench import scale

WARM_UP_CALLS = 3


def use_recordable_stream() -> None:
    """From now on work runs on a stream that a CUDA graph can record, which the default one is
    not."""
    torch.cuda.set_stream(torch.cuda.Stream())


def reset_persisting_l2() -> None:
    """The function makes the lines that kernels asked the L2 to keep (`evict_last`) lines like any
    other.

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
    """The function makes another a CUDA graph, so that a row is the GPU's time and not Python's.

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


class ManyCalls:
    """The calls are recorded one after the other as one CUDA graph, again and again, so that
    neither launches nor the latency of the device count.

    Args:
        calls: of the same work on different data, together several times the L2, so that none finds
            its inputs there.
        milliseconds: the graph is to take about as long.
    """

    MOST_CALLS = 64

    def __init__(self, calls: Sequence[Callable[[], object]], *, milliseconds: float = 4.0) -> None:
        for call in calls:  # compiles, allocates
            call()
        once = elapsed(lambda: [call() for call in calls]) / len(calls)
        self.count = max(len(calls), min(self.MOST_CALLS, math.ceil(milliseconds / once)))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for call in itertools.islice(itertools.cycle(calls), self.count):
                call()
        self.graph.replay()

    def milliseconds(self) -> float:
        """The method measures once, and gives the milliseconds of one call."""
        return elapsed(self.graph.replay) / self.count


def elapsed(function: Callable[[], object]) -> float:
    """The function gives milliseconds between two events around another."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def waits_for_gpu(function: Callable[[], object]) -> bool:
    """The function says whether a function waits for the GPU, so that no graph can record it."""
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
    """The function gives what to time for another, and how that runs: "graph", or "launches" if it
    waits."""
    function()  # compilation may wait
    if scale.SMOKE or waits_for_gpu(function):
        return function, "launches"
    return graphed(function), "graph"


def quantiles(call: Callable[[], object], *, rep: float = 100) -> tuple[float, float, float]:
    """The function gives the median, 10th and 90th percentile of a call in milliseconds, L2 cleared
    before each.

    `rep` is about how long to measure, in milliseconds.
    """
    if scale.SMOKE:
        started = time.perf_counter()
        call()
        milliseconds = (time.perf_counter() - started) * 1e3
        return milliseconds, milliseconds, milliseconds
    return triton.testing.do_bench(call, warmup=rep / 4, rep=rep, quantiles=[0.5, 0.1, 0.9])
