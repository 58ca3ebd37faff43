"""The messages are what a run says before its first step and after its last."""

import math
from dataclasses import dataclass
from pathlib import Path

from hamner.checkpoint import format as checkpoint
from hamner.config.train import TrainConfig
from hamner.errors import EXIT_BAD_STEPS, EXIT_INTERRUPTED
from hamner.parallel.device import why_no_gpu
from hamner.train.display import count, duration
from hamner.train.evaluation import EarlyStopping
from hamner.train.log import TrainLog
from hamner.train.saves import Saves

ENGINES = {
    "ddp": "each with the whole model (DDP)",
    "fsdp": "with weights, gradients and moments sharded over them (FSDP2)",
}

LINEARS = {
    "int8": "forward and for the gradients of activations",
    "int8-all": "forward and for the gradients of activations and weights",
}


@dataclass(frozen=True)
class TrainResult:
    """A result says how a run ended."""

    step: int
    tokens: int
    val_loss: float | None
    """of the last evaluation, nats per token"""
    checkpoint: Path | None
    interrupted: bool
    diagnosis: str | None = None
    """why the run stopped itself, or None"""
    val_step: int | None = None
    """at which `val_loss` was measured"""

    @property
    def exit_code(self) -> int:
        """The commands that train end with this code."""
        if self.diagnosis:
            return EXIT_BAD_STEPS
        return EXIT_INTERRUPTED if self.interrupted else 0


def introduction(log: TrainLog, saves: Saves, *, has_validation: bool) -> list[str]:
    """The lines say what will run, on what, and where it is kept."""
    config, step, total_tokens = log.config, log.train_step, log.display.total_tokens
    done, saved = saves.progress, saves.last
    # Steps before this start may have had another size.
    left = max(0, math.ceil((total_tokens - done.tokens) / config.tokens_per_step))
    length = done.step + left
    steps = f"{length:,} steps" + (f", the {left:,} to come" if done.step else "")
    parameters, active = (config.model.num_parameters(active=active) for active in (False, True))
    size = f"{parameters:,} parameters"
    if active != parameters:
        size += f", {active:,} active per token"
    lines = [
        f"option {config.option}: {size}; {count(max(total_tokens, done.tokens))} tokens in "
        f"{steps} of {config.batch_size} x {config.seq_len}",
        f"on {step.compute.name}, {step.compute.precision}, kernels {step.compute.kernels}, "
        f"attention {step.attention.name}: {step.attention.reason}",
    ]
    rank = step.processes.rank
    if rank.world_size > 1:
        where = "" if rank.num_machines == 1 else f" on {rank.num_machines} machines"
        lines.append(
            f"{rank.world_size} processes{where}, {ENGINES[step.engine.name]}, of which each takes "
            f"{config.batch_size // rank.world_size} sequences of a step and the memory below"
        )
    if step.model.int8 is not None:
        lines.append(int8(config, log))
    lines += [f"memory: {step.plan}", recipe(config), log.mfu.explain()]
    if step.compute.device.type == "cuda":
        lines.append("the first step compiles its kernels, which a new machine takes a while for")
    if step.compute.device.type == "cpu":
        why = why_no_gpu(config.device)
        lines.append(f"{why}: training on the CPU, which suits --option tiny only")
    if not has_validation:
        why = "the data is too small to hold out validation documents"
        lines.append(f"{why if config.val_fraction else '--val-fraction 0'}: no evaluation")
    if not left:
        lines.append("the run has its length: nothing is trained; more --steps make it longer")
    if config.warmup_steps >= length:
        lines.append(
            f"WARNING: --warmup-steps {config.warmup_steps:,} is the whole run, whose learning "
            f"rate never falls: --warmup-steps {length // 20} is a twentieth of it"
        )
    if config.resume:
        where = f"from {saved.path}" if saved else "from the start: no checkpoint is there"
        lines.append(f"resuming {log.run.path} {where}")
    else:
        lines.append(f"run folder {log.run.path}")
        if config.init_from is not None:
            lines.append(f"starting from the weights of {config.init_from}")
    return lines + saves.lack_of_room()


def int8(config: TrainConfig, log: TrainLog) -> str:
    """The line says how linear layers multiply, and how many of their matmuls no longer do so."""
    products = log.train_step.model.int8.products
    fallen = {o.matmul for o in log.int8_guard.fallen if o.matmul[2] in products}
    line = f"--matmul {config.matmul}: linear layers in int8 {LINEARS[config.matmul]}"
    if fallen:
        line += f"; {len(fallen)} of their matmuls fell back to bf16 before this start"
    return line


def recipe(config: TrainConfig) -> str:
    """The line says how each group of parameters learns, and on what schedule."""
    names = {"hidden": config.optimizer, "embedding": "adamw", "vector": "adamw"}
    groups = ", ".join(
        f"{group} {names[group]} {config.group_lrs[group]:g} decay {config.group_decays[group]:g}"
        for group in names
    )
    decay = config.decay
    if decay == "wsd":
        decay = f"constant, then linear over the last {config.decay_fraction:.0%},"
    name = f"recipe {config.recipe}" if config.sft is None else "fine-tuning"
    return (
        f"{name}: {groups}; warm-up {config.warmup_steps:,} steps, {decay} to "
        f"{config.min_lr:g}; betas {config.beta1:g} {config.beta2:g}"
        + (f", momentum {config.momentum:g}" if config.optimizer == "muon" else "")
        + ("; qk-norm" if config.model.qk_norm else "")
    )


def conclusion(
    log: TrainLog, result: TrainResult, stopping: EarlyStopping, *, is_finished: bool
) -> list[str]:
    """The lines say how a run ended, and how to go on."""
    where = result.checkpoint
    if result.diagnosis:
        where = where or "none: the run never saved"
        return [result.diagnosis, f"stopped at step {result.step:,}; last good checkpoint: {where}"]
    if not is_finished:
        word = "interrupted" if result.interrupted else "stopped"
        command = "hamner.train" if log.config.sft is None else "hamner.sft"
        saved = f"saved in {where}" if where else "never saved"
        return [
            f"{word} at step {result.step:,}; {saved}; continue with "
            f"python -m {command} --resume --run-dir {log.run.path}"
        ]
    lines = []
    loss = "" if result.val_loss is None else f", validation loss {result.val_loss:.4f}"
    if stopping.exhausted:
        lines.append(
            f"stopped early: {stopping.evaluations_since_best} evaluations without a better "
            "validation loss"
        )
    if stopping.best_step is not None:
        found = checkpoint.best(log.run.checkpoints)
        is_kept = found is not None and found.step == stopping.best_step
        best = f"best {stopping.best_loss:.4f} at step {stopping.best_step:,}"
        loss += f" ({best}, {'kept' if is_kept else 'which could not be saved'})"
    kept = f"; model in {where}, plots in {log.run.plots}" if where else ""
    lines.append(f"done: {count(result.tokens)} tokens in {duration(log.watch.read())}{loss}{kept}")
    return lines
