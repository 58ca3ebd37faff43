"""Looking at a model while it trains: its loss on held-out rows, and samples."""

import math
from collections.abc import Iterator

import torch

from hamner.data.batch import IGNORED_TARGET, Batch
from hamner.data.tokenizer import Tokenizer
from hamner.model.generate import PROMPTS, generate
from hamner.train.step import TrainStep

EVALUATION_TOKENS = 2_048
"""tokens of one forward pass: a step's memory may be reserved by its CUDA graph meanwhile"""


@torch.no_grad()
def validation_loss(step: TrainStep, validation: Batch) -> float | None:
    """The mean cross-entropy over the validation rows, nats per token; None without any.

    Every process must call it, and each takes its part of the rows.
    """
    rows = len(validation.inputs)
    if not rows:
        return None
    size = min(step.plan.micro_batch_size, EVALUATION_TOKENS // step.config.seq_len)
    size = max(1, size)
    total = torch.zeros((), device=step.compute.device)
    # As many pieces for every process: of those beyond the last row nothing is kept.
    pieces = math.ceil(math.ceil(rows / size) / step.world_size) * step.world_size
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
