"""A training step's forward and backward as one CUDA graph: a single launch instead of a thousand.

Launched one by one, the small kernels of a step leave gaps between them on a fast GPU, and a slow
CPU cannot keep up at all. A graph has neither. What it records is fixed: shapes, addresses and the
order of kernels; so inputs are copied to where the graph reads them, and gradients always come out
in the same tensors. Its memory stays reserved between replays.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

WARM_UP_CALLS = 2
"""run as they are: they compile kernels, build tables and load libraries"""


class GraphedBackward:
    """Records a function that fills the gradients of some parameters, then replays it.

    Args:
        function: takes tensors (or None) of the same shapes at every call, leaves gradients in
            `parameters`, which have none before the call, and never waits for the GPU.
        parameters: all that get a gradient.

    A call returns what the function returned; tensors in it are overwritten by the next call.
    """

    def __init__(self, function: Callable, parameters: Iterable[nn.Parameter]) -> None:
        self.function = function
        self.parameters = list(parameters)
        self.warm_up_left = WARM_UP_CALLS
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: Tensor | None):
        """The function's result; gradients are in the parameters."""
        if self.warm_up_left:
            self.warm_up_left -= 1
            return self.function(*arguments)
        if self.graph is None:
            self._record(arguments)
        else:
            for ours, given in zip(self.arguments, arguments, strict=True):
                if ours is not None:
                    ours.copy_(given)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.result

    def _record(self, arguments: tuple[Tensor | None, ...]) -> None:
        self.arguments = arguments
        graph = torch.cuda.CUDAGraph()
        # The loader's thread pins memory meanwhile, which only this thread's recording forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.result = self.function(*arguments)
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph
