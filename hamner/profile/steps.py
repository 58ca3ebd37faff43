"""A `TrainStep` is traced or timed on the data of its run, without the run's folder."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.data.loader import TrainLoader
from hamner.data.tokenizer import load_tokenizer
from hamner.parallel.processes import SingleProcess
from hamner.train.data import open_loader
from hamner.train.initial import find_initial, with_chat_tokens
from hamner.train.step import OnPhase, TrainStep, ignore_phase

LR = 1e-5
"""a step's time does not depend on it"""


@contextlib.contextmanager
def open_steps(
    config: TrainConfig, processes: SingleProcess | None = None, on_phase: OnPhase = ignore_phase
) -> Iterator[tuple[TrainStep, TrainLoader]]:
    """While it is open, a run's steps can be taken on the run's own data.

    Args:
        config: the run whose steps are taken; a plan that does not fit is not replaced by another.
        processes: that train together, each with its step, which must take the same ones; default
            this single one.
        on_phase: see `TrainStep`.

    Raises:
        UserError: the configuration or the data does not allow it.
    """
    initial = find_initial(config)
    if initial:
        tokenizer = initial.tokenizer
    else:
        tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    tokenizer = with_chat_tokens(tokenizer, config)
    weights = initial and initial.checkpoint
    step = TrainStep(config, processes, weights, on_phase, may_step_down=False)
    with (
        contextlib.closing(step),
        contextlib.closing(open_loader(config, tokenizer, is_on_gpu(step))) as loader,
    ):
        yield step, loader


def take(step: TrainStep, batches: Iterator[Batch], count: int) -> None:
    """The function takes `count` steps, as the training loop does."""
    for _ in range(count):
        step.on_phase("data", step.optimizer.steps + 1)
        step.step(next(batches), LR)


def warm_up(step: TrainStep, batches: Iterator[Batch], count: int) -> None:
    """The function takes `count` steps, and those that a CUDA graph needs until it is recorded."""
    take(step, batches, count)
    while not step.is_warm:
        take(step, batches, 1)


def time_steps(step: TrainStep, batches: Iterator[Batch], count: int) -> list[float]:
    """`time_steps` gives the milliseconds of each of `count` steps, between which nothing waits."""
    return time_calls(lambda: take(step, batches, 1), count, on_gpu=is_on_gpu(step))


def time_calls(function: Callable[[], object], count: int, *, on_gpu: bool) -> list[float]:
    """`time_calls` gives each call's milliseconds; on a GPU none waits for the one before."""
    if not on_gpu:
        marks = [time.perf_counter()]
        for _ in range(count):
            function()
            marks.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in zip(marks, marks[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def is_on_gpu(step: TrainStep) -> bool:
    return step.compute.device.type == "cuda"


def synchronize(step: TrainStep) -> None:
    """The function waits for the step's GPU, if it has one."""
    if is_on_gpu(step):
        torch.cuda.synchronize()
