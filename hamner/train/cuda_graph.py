"""A step's forward and backward become one CUDA graph: a single launch instead of a thousand.

Launched one by one, the small kernels of a step leave gaps between them on a fast GPU, and a slow
CPU cannot keep up at all. A graph has neither. What it records is fixed: shapes, addresses and the
order of kernels; so inputs are copied to where the graph reads them, and gradients always come out
in the same tensors. Its memory stays reserved between replays. Where several processes train, what
their collectives do on the GPU is recorded with the rest, in all processes at the same call.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hamner.errors import UserError


class GraphedBackward:
    """The object records a function that fills the gradients of some parameters, then replays it.

    Args:
        function: takes tensors (or None) of the same shapes at every call, leaves gradients in
            `parameters`, which have none before the call, and never waits for the GPU.
        parameters: all that get a gradient.
        warm_up_calls: that run as they are, before the one that is recorded.

    A call returns what the function returned; tensors in it are overwritten by the next call.

    Raises:
        UserError: from the call that records, if CUDA does not allow it. The process cannot go on
            then: allocator and communicators are left half-way through the recording.
    """

    def __init__(
        self, function: Callable, parameters: Iterable[nn.Parameter], *, warm_up_calls: int
    ) -> None:
        self.function = function
        self.parameters = list(parameters)
        self.warm_up_left = warm_up_calls
        self.graph: torch.cuda.CUDAGraph | None = None
        """replayed by now"""

    def __call__(self, *arguments: Tensor | None):
        """The call gives the function's result; gradients are in the parameters."""
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
        # On the stream of the calls before, which DDP's gradients are tied to; only the default
        # stream cannot be recorded.
        stream = torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():
            stream = None
        try:
            # The loader's thread pins memory meanwhile, and NCCL's looks after messages, which
            # only this thread's recording forbids.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.result = self.function(*arguments)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # What ends a broken recording raises too, and says less than what broke it.
            cause = str(error.__context__ or error).partition("\n")[0]
            raise UserError(
                f"forward and backward could not be recorded as a CUDA graph ({cause}); start with "
                "--no-cuda-graph"
            ) from error
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph
