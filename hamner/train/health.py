"""A long run notices its own bad steps, loss spikes, starved experts and hangs.

A bad step has no finite loss or gradient: the update is skipped on the device, its batch is kept,
and after `MOST_IN_A_ROW` the run stops with a diagnosis.

    RUN/bad_steps/step_00001234.safetensors    inputs, targets (B, T) int64, document_ids (B, T)
                                               int32; step, tokens, lr, loss, grad_norm as text
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hamner.config.model import ModelConfig
from hamner.data.batch import Batch
from hamner.errors import UserError
from hamner.files import usual_permissions

MOST_IN_A_ROW = 5
"""bad steps, after which training stops"""
MOST_KEPT = 20
"""batches on disk: a run that skips every other step must not fill it"""
_FACTS = {"step": int, "tokens": int, "lr": float, "loss": float, "grad_norm": float}


@dataclass(frozen=True)
class StepReading:
    """A reading says what one step turned out to be."""

    step: int
    tokens: int
    """trained when it was done"""
    lr: float
    batch: Batch
    loss: float = math.nan
    """cross-entropy, nats per token"""
    grad_norm: float = math.nan
    """global, before clipping"""

    @property
    def is_bad(self) -> bool:
        """A step is bad if its loss or gradient was not finite: its update was skipped."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))


class StepHealth:
    """The detector counts bad steps in a row and finds loss spikes among the good ones."""

    WINDOW = 128
    LEAST = 32
    """losses before anything is judged"""
    THRESHOLD = 6.0
    LEAST_DEVIATION = 1e-3
    """nats per token; a run that has converged does not spike in the last digits"""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.WINDOW)
        """the last losses that were finite"""
        self.bad_in_a_row = 0
        self.diverged: StepReading | None = None
        """the bad step after which the run stops"""

    def judge(self, reading: StepReading) -> float | None:
        """The method gives the z-score of a step whose loss is a spike; None for any other step."""
        if not reading.is_bad:
            self.bad_in_a_row = 0
            return self.score(reading.loss)
        self.bad_in_a_row += 1
        if self.bad_in_a_row == MOST_IN_A_ROW:
            self.diverged = reading
        return None

    def score(self, loss: float) -> float | None:
        """The method gives the z-score if this finite loss is far above the recent ones, else None;
        it then counts as recent.

        The score is the robust z-score (Iglewicz & Hoaglin 1993): the distance from the median of
        the last `WINDOW` losses in units of 1.4826 x their median absolute deviation, which equals
        the standard deviation of a normal distribution and which a few spikes do not move.
        """
        score = None
        if len(self.recent) >= self.LEAST:
            losses = torch.tensor(self.recent, dtype=torch.float64)
            median = losses.median()
            deviation = 1.4826 * (losses - median).abs().median().item()
            score = (loss - median.item()) / max(deviation, self.LEAST_DEVIATION)
        self.recent.append(loss)
        return score if score is not None and score > self.THRESHOLD else None

    def state_dict(self) -> dict:
        return {"recent_losses": list(self.recent)}

    def load_state_dict(self, state: dict) -> None:
        self.recent.extend(state["recent_losses"])


def keep(folder: Path, reading: StepReading) -> str:
    """`keep` writes the batch of a bad step for `--replay`; a clause says where, or why not.

    Never raises for what a disk can do: the run goes on.
    """
    path = folder / f"step_{reading.step:08d}.safetensors"
    if folder.is_dir() and sum(1 for _ in folder.glob("step_*.safetensors")) >= MOST_KEPT:
        return f"its batch is not kept, {MOST_KEPT} are in {folder} already"
    facts = {name: str(getattr(reading, name)) for name in _FACTS}
    try:
        folder.mkdir(exist_ok=True)
        with usual_permissions(path):
            save_file(vars(reading.batch), path, metadata=facts)
    except (OSError, SafetensorError) as error:
        return f"its batch could not be written to {path} ({error})"
    return f"its batch is in {path}, see --replay"


