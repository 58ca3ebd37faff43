"""A trainer's steps without its run: for profiles and benchmarks, which write no run folder."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hamner.checkpoint.run_folder import RunFolder
from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.parallel.processes import SingleProcess
from hamner.profile.ranges import Phases
from hamner.train.cuda_graph import GraphedBackward
from hamner.train.loop import Trainer

LR = 1e-5
"""a step's time does not depend on it"""


class _NeverInterrupted:
    requested = False


class Steps:
    """Builds a trainer and takes steps, exactly as the loop does. A context manager.

    Args:
        config: the run whose steps are taken; nothing is written to its run folder.
        processes: that train together, each with its `Steps`, which must take the same ones;
            default this one alone.

    Raises:
        UserError: the configuration or the data does not allow it.
    """

    def __init__(self, config: TrainConfig, processes: SingleProcess | None = None) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name)
        # Its folder goes when the steps are over, and no step reads validation rows.
        config = replace(config, run_dir=folder, resume=False, report_to=(), eval_tokens=1)
        try:
            self.trainer = Trainer(config, RunFolder(folder), processes=processes)
        except BaseException:
            self._scratch.cleanup()
            raise

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_error) -> None:
        self.trainer.close()
        self._scratch.cleanup()

    @property
    def on_gpu(self) -> bool:
        """Whether the steps run on a GPU."""
        return self.trainer.compute.device.type == "cuda"

    @contextlib.contextmanager
    def launched_one_by_one(self) -> Iterator[bool]:
        """While open, no CUDA graph replays the step. Yields whether one would."""
        trainer = self.trainer
        as_trained = trainer.micro_step
        trainer.micro_step = trainer.forward_backward
        try:
            yield as_trained != trainer.forward_backward
        finally:
            trainer.micro_step = as_trained

    def step(self, batch: Batch, lr: float = LR) -> Tensor:
        """One optimizer step; returns its mean cross-entropy, 0-d on the device."""
        trainer = self.trainer
        trainer.train_step(batch, lr, _NeverInterrupted())
        trainer.step += 1
        return trainer.step_loss

    def take(self, count: int, phases: Phases | None = None) -> None:
        """`count` steps on the run's own data."""
        for _ in range(count):
            if phases is not None:
                phases.enter("data")
            self.trainer.train_step(next(self.trainer.loader), LR, _NeverInterrupted())
            self.trainer.step += 1

    def warm_up(self, count: int) -> None:
        """`count` steps, and those that a CUDA graph needs beyond them until it is recorded."""
        self.take(count)
        micro_step = self.trainer.micro_step
        while isinstance(micro_step, GraphedBackward) and not micro_step.is_recorded:
            self.take(1)

    def time(self, count: int) -> list[float]:
        """Milliseconds of each of `count` steps, taken without waiting for the GPU between them."""
        return time_calls(lambda: self.take(1), count, on_gpu=self.on_gpu)

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.on_gpu:
            torch.cuda.synchronize()


def time_calls(function: Callable[[], object], count: int, *, on_gpu: bool) -> list[float]:
    """Milliseconds of each of `count` calls; on a GPU one after the other without waiting."""
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
