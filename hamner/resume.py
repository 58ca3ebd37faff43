"""What a resumed run takes over from its checkpoint, and what may have changed in between.

Free to change: batch size, micro-batch, sequence length, recompute policy, kernels, compilation,
precision, device, learning rates. Refused: another model or tokenizer, whose weights would mean
something else. Other data is refused unless `--allow-data-change` insists.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path

from hamner import checkpoint
from hamner.checkpoint import Checkpoint, CheckpointError
from hamner.config import TrainConfig
from hamner.data.loader import TrainLoader
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.optimizer import Schedule
from hamner.options import ModelConfig, flag
from hamner.run_folder import RunFolder

STATE_FORMAT = 2
"""of state.json"""
STATE_FIELDS = {
    *("format", "step", "tokens", "seconds", "optimizer_steps", "skipped_steps"),
    *("loss_sum", "loss_steps", "val_loss", "val_step", "recent_losses"),
    *("schedule", "model", "tokenizer", "data", "rng", "versions"),
}
_NOT_THE_MODEL = {"gradient_checkpointing", "router_aux_loss_coef", "router_z_loss_coef"}
"""fields of ModelConfig that say how to train, not what the weights are"""


def find_checkpoint(folder: Path, notes: list[str]) -> tuple[Checkpoint | None, dict]:
    """The newest whole checkpoint and its state; (None, {}) if nothing was ever saved.

    Args:
        folder: of the checkpoints.
        notes: gets a sentence for each checkpoint that was passed over.

    Raises:
        UserError: there are checkpoints and none is whole, or it is of another version.
    """
    found, errors = checkpoint.newest_whole(folder)
    if found is None and errors:
        raise UserError(
            f"--resume: no checkpoint in {folder} is whole: {'; '.join(map(str, errors))}; "
            "put a whole one there or start another run with --run-dir FOLDER"
        )
    if found is None:
        return None, {}
    state = found.state()
    if "imported_from" in state:
        raise UserError(
            f"--resume: {found.path} was imported without its optimizer's state, so its training "
            "cannot go on here; fine-tune it with python -m hamner.sft"
        )
    if state.get("format") != STATE_FORMAT or not state.keys() >= STATE_FIELDS:
        raise CheckpointError(
            f"{found.path / checkpoint.STATE_FILE} has format {state.get('format')}, this version "
            f"of Hamner resumes format {STATE_FORMAT}; start another run with --run-dir FOLDER"
        )
    notes += [f"WARNING: passed over a newer checkpoint: {error}" for error in errors]
    return found, state


def rewind(run: RunFolder, step: int) -> None:
    """Forget what the run made after `step`: records are cut, damaged checkpoints renamed.

    The last thing of a resume that nothing refuses any more.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        run.rewind(step)
        checkpoint.set_aside(run.checkpoints, newer_than=step)
    except OSError as error:
        raise UserError(f"--run-dir {run.path} cannot be written: {error.strerror}") from error


def require_same_model(
    found: Checkpoint, state: dict, config: TrainConfig, tokenizer: Tokenizer
) -> None:
    """Refuse to load another model's or another tokenizer's state.

    Raises:
        UserError: spells out every difference.
    """
    # A field that is newer than the checkpoint has its default there.
    saved = {**asdict(ModelConfig()), **state["model"]}
    names = [field.name for field in fields(ModelConfig) if field.name not in _NOT_THE_MODEL]
    differences = [
        f"--{flag(name)} {getattr(config.model, name)} is not the {saved[name]}"
        for name in names
        if getattr(config.model, name) != saved[name]
    ]
    if state["tokenizer"] != tokenizer.fingerprint:
        differences.append(
            f"--tokenizer {config.tokenizer} (fingerprint {tokenizer.fingerprint[:12]}) is not the "
            f"one (fingerprint {str(state['tokenizer'])[:12]})"
        )
    if differences:
        raise UserError(
            f"{' and '.join(differences)} that {found.path} was trained with; leave the flag out, "
            "or start another run with --run-dir"
        )


def load_position(loader: TrainLoader, saved: dict, config: TrainConfig, notes: list[str]) -> None:
    """Go on in the data where the checkpoint was.

    Raises:
        UserError: it was other data, and `--allow-data-change` was not given.
    """
    try:
        loader.load_state_dict(saved)
    except UserError as error:
        if not config.allow_data_change:
            raise UserError(
                f"{error}; --allow-data-change goes on with the new data from its start"
            ) from error
        notes.append(f"WARNING: --allow-data-change: the data is read from its start ({error})")


def describe_schedule(config: TrainConfig, schedule: Schedule) -> dict:
    """For a checkpoint: the schedule in tokens, beside the flags it was made from."""
    return {
        "warmup_steps": config.warmup_steps,
        "warmup_tokens": schedule.warmup_tokens,
        "length": [config.steps, config.tokens],
        "total_tokens": schedule.total_tokens,
    }


def continue_schedule(config: TrainConfig, schedule: Schedule, saved: dict) -> Schedule:
    """The schedule of a resumed run: as before in tokens, whatever a step is now.

    Another `--batch-size` or `--seq-len` makes the same number of steps another number of tokens.
    So a flag that is as it was keeps its tokens, and only one that was changed counts anew.
    """
    if config.warmup_steps == saved["warmup_steps"]:
        schedule = replace(schedule, warmup_tokens=saved["warmup_tokens"])
    if [config.steps, config.tokens] == saved["length"]:
        schedule = replace(schedule, total_tokens=saved["total_tokens"])
    return schedule