def read(path: Path) -> StepReading:
    """`read` gives what `keep` wrote.

    Raises:
        UserError: not such a file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as saved:
            facts = saved.metadata() or {}
            batch = Batch(*(saved.get_tensor(field.name) for field in fields(Batch)))
        numbers = {name: number(facts[name]) for name, number in _FACTS.items()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"--replay {path} is not the batch of a bad step ({error}); give a file of "
            "RUN/bad_steps"
        ) from error
    shapes = {tensor.shape for tensor in vars(batch).values()}
    if len(shapes) != 1 or batch.inputs.ndim != 2:
        raise UserError(f"--replay {path}: inputs, targets and document_ids differ in shape")
    return StepReading(batch=batch, **numbers)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The function names the tensors with a value that is not finite, and waits for the GPU."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def diagnose(last: StepReading, non_finite: list[str]) -> str:
    """The sentences say why a run stopped itself, and what to do.

    Args:
        last: of the bad steps in a row.
        non_finite: tensors of the state that are not finite.
    """
    what = (
        f"{MOST_IN_A_ROW} steps in a row had no finite loss or gradient (step {last.step:,}: loss "
        f"{last.loss}, gradient norm {last.grad_norm}, learning rate {last.lr:.2e}). "
    )
    if non_finite:
        return f"{what}The state itself{describe_lost(non_finite)}."
    return what + (
        "The weights are finite, as those steps left them alone, so the cause is in the batches or "
        "in an operation: --replay a file of bad_steps says where, also with --kernels torch or "
        "--precision fp32; --resume goes on behind these batches."
    )


def describe_lost(non_finite: list[str]) -> str:
    """The rest of a sentence about the state says that it was not saved, and what to do."""
    return (
        f" is not finite in {len(non_finite)} tensors, among them {non_finite[0]}, so it was not "
        "saved: go on from the last good checkpoint with --resume and a lower --lr or --grad-clip"
    )


class StarvationDetector:
    """The detector finds experts below a quarter of their fair share, 1 / experts, for 200 steps.

    Each is reported once. An interval counts for an expert when its mean load is that low.

    Args:
        model: shape of a mixture of experts.
    """

    LEAST_SHARE = 0.25
    """of the fair share"""
    STEPS = 200

    def __init__(self, model: ModelConfig) -> None:
        self.threshold = self.LEAST_SHARE / model.num_experts
        self.low_steps = [[0] * model.num_experts for _ in range(model.num_layers)]
        """by layer and expert: steps in a row with a low load"""
        self.reported = [[False] * model.num_experts for _ in range(model.num_layers)]

    def starved(self, load: list[list[float]], steps: int) -> list[tuple[int, int, float]]:
        """The method finds experts that are now low for long enough, each for the first time.

        Args:
            load: by layer and expert, mean over an interval.
            steps: of the interval.

        Returns:
            Layer, expert and its share of the layer's assignments in the interval.
        """
        found = []
        for layer, shares in enumerate(load):
            for expert, share in enumerate(shares):
                low = self.low_steps[layer]
                low[expert] = low[expert] + steps if share < self.threshold else 0
                if low[expert] >= self.STEPS and not self.reported[layer][expert]:
                    self.reported[layer][expert] = True
                    found.append((layer, expert, share))
        return found

    def state_dict(self) -> dict:
        return {
            "low_steps": [list(row) for row in self.low_steps],
            "told": [list(row) for row in self.reported],
        }

    def load_state_dict(self, state: dict) -> None:
        self.low_steps, self.reported = state["low_steps"], state["told"]


class Watchdog:
    """The context expects `beat` at least every `minutes`.

    A thread counts its own wake-ups since the last beat, so that the time in which the process is
    stopped (Ctrl-Z, a paused container) does not count.

    Args:
        minutes: without a beat that count as a hang; 0 never does.
        stacks: file for the stacks; it stays only if something was written.
        on_hang: called in a thread of its own, once a hang, with whether the training thread is
            inside `waiting` (and is kept there until the call returns).
    """

    TICK_SECONDS = 0.25
    """longest between two looks"""
    PATIENCE_TICKS = 5
    """from the stacks to `on_hang`: other processes, which it may end, write theirs meanwhile"""
    LEAST_LOCKED_SECONDS = 1.0
    """without the interpreter's lock, after which it counts as never given back"""

    def __init__(self, minutes: float, stacks: Path, on_hang: Callable[[bool], None]) -> None:
        self.seconds, self.stacks, self.on_hang = 60 * minutes, stacks, on_hang
        self.beats = 0
        self._at_work = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hamner-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._at_work.acquire()
        if self.seconds:
            kind = {"encoding": "utf-8", "errors": "backslashreplace"}
            try:
                self._file = self.stacks.open("a", **kind)
            except OSError:  # then the stacks go where Python's own errors do
                self._file = os.fdopen(os.dup(2), "w", **kind)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.seconds:
            self._stop.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):
                self._file.close()
                if not self.stacks.stat().st_size:
                    self.stacks.unlink()
        self._at_work.release()

    def beat(self) -> None:
        """A step has ended."""
        self.beats += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """In this context the training thread waits with its state whole, as between steps."""
        self._at_work.release()
        try:
            yield
        finally:
            self._at_work.acquire()

    def _watch(self) -> None:
        """The thread looks for beats until it is stopped."""
        tick = min(self.TICK_SECONDS, self.seconds / 20)
        limit = math.ceil(self.seconds / tick)
        seen = ticks = 0
        while True:
            # A call that never gives the interpreter's lock back keeps this thread from running.
            # Then only faulthandler can write, without the lock. It is the last resort: if another
            # thread does run, it may read frames that are freed, and crash. So it does not repeat:
            # a stop of the process that is longer brings it about too, as its clock goes on.
            locked = max(self.seconds, self.LEAST_LOCKED_SECONDS)
            faulthandler.dump_traceback_later(locked, file=self._file.fileno())
            if self._stop.wait(tick):
                return
            beats = self.beats
            ticks = ticks + 1 if beats == seen else 0
            seen = beats
            if ticks and ticks % limit == 0:
                # Nobody waits for it: the disk may be what hangs.
                threading.Thread(target=self._write, args=(_stacks(),), daemon=True).start()
            # The stacks come first: the call may let the training thread go on.
            if ticks == limit + self.PATIENCE_TICKS:
                faulthandler.cancel_dump_traceback_later()
                self._report()

    def _write(self, stacks: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed, as the run has ended
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.write(f"{now}: no step for {self.seconds / 60:g} minutes\n{stacks}\n")
            self._file.flush()

    def _report(self) -> None:
        is_waiting = self._at_work.acquire(blocking=False)
        try:
            self.on_hang(is_waiting)
        finally:
            if is_waiting:
                self._at_work.release()


def _stacks() -> str:
    """The function says what every thread does, without a look at the source files: their disk may
    be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, top in sys._current_frames().items():
        lines.append(f"Thread {names.get(ident, ident)} (most recent call first):")
        for frame, line in traceback.walk_stack(top):
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {line} in {code.co_name}')
    return "\n".join(lines)
