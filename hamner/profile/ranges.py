"""Names what a step does while it is traced: its phases, and its modules forward and backward.

Ranges appear in torch-profiler's trace and, as NVTX ranges, in Nsight Systems and Nsight Compute.
They are put around a trainer's functions and into its model's hooks only while a capture runs:
training pays nothing for them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from hamner.model.transformer import Attention, DenseMLP, MoEMLP
from hamner.train.loop import Trainer

MODULES = (nn.Embedding, Attention, DenseMLP, MoEMLP)
"""those that get a range of their own"""


@functools.cache
def _has_gpu() -> bool:
    # Asked at every range, and not cheap in torch.
    return torch.cuda.is_available()


class Phases:
    """The phases of a step, one after the other: each `enter` ends the one before."""

    def __init__(self) -> None:
        self._current = contextlib.ExitStack()

    def enter(self, name: str | None) -> None:
        """Begin a phase; None only ends the current one."""
        self._current.close()
        if name is not None:
            self._current.enter_context(_range(name))


@contextlib.contextmanager
def named(trainer: Trainer) -> Iterator[Phases]:
    """Name the phases and, unless the model is compiled or a CUDA graph, the modules of steps.

    Yields:
        The phases, for what the caller does beside `Trainer.train_step`. A phase stays open until
        the next one: "data" therefore includes the copies to the GPU.
    """
    phases = Phases()
    with contextlib.ExitStack() as marks:
        if trainer.micro_step == trainer.forward_backward:
            marks.enter_context(_around(trainer, "forward", phases, "forward", then="backward"))
            # Hooks would break a compiled graph into pieces.
            if not trainer.config.compile:
                marks.enter_context(_named_modules(trainer.model))
        else:
            marks.enter_context(_around(trainer, "micro_step", phases, "graph"))
        marks.enter_context(_around(trainer.optimizer, "accumulate", phases, "accumulate"))
        marks.enter_context(_around(trainer.optimizer, "step", phases, "optimizer"))
        yield phases
    phases.enter(None)


@contextlib.contextmanager
def _around(
    owner: object, attribute: str, phases: Phases, phase: str, then: str | None = None
) -> Iterator[None]:
    """While open, calls of `owner.attribute` are `phase`, and what follows them is `then`."""
    function = getattr(owner, attribute)

    def wrapped(*args, **kwargs):
        phases.enter(phase)
        result = function(*args, **kwargs)
        phases.enter(then)
        return result

    setattr(owner, attribute, wrapped)
    try:
        yield
    finally:
        setattr(owner, attribute, function)


@contextlib.contextmanager
def _named_modules(model: nn.Module) -> Iterator[None]:
    """A range for each of MODULES in forward; in backward NVTX ranges, which need not nest."""
    handles = []
    backward = _BackwardRanges()
    for name, module in model.named_modules():
        if isinstance(module, MODULES):
            handles += _hooks(module, name, backward)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(module: nn.Module, name: str, backward: "_BackwardRanges") -> Iterator:
    opened: list[contextlib.AbstractContextManager] = []

    def before(_module, _args) -> None:
        opened.append(_range(name))
        opened[-1].__enter__()

    def after(_module, _args, output) -> None:
        opened.pop().__exit__(None, None, None)
        first = output[0] if isinstance(output, tuple) else output
        if _has_gpu() and first.requires_grad:
            first.register_hook(backward.begin(name))

    return iter((module.register_forward_pre_hook(before), module.register_forward_hook(after)))


class _BackwardRanges:
    """NVTX ranges on the autograd thread: a module's begins when its output's gradient is there.

    It ends where the next one begins. torch-profiler gets none of them: they would begin inside one
    of its operations and end inside another.
    """

    def __init__(self) -> None:
        self._is_open = False

    def begin(self, name: str) -> Callable[[Tensor], None]:
        """A gradient hook."""

        def hook(_gradient: Tensor) -> None:
            if self._is_open:
                torch.cuda.nvtx.range_pop()
            torch.cuda.nvtx.range_push(f"{name} backward")
            self._is_open = True

        return hook


@contextlib.contextmanager
def _range(name: str) -> Iterator[None]:
    with record_function(name):
        if _has_gpu():
            torch.cuda.nvtx.range_push(name)
        yield
        if _has_gpu():
            torch.cuda.nvtx.range_pop()
