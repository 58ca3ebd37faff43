"""The module runs tasks of lm-evaluation-harness (an optional extra) on a saved model.

The harness reads the model as anyone does: exported in Hugging Face's format. From prompts to
scores everything is its own.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hamner.checkpoint.saved_model import SavedModel
from hamner.errors import UserError
from hamner.evaluate.evaluation import MAX_LOGITS
from hamner.export.hf import write_hugging_face


def run_tasks(
    saved: SavedModel,
    tasks: Sequence[str],
    *,
    folder: Path | None,
    limit: int | None,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """The function scores tasks of the harness.

    Args:
        saved: a model that Hugging Face's format can hold.
        tasks: names known to the harness or defined in `folder`.
        folder: of more task files (YAML).
        limit: most examples of a task; None takes all.
        device: where to compute.

    Returns:
        By task, its metrics by name, such as "acc,none".

    Raises:
        UserError: no such task, its data cannot be had, or the model cannot be exported.
    """
    # Its own hundreds of task files take seconds to list.
    manager = TaskManager(include_path=folder and str(folder), include_defaults=folder is None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        where = f"in --task-folder {folder}" if folder else "known to lm-evaluation-harness"
        raise UserError(f"--tasks {unknown[0]}: no such task {where}")
    try:
        with tempfile.TemporaryDirectory(prefix="hamner-") as temporary:
            results = lm_eval.simple_evaluate(
                open_exported(saved, Path(temporary) / "model", device),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
    # Each task's data has its own ways to fail; most are networks and files. The harness asserts
    # that what a task has the model write fits into its context.
    except (AssertionError, OSError, ValueError, KeyError) as error:
        raise UserError(f"--tasks {' '.join(tasks)}: cannot be run ({error})") from error
    return {
        task: {name: value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in results["results"].items()
    }


def open_exported(saved: SavedModel, folder: Path, device: torch.device) -> HFLM:
    """The function exports a model to a new folder and opens it as the harness does.

    The dtype is that of `SavedModel.build`, and log-probabilities are taken in fp32 as there.
    """
    write_hugging_face(folder, saved)
    logits = saved.config.seq_len * saved.config.model.vocab_size
    return HFLM(
        str(folder),
        device=str(device),
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        softmax_dtype=torch.float32,
        batch_size=max(1, MAX_LOGITS // logits),
    )
