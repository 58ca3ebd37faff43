"""Steps without a finite loss or gradient: their batches on disk, and what to say after too many.

RUN/bad_steps/step_00001234.safetensors    inputs, targets (B, T) int64, document_ids (B, T)
                                           int32; step, tokens, lr, loss, grad_norm as text
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hamner.data.batch import Batch
from hamner.errors import UserError
from hamner.train.step_monitor import StepReading

MOST_IN_A_ROW = 5
"""bad steps, after which training stops"""
MOST_KEPT = 20
"""batches on disk: a run that skips every other step must not fill it"""
_TENSORS = ("inputs", "targets", "document_ids")


def keep(folder: Path, reading: StepReading) -> str:
    """Write the batch of a bad step for `--replay`; returns a clause that says where, or why not.

    Never raises for what a disk can do: the run goes on.
    """
    path = folder / f"step_{reading.step:08d}.safetensors"
    if folder.is_dir() and sum(1 for _ in folder.glob("step_*.safetensors")) >= MOST_KEPT:
        return f"its batch is not kept, {MOST_KEPT} are in {folder} already"
    facts = {name: str(getattr(reading, name)) for name in ("step", "tokens", "lr", "loss")}
    facts["grad_norm"] = str(reading.grad_norm)
    try:
        folder.mkdir(exist_ok=True)
        save_file({name: getattr(reading.batch, name) for name in _TENSORS}, path, metadata=facts)
    except (OSError, SafetensorError) as error:
        return f"its batch could not be written to {path} ({error})"
    return f"its batch is in {path}, see --replay"


def read(path: Path) -> StepReading:
    """Read what `keep` wrote.

    Raises:
        UserError: not such a file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as saved:
            facts = saved.metadata() or {}
            batch = Batch(**{name: saved.get_tensor(name) for name in _TENSORS})
        reading = StepReading(
            step=int(facts["step"]),
            tokens=int(facts["tokens"]),
            lr=float(facts["lr"]),
            loss=float(facts["loss"]),
            grad_norm=float(facts["grad_norm"]),
            batch=batch,
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"--replay {path} is not the batch of a bad step ({error}); give a file of "
            "RUN/bad_steps"
        ) from error
    shapes = {getattr(batch, name).shape for name in _TENSORS}
    if len(shapes) != 1 or batch.inputs.ndim != 2:
        raise UserError(f"--replay {path}: inputs, targets and document_ids differ in shape")
    return reading


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with a value that is not finite. Waits for the GPU."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def diagnose(last: StepReading, poisoned: list[str]) -> str:
    """Why a run stopped itself, and what to do.

    Args:
        last: of the bad steps in a row.
        poisoned: tensors of the state that are not finite.
    """
    what = (
        f"{MOST_IN_A_ROW} steps in a row had no finite loss or gradient (step {last.step:,}: loss "
        f"{last.loss}, gradient norm {last.grad_norm}, learning rate {last.lr:.2e}). "
    )
    if poisoned:
        return what + (
            f"The state itself is not finite in {len(poisoned)} tensors, among them {poisoned[0]}, "
            "so it was not saved: go on from the last good checkpoint with --resume and a lower "
            "--lr or --grad-clip."
        )
    return what + (
        "The weights are finite, as those steps left them alone, so the cause is in the batches or "
        "in an operation: --replay a file of bad_steps says where, also with --kernels torch or "
        "--precision fp32; --resume goes on behind these batches."
    )
