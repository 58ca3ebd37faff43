"""The batch of a bad step runs again, to say where the first value that is not finite comes from.

The weights are those of the last checkpoint before that step, or, if retention has removed those,
of the first one after it: the exact ones are gone.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hamner.checkpoint.format import Checkpoint, find
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.train import health
from hamner.train.health import StepReading
from hamner.train.int8_guard import Int8Guard
from hamner.train.step import TrainStep

EXCERPT_CHARACTERS = 200


@dataclass(frozen=True)
class Replay:
    """A replay says what a batch did this time."""

    reading: StepReading
    """as it was in the run"""
    weights: str
    """where the weights of this time came from"""
    losses: list[float]
    """cross-entropy of each row, nats per token"""
    grad_norm: float
    first_module: str | None
    """the first module in the order of the forward pass whose output was not finite"""
    gradients: list[str]
    """parameters whose gradient was not finite"""
    worst_row: int
    """the first row without a finite loss, else the one with the highest"""
    excerpt: str
    """its text"""

    def __str__(self) -> str:
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        bad_rows = [row for row, loss in enumerate(self.losses) if not math.isfinite(loss)]
        lines = [
            f"step {self.reading.step:,} in the run: loss {self.reading.loss}, gradient norm "
            f"{self.reading.grad_norm}, learning rate {self.reading.lr:.2e}",
            f"now, with {self.weights}: gradient norm {self.grad_norm:.4g}",
        ]
        if finite:
            lines.append(f"loss of the rows: {min(finite):.4f} to {max(finite):.4f}")
        if bad_rows:
            lines.append(f"rows without a finite loss: {', '.join(map(str, bad_rows))}")
        if self.first_module:
            lines.append(f"first output that is not finite: {self.first_module}")
        if self.gradients:
            lines.append(
                f"{len(self.gradients)} parameters have a gradient that is not finite, among them "
                f"{self.gradients[0]}"
            )
        if not (bad_rows or self.first_module or self.gradients):
            lines.append(
                "everything is finite this time: the cause was in the weights of that step, or "
                "passing"
            )
        lines.append(f"text of row {self.worst_row}: {self.excerpt!r}")
        return "\n".join(lines)


def replay(config: TrainConfig) -> Replay:
    """The function runs `config.replay` forward and backward, row by row, without an update.

    Raises:
        UserError: the file or the run's checkpoints cannot be used.
    """
    reading = health.read(config.replay)
    rows, seq_len = reading.batch.inputs.shape
    tokenizer = RunFolder(config.folder).open_tokenizer(config)
    highest = int(max(reading.batch.inputs.max(), reading.batch.targets.max()))
    if seq_len > config.model.max_seq_len or highest >= config.model.vocab_size:
        raise UserError(f"--replay {config.replay} is of another model than {config.folder}")
    nearest = _nearest_checkpoint(config, reading.step)
    # One row at a time: it says which row is bad, and fits wherever training did.
    one_row = replace(config, batch_size=rows, seq_len=seq_len, micro_batch_size=1)
    step = TrainStep(one_row, initial=nearest)
    guard = Int8Guard(step.model.int8)
    guard.load_state_dict(nearest.state() if nearest else {})
    step.fall_back(guard.due(reading.step))

    blamed: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: blamed.append(name) if _is_bad(output) else None
        )
        for name, module in step.model.named_modules()
        if name
    ]
    losses = []
    for row in range(rows):
        output = step.model(*step.to_device(reading.batch, slice(row, row + 1)))
        (output.loss / rows).backward()
        losses.append(output.cross_entropy.item())
    for hook in hooks:
        hook.remove()
    parameters = step.optimizer.parameters
    gradients = {name: p.grad.float() for name, p in parameters.items() if p.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    worst = max(range(rows), key=lambda row: (not math.isfinite(losses[row]), losses[row]))
    return Replay(
        reading=reading,
        weights=f"the weights of {nearest.path}"
        if nearest
        else "the initial weights, as the run has no checkpoint",
        losses=losses,
        grad_norm=norm.item(),
        first_module=blamed[0] if blamed else None,
        gradients=health.not_finite(gradients),
        worst_row=worst,
        excerpt=tokenizer.decode(reading.batch.inputs[worst].tolist())[:EXCERPT_CHARACTERS],
    )


def _nearest_checkpoint(config: TrainConfig, step: int) -> Checkpoint | None:
    """The function finds the checkpoint closest to `step`, if there is any; without, the initial
    weights stay."""
    found = find(RunFolder(config.folder).checkpoints)
    nearest = min(found, key=lambda s: (s.step >= step, abs(s.step - step)), default=None)
    if nearest is not None:
        nearest.verify()
    return nearest


def _is_bad(output: Tensor | tuple) -> bool:
    """The answer is whether a module's output has a tensor that is not finite."""
    if isinstance(output, Tensor):
        return output.is_floating_point() and not torch.isfinite(output).all()
    return isinstance(output, tuple) and any(_is_bad(part) for part in output)
