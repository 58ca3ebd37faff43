"""A model is looked at while it trains: its loss on held-out rows, samples, and what decides that
more training no longer helps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hamner.data.batch import IGNORED_TARGET, Batch
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.model.generate import PROMPTS, generate
from hamner.plan.memory import evaluation_bytes
from hamner.progress import SILENT, Status, Task
from hamner.train.interrupt import Interrupt
from hamner.train.log import TrainLog
from hamner.train.saves import Progress
from hamner.train.step import TrainStep

MIN_TOKENS = 2_048
"""of one forward pass on a GPU: there is always memory for so many"""
MAX_TOKENS = 32_768
"""of one forward pass: a GPU gains nothing from more, and an interrupt waits for its end"""


def tokens_per_pass(step: TrainStep) -> int:
    """The function gives the tokens of one forward pass: without gradients a pass has room for many
    micro-batches, but what a CUDA graph has reserved is not free meanwhile."""
    compute, account = step.compute, step.plan.account
    held = account.total
    if not step.is_graphed:
        held = account.weights + account.optimizer + account.gradients + account.gradient_sums
    # A CPU has the same bound as in training, for the same reasons.
    maximum, minimum = compute.max_micro_batch_tokens or MAX_TOKENS, step.config.seq_len
    if compute.device.type == "cuda":
        minimum = max(minimum, MIN_TOKENS)
    tokens = max(maximum, minimum)
    how = {"precision": compute.precision, "fused": compute.kernels == "triton"}
    room = compute.budget_bytes - held
    while tokens > minimum and evaluation_bytes(step.config.model, tokens, **how) > room:
        tokens = max(minimum, tokens // 2)
    return step.processes.all_reduce_min(tokens)


def validation_loss(
    step: TrainStep,
    validation: Batch,
    is_stopped: Callable[[], bool] = lambda: False,
    status: Status = SILENT,
) -> float | None:
    """The function gives the mean cross-entropy over the validation rows, nats per token; None
    without any, or if it is abandoned.

    Every process must call it, and each takes its part of the rows.

    Args:
        is_stopped: asked before each forward pass; one process's yes abandons it in all.
        status: shows the rows of this process.
    """
    rows, world_size = len(validation.inputs), step.processes.rank.world_size
    size = tokens_per_pass(step) // step.config.seq_len
    size = max(1, min(size, math.ceil(rows / world_size)))
    while rows:
        try:
            with status.task("evaluating", math.ceil(rows / world_size), "rows") as task:
                return _mean_loss(step, validation, size, is_stopped=is_stopped, task=task)
        except torch.OutOfMemoryError:
            # Of several processes, the others are in the midst of their passes.
            if size == 1 or world_size > 1:
                raise
        size //= 2  # out of the handler, whose error keeps the pass's memory
    return None


@torch.no_grad()
def _mean_loss(
    step: TrainStep,
    validation: Batch,
    size: int,
    *,
    is_stopped: Callable[[], bool],
    task: Task,
) -> float | None:
    """The function is `validation_loss` with `size` rows in a pass."""
    rows = len(validation.inputs)
    total = torch.zeros((), device=step.compute.device)
    # As many pieces for every process: of those beyond the last row nothing is kept.
    world_size = step.processes.rank.world_size
    pieces = math.ceil(math.ceil(rows / size) / world_size) * world_size
    with step.engine.inference(step.model):
        starts = step.processes.share(range(0, pieces * size, size))
        for start in starts:
            if step.processes.any(is_stopped()):
                return None
            part = slice(min(start, rows - 1), start + size)
            kept = int((validation.targets[start : part.stop] != IGNORED_TARGET).sum())
            output = step.model(*step.to_device(validation, part))
            total += output.cross_entropy * kept
            task.advance(size)
    step.processes.sum_(total)
    kept = int((validation.targets != IGNORED_TARGET).sum())
    return total.item() / max(1, kept)


@dataclass
class EarlyStopping:
    """The validation loss decides when a run should stop.

    Args:
        patience: evaluations without a better loss after which the run should stop; 0 never stops
            it and looks for no best one.
    """

    patience: int
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0

    def improved(self, step: int, val_loss: float | None) -> bool:
        """The answer is whether an evaluation's loss (None without validation data) is the best."""
        if not self.patience or val_loss is None:
            return False
        # A loss that is not a number is no improvement either.
        if val_loss < (math.inf if self.best_loss is None else self.best_loss):
            self.best_loss, self.best_step, self.evaluations_since_best = val_loss, step, 0
            return True
        self.evaluations_since_best += 1
        return False

    @property
    def exhausted(self) -> bool:
        """The run should stop once its patience is."""
        return 0 < self.patience <= self.evaluations_since_best

    def state_dict(self) -> dict:
        """The state is also for `checkpoint.best`."""
        return {name: value for name, value in vars(self).items() if name != "patience"}

    def load_state_dict(self, state: dict) -> None:
        """An older checkpoint has no such state, and the patience may be another."""
        vars(self).update({name: state[name] for name in self.state_dict() if name in state})


