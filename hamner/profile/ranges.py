"""`Ranges` names what a step does while it is traced: its phases, and its modules both ways.

Ranges appear in torch-profiler's trace and, as NVTX ranges, in Nsight Systems and Nsight Compute.
They are opened, and hooks put into the model, only while a capture runs: steps taken before and
after it pay one call that returns at once.
"""

import contextlib
from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from hamner.model.transformer import Attention, DenseMLP, MoEMLP
from hamner.train.step import TrainStep

MODULES = (nn.Embedding, Attention, DenseMLP, MoEMLP)
"""those that get a range of their own"""


@cache
def _has_gpu() -> bool:
    # Asked at every range, and not cheap in torch.
    return torch.cuda.is_available()


class Ranges:
    """An observer of a step's phases (`hamner.train.step.OnPhase`) gives each a range of its own.

    A phase stays open until the next one: "data" therefore includes the first copies to the GPU.
    """

    def __init__(self) -> None:
        self._phase: contextlib.ExitStack | None = None

    def __call__(self, phase: str, step: int) -> None:
        """The phase before ends; this one begins, unless it is ""."""
        if self._phase is not None:
            self._phase.close()
            if phase:
                self._phase.enter_context(_range(phase))

    @contextlib.contextmanager
    def named(self, step: TrainStep) -> Iterator[None]:
        """While it is open, the step's phases have names, and its modules if hooks are called."""
        # Hooks would break a compiled model's graph into pieces, and a CUDA graph calls none.
        has_modules = not (step.is_graphed or step.config.compile)
        modules = _named_modules(step.model) if has_modules else contextlib.nullcontext()
        with modules, contextlib.ExitStack() as self._phase:
            try:
                yield
            finally:
                self._phase = None


@contextlib.contextmanager
def _named_modules(model: nn.Module) -> Iterator[None]:
    """Each of MODULES has a range in forward, and in backward one of NVTX, on autograd's thread.

    In backward a module's range begins when its output's gradient is there and ends where the next
    one begins. torch-profiler gets none of them: they would begin inside one of its operations and
    end inside another.
    """
    forward: list[contextlib.AbstractContextManager] = []
    is_in_backward = False

    def before(name: str, _module, _args) -> None:
        forward.append(_range(name))
        forward[-1].__enter__()

    def after(name: str, _module, _args, output) -> None:
        forward.pop().__exit__(None, None, None)
        first = output[0] if isinstance(output, tuple) else output
        if _has_gpu() and first.requires_grad:
            first.register_hook(partial(begin_backward, name))

    def begin_backward(name: str, _gradient: Tensor) -> None:
        nonlocal is_in_backward
        if is_in_backward:
            torch.cuda.nvtx.range_pop()
        torch.cuda.nvtx.range_push(f"{name} backward")
        is_in_backward = True

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, MODULES):
                hooks.enter_context(module.register_forward_pre_hook(partial(before, name)))
                hooks.enter_context(module.register_forward_hook(partial(after, name)))
        yield


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    with record_function(name):
        if _has_gpu():
            torch.cuda.nvtx.range_push(name)
        yield
        if _has_gpu():
            torch.cuda.nvtx.range_pop()
