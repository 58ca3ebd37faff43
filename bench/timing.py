"""How every row of the benchmarks is timed on a GPU."""

from collections.abc import Callable

import torch
import triton

WARM_UP_CALLS = 3


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph, so that a row is the GPU's time and not Python's.

    A trainer replays its step as a graph, or launches far ahead of a slower GPU: either way the
    launches cost nothing there. A function that waits for the GPU cannot be recorded and raises.
    """
    for _ in range(WARM_UP_CALLS):
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def timed_as(function: Callable[[], object]) -> tuple[Callable[[], object], str]:
    """What to time for a function, and how that runs: "graph", or "launches" if it waits."""
    try:
        return graphed(function), "graph"
    except RuntimeError:
        return function, "launches"


def quantiles(call: Callable[[], object], *, rep: float = 100) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of a call in milliseconds, L2 cleared before each.

    `rep` is about how long to measure, in milliseconds.
    """
    return triton.testing.do_bench(call, warmup=rep / 4, rep=rep, quantiles=[0.5, 0.1, 0.9])
