"""A resumed run takes over its checkpoint's state; the module knows what may have changed since.

Free to change: batch size, micro-batch, sequence length, recompute policy, kernels, compilation,
precision, device, learning rates. Refused: another model or tokenizer, whose weights would mean
something else. Other data is refused unless `--allow-data-change` insists.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.format import Checkpoint, CheckpointError
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.model import NOT_THE_MODEL, ModelConfig, flag
from hamner.config.train import TrainConfig
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.files import read_records
from hamner.train.int8_guard import Int8Guard
from hamner.train.metrics import Spike
from hamner.train.saves import STATE_FORMAT, Stateful
from hamner.train.step import TrainStep

NUMBER, COUNT = (int, float), (int,)
STATE_FIELDS = {
    COUNT: ("format", "step", "tokens", "optimizer_steps", "skipped_steps", "loss_steps"),
    NUMBER: ("seconds", "loss_sum"),
    (*COUNT, type(None)): ("val_step",),
    (*NUMBER, type(None)): ("val_loss",),
    (list,): ("recent_losses",),
    (dict,): ("schedule", "model", "data", "rng", "versions"),
    (str,): ("tokenizer",),
}
"""of state.json, by the types of their values"""
SCHEDULE_FIELDS = {
    COUNT: ("warmup_steps", "total_tokens"),
    NUMBER: ("warmup_tokens",),
    (list,): ("length",),
}
_ANOTHER = "remove that checkpoint, or start another run with --run-dir FOLDER"


def find_checkpoint(folder: Path) -> tuple[Checkpoint | None, dict, list[str]]:
    """The function finds the newest whole checkpoint of a folder.

    Returns:
        The checkpoint and its state, or None and {} if nothing was ever saved; and a sentence for
        each checkpoint that was passed over.

    Raises:
        UserError: there are checkpoints and none is whole, or it is of another version.
    """
    try:
        checkpoint.take_back(folder)
    except OSError as error:
        raise UserError(f"--resume: {folder} cannot be written: {error.strerror}") from error
    found, errors = checkpoint.newest_whole(folder)
    if found is None and errors:
        raise UserError(
            f"--resume: no checkpoint in {folder} is whole: {'; '.join(map(str, errors))}; "
            "put a whole one there or start another run with --run-dir FOLDER"
        )
    if found is None:
        return None, {}, []
    state = found.state()
    if "imported_from" in state:
        raise UserError(
            f"--resume: {found.path} was imported without its optimizer's state, so its training "
            "cannot go on here; start another run from its weights with --init-from, or fine-tune "
            "it with python -m hamner.sft"
        )
    path = found.path / checkpoint.STATE_FILE
    if state.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"{path} has format {state.get('format')}, this version of Hamner resumes format "
            f"{STATE_FORMAT}; start another run with --run-dir FOLDER"
        )
    _require_fields(path, state, STATE_FIELDS)
    _require_fields(path, state["schedule"], SCHEDULE_FIELDS)
    if not all(_is_a(value, NUMBER) for value in state["recent_losses"]):
        raise CheckpointError(f"{path}: recent_losses must be numbers; {_ANOTHER}")
    if not _are_spikes(state.get("spikes", [])):
        raise CheckpointError(f"{path}: spikes must be a list of loss spikes; {_ANOTHER}")
    return found, state, [f"WARNING: passed over a newer checkpoint: {e}" for e in errors]


def _require_fields(path: Path, found: dict, fields: dict[tuple, tuple[str, ...]]) -> None:
    for types, names in fields.items():
        for name in names:
            value = found.get(name)
            is_count = types[0] is int and not isinstance(value, float)
            if name not in found or not _is_a(value, types) or (is_count and value and value < 0):
                raise CheckpointError(
                    f"{path}: {name} is missing or not what it must be; {_ANOTHER}"
                )


def _are_spikes(values: object) -> bool:
    """The answer is whether each of the values makes a `Spike`."""
    names = {field.name for field in fields(Spike)}
    return isinstance(values, list) and all(
        isinstance(value, dict)
        and value.keys() == names
        and all(_is_a(number, NUMBER) for number in value.values())
        for value in values
    )


def _is_a(value: object, types: tuple[type, ...]) -> bool:
    """The test is isinstance, except that JSON's true is no number."""
    return isinstance(value, types) and not isinstance(value, bool)


