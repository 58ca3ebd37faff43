"""Runs the batch of a bad step again and says where the first value that is not finite comes from.

The weights are those of the last checkpoint before that step, or, if retention has removed those,
of the first one after it: the exact ones are gone.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hamner.checkpoint.format import find
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.train import TrainConfig
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.parallel.device import cap_memory
from hamner.train import health
from hamner.train.health import StepReading
from hamner.train.setup import choose

EXCERPT_CHARACTERS = 200


@dataclass(frozen=True)
class Replay:
    """What a batch did this time."""

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
    excerpt: str
    """text of the row with the highest loss, or the first that is not finite"""

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

    @property
    def worst_row(self) -> int:
        """The first row without a finite loss, else the one with the highest."""
        return _worst(self.losses)


def replay(config: TrainConfig) -> Replay:
    """Run `config.replay` forward and backward, row by row, without an update.

    Raises:
        UserError: the file or the run's checkpoints cannot be used.
    """
    reading = health.read(config.replay)
    rows, seq_len = reading.batch.inputs.shape
    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    highest = int(max(reading.batch.inputs.max(), reading.batch.targets.max()))
    if seq_len > config.model.max_seq_len or highest >= config.model.vocab_size:
        raise UserError(f"--replay {config.replay} is of another model than {config.folder}")
    # One row at a time: it says which row is bad, and fits wherever training did.
    setup = choose(replace(config, batch_size=rows, seq_len=seq_len, micro_batch_size=1))
    cap_memory(setup.compute, config)
    model = setup.model(config)
    weights = _load_weights(model, config, reading.step)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data = parameter.data.to(setup.compute.dtype)

    blamed: list[str] = []
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: blamed.append(name) if _is_bad(output) else None
        )
        for name, module in model.named_modules()
        if name
    ]
    losses = []
    for row in range(rows):
        part = [
            tensor[row : row + 1].to(setup.compute.device)
            for tensor in (reading.batch.inputs, reading.batch.targets, reading.batch.document_ids)
        ]
        output = model(*part[:2], part[2] if config.document_mask else None)
        (output.loss / rows).backward()
        losses.append(output.cross_entropy.item())
    for hook in hooks:
        hook.remove()
    gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    text = tokenizer.decode(reading.batch.inputs[_worst(losses)].tolist())
    return Replay(
        reading=reading,
        weights=weights,
        losses=losses,
        grad_norm=norm.item(),
        first_module=blamed[0] if blamed else None,
        gradients=health.not_finite(gradients),
        excerpt=text[:EXCERPT_CHARACTERS],
    )


def _load_weights(model: nn.Module, config: TrainConfig, step: int) -> str:
    """Load the weights closest to those of `step`; without any checkpoint the initial ones stay."""
    found = find(RunFolder(config.folder).checkpoints)
    if not found:
        return "the initial weights, as the run has no checkpoint"
    nearest = min(found, key=lambda saved: (saved.step >= step, abs(saved.step - step)))
    nearest.verify()
    nearest.load_model(model.state_dict())
    return f"the weights of {nearest.path}"


def _is_bad(output: Tensor | tuple) -> bool:
    """Whether a module's output has a tensor that is not finite."""
    if isinstance(output, Tensor):
        return output.is_floating_point() and not torch.isfinite(output).all()
    return isinstance(output, tuple) and any(_is_bad(part) for part in output)


def _worst(losses: list[float]) -> int:
    return max(range(len(losses)), key=lambda row: (not math.isfinite(losses[row]), losses[row]))