class Inspector:
    """The inspector measures the validation loss and takes samples while a model trains.

    An interrupt abandons either, and in a single process an error ends nothing. Several processes
    make their passes together: what fails in one of them ends the job, unless it fails in all.

    Args:
        log: of the run; its clock stands still meanwhile.
        progress: gets the loss.
        early_stopping: judges it.
        interrupt: abandons what is under way.
        validation: rows held out.
        tokenizer: of the run.
    """

    def __init__(
        self,
        log: TrainLog,
        *,
        progress: Progress,
        early_stopping: EarlyStopping,
        interrupt: Interrupt,
        validation: Batch,
        tokenizer: Tokenizer,
    ) -> None:
        self.log, self.step, self.progress = log, log.train_step, progress
        self.early_stopping, self.interrupt = early_stopping, interrupt
        self.validation, self.tokenizer = validation, tokenizer
        self.is_single = self.step.processes.rank.world_size == 1

    def evaluate(self) -> bool:
        """The validation loss is measured; the answer is whether it is the best so far."""
        progress, loss = self.progress, None
        self.log.pause()
        self.step.on_phase("evaluation", progress.step)
        kinds, then = Exception if self.is_single else (), "the run goes on without this loss"
        with self.log.beside("the evaluation", kinds, then=then):
            shown = self.log.display.status
            loss = validation_loss(self.step, self.validation, self._is_stopped, shown)
        self.step.on_phase("", progress.step)
        self.log.watch.start()
        if loss is None:
            return False
        progress.val_loss, progress.val_step = loss, progress.step
        return self.early_stopping.improved(progress.step, loss)

    def sample(self) -> None:
        """The fixed prompts are continued and the texts kept."""
        self.log.pause()
        kinds = BaseException if self.is_single else UserError
        with self.log.display.status.task("sampling", len(PROMPTS), "prompts") as task:
            for prompt in PROMPTS:
                if self.step.processes.any(self._is_stopped()):
                    break
                with self.log.beside("sampling", kinds, then="samples that fail are left out"):
                    self._sample(prompt)
                task.advance()
        self.log.watch.start()

    def _sample(self, prompt: str) -> None:
        # Several processes must take as many tokens: they only look between prompts.
        is_stopped = self._is_stopped if self.is_single else lambda: False
        with self.step.engine.inference(self.step.model):
            seed = self.log.config.seed
            text = generate(
                self.step.model, self.tokenizer, prompt, seed=seed, is_stopped=is_stopped
            )
        if is_stopped():
            return
        when = {"step": self.progress.step, "tokens": self.progress.tokens}
        self.log.append(self.log.samples, {**when, "prompt": prompt, "text": text})
        self.log.display.message(f"sample: {prompt}{text}".replace("\n", " "))

    def _is_stopped(self) -> bool:
        return self.interrupt.requested
