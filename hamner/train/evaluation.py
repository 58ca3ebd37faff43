"""A model is looked at while it trains: its loss on held-out rows, samples, and what decides that
more training no longer helps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hamner.data.batch import IGNORED_TARGET, Batch
from hamner.data.tokenizer import Tokenizer
from hamner.model.generate import PROMPTS, generate
from hamner.train.step import TrainStep

EVALUATION_TOKENS = 2_048
"""tokens of one forward pass: a step's memory may be reserved by its CUDA graph meanwhile"""


@torch.no_grad()
def validation_loss(step: TrainStep, validation: Batch) -> float | None:
    """The function gives the mean cross-entropy over the validation rows, nats per token; None
    without any.

    Every process must call it, and each takes its part of the rows.
    """
    rows = len(validation.inputs)
    if not rows:
        return None
    size = min(step.plan.micro_batch_size, EVALUATION_TOKENS // step.config.seq_len)
    size = max(1, size)
    total = torch.zeros((), device=step.compute.device)
    # As many pieces for every process: of those beyond the last row nothing is kept.
    world_size = step.processes.rank.world_size
    pieces = math.ceil(math.ceil(rows / size) / world_size) * world_size
    with step.engine.inference(step.model):
        for start in step.processes.share(range(0, pieces * size, size)):
            part = slice(min(start, rows - 1), start + size)
            kept = int((validation.targets[start : part.stop] != IGNORED_TARGET).sum())
            output = step.model(*step.to_device(validation, part))
            total += output.cross_entropy * kept
    step.processes.sum_(total)
    kept = int((validation.targets != IGNORED_TARGET).sum())
    return total.item() / max(1, kept)


def samples(step: TrainStep, tokenizer: Tokenizer, seed: int) -> Iterator[tuple[str, str]]:
    """The iterator gives each fixed prompt and how the model continues it."""
    for prompt in PROMPTS:
        with step.engine.inference(step.model):
            yield prompt, generate(step.model, tokenizer, prompt, seed=seed)


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