def rewind(run: RunFolder, step: int, *, keeps: bool = False) -> None:
    """The run forgets what it made after `step`: records are cut, damaged checkpoints renamed.

    The last thing of a resume that nothing refuses any more. With `keeps` the records until now
    are kept beside.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        run.rewind(step, keeps=keeps)
        checkpoint.set_aside(run.checkpoints, newer_than=step)
    except OSError as error:
        raise UserError(f"--run-dir {run.path} cannot be written: {error.strerror}") from error


def require_same_model(
    found: Checkpoint, state: dict, config: TrainConfig, tokenizer: Tokenizer
) -> None:
    """The function refuses to load another model's or another tokenizer's state.

    Raises:
        UserError: spells out every difference.
    """
    # A field that is newer than the checkpoint has its default there.
    saved = {**asdict(ModelConfig()), **state["model"]}
    names = [field.name for field in fields(ModelConfig) if field.name not in NOT_THE_MODEL]
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


def require_same_optimizer(found: Checkpoint, state: dict, config: TrainConfig) -> None:
    """The function refuses to go on with another optimizer; older checkpoints have AdamW's state.

    Raises:
        UserError: says what would be lost.
    """
    saved = state.get("optimizer", "adamw")
    if config.optimizer != saved:
        lost = "both moments" if saved == "adamw" else "the momentum"
        raise UserError(
            f"--optimizer {config.optimizer} is not the {saved} that {found.path} was trained "
            f"with: {lost} of every hidden matrix would be lost; leave the flag out, or start "
            "another run with --run-dir"
        )


def require_router_state(found: Checkpoint, state: dict, model: ModelConfig) -> None:
    """The state of a mixture's routers is refused if it is damaged; older checkpoints have none.

    Raises:
        CheckpointError: the state is not what it must be.
    """
    if not model.is_moe or "router_sum" not in state:
        return
    experts = model.num_experts
    starvation = state.get("starvation")
    starvation = starvation if isinstance(starvation, dict) else {}
    tables = {
        "router_sum": (state["router_sum"], experts + 1, NUMBER),
        "starvation: low_steps": (starvation.get("low_steps"), experts, COUNT),
        "starvation: told": (starvation.get("told"), experts, (bool,)),
    }
    for name, (rows, columns, types) in tables.items():
        values = np.array(rows, dtype=object)
        if values.shape != (model.num_layers, columns) or not all(
            isinstance(value, types) for value in values.flat
        ):
            raise CheckpointError(
                f"{found.path / checkpoint.STATE_FILE}: {name} is not what it must be; {_ANOTHER}"
            )


def require_int8_state(found: Checkpoint, state: dict) -> None:
    """The list of int8 operands that fell back is refused if it is damaged; most checkpoints have
    none.

    Raises:
        CheckpointError: it is not what it must be.
    """
    try:
        Int8Guard(None).load_state_dict(state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{found.path / checkpoint.STATE_FILE}: {Int8Guard.KEY} must be a list of operands; "
            f"{_ANOTHER}"
        ) from error


def start_over(run: RunFolder) -> list[str]:
    """The run forgets all that it made, as it has no checkpoint: it was killed before one was
    whole, or they are somewhere else, so its log is kept beside.

    Returns:
        A sentence for the user, if that log is there.

    Raises:
        UserError: the folder of the checkpoints, which every start makes, is away.
    """
    if not run.checkpoints.is_dir():
        raise UserError(
            f"--resume: {run.checkpoints} is not there, though every run has it: bring it back, or "
            "start another run with --run-dir FOLDER"
        )
    reached = max((record["step"] for record in read_records(run.metrics)), default=0)
    rewind(run, 0, keeps=reached > 0)
    if not reached:
        return []
    return [
        f"WARNING: {run.checkpoints} has no checkpoint, though {run.metrics} reached step "
        f"{reached:,}: the run starts over, and its log until now is {run.metrics.name}.before"
    ]


def restore(
    run: RunFolder, tokenizer: Tokenizer, step: TrainStep, parts: Sequence[Stateful]
) -> Checkpoint | None:
    """The newest whole checkpoint is loaded into step and parts; without one the run starts over.

    Returns:
        The checkpoint, or None; what to say of others is in the step's messages.

    Raises:
        UserError: the checkpoint is of another model, tokenizer or data, or none is whole.
    """
    from_main = step.processes.from_main
    found, state, notes = from_main(lambda: find_checkpoint(run.checkpoints))
    step.messages += notes
    if found is None:
        step.messages += from_main(lambda: start_over(run))
        return None
    require_same_model(found, state, step.config, tokenizer)
    require_same_optimizer(found, state, step.config)
    require_router_state(found, state, step.config.model)
    require_int8_state(found, state)
    step.optimizer.restore(found)
    for part in parts:
        part.load_state_dict(state)
    checkpoint.set_rng_state(state["rng"])
    # Not before every process has taken its part of it.
    step.processes.any(False)
    from_main(lambda: rewind(run, state["step"]))
    return found
