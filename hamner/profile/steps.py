"""`Steps` takes training steps without a run: profiles and benchmarks have no folder or display."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from hamner.config.train import TrainConfig
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.tokenizer import load_tokenizer
from hamner.parallel.processes import SingleProcess
from hamner.train.step import OnPhase, TrainStep, ignore_phase

LR = 1e-5
"""a step's time does not depend on it"""


class Steps:
    """A context manager holds a `TrainStep` and the run's data, and takes steps as the loop does.

    Args:
        config: the run whose steps are taken; its folder is neither read nor written.
        processes: that train together, each with its `Steps`, which must take the same ones;
            default this one alone.
        on_phase: is told when the phases of `TrainStep` begin, and "data" before a batch is
            fetched.

    Raises:
        UserError: the configuration or the data does not allow it.
    """

    def __init__(
        self,
        config: TrainConfig,
        processes: SingleProcess | None = None,
        on_phase: OnPhase = ignore_phase,
    ) -> None:
        tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
        self.step = TrainStep(config, processes, on_phase=on_phase)
        data = DataConfig(
            specs=config.data,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            val_fraction=config.val_fraction,
        )
        self.loader = TrainLoader(data, tokenizer, pin_memory=self.on_gpu)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_error) -> None:
        self.step.close()
        self.loader.close()

    @property
    def on_gpu(self) -> bool:
        """Whether the steps run on a GPU."""
        return self.step.compute.device.type == "cuda"

    @contextlib.contextmanager
    def launched_one_by_one(self) -> Iterator[bool]:
        """While the context is open, no CUDA graph replays the step; it yields whether one would.

        Afterwards the graph must be recorded anew, which `warm_up` does.
        """
        is_graphed = self.step.is_graphed
        self.step.launch_one_by_one()
        try:
            yield is_graphed
        finally:
            if is_graphed:
                self.step.record_graph()

    def take(self, count: int) -> None:
        """The method takes `count` steps on the run's own data."""
        for _ in range(count):
            self.step.on_phase("data", self.step.optimizer.steps + 1)
            self.step.step(next(self.loader), LR)

    def warm_up(self, count: int) -> None:
        """The method takes `count` steps, and more until a CUDA graph, if any, is recorded."""
        self.take(count)
        while not self.step.is_warm:
            self.take(1)

    def time(self, count: int) -> list[float]:
        """The method measures the milliseconds of each of `count` steps, taken without waiting for
        the GPU between them."""
        return time_calls(lambda: self.take(1), count, on_gpu=self.on_gpu)

    def synchronize(self) -> None:
        """The method waits for the GPU, if there is one."""
        if self.on_gpu:
            torch.cuda.synchronize()


def time_calls(function: Callable[[], object], count: int, *, on_gpu: bool) -> list[float]:
    """The function measures the milliseconds of each of `count` calls; on a GPU they follow each
    other without waiting."""
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
