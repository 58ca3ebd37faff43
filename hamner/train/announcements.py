"""What a run says before its first step and after its last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hamner.train.display import count, duration

if TYPE_CHECKING:
    from hamner.train.loop import Trainer

ENGINES = {
    "ddp": "each with the whole model (DDP)",
    "fsdp": "with weights, gradients and moments divided over them (FSDP2)",
}


def introduction(trainer: Trainer) -> list[str]:
    """What will run, on what, and where it is kept."""
    config, compute = trainer.config, trainer.compute
    total_tokens = trainer.schedule.total_tokens
    parameters, active = (config.model.num_parameters(active=active) for active in (False, True))
    size = f"{parameters:,} parameters"
    if active != parameters:
        size += f", {active:,} active per token"
    lines = [
        f"option {config.option}: {size}; {count(total_tokens)} tokens in "
        f"{total_tokens // config.tokens_per_step:,} steps of "
        f"{config.batch_size} x {config.seq_len}",
        f"on {compute.name}, {compute.precision}, kernels {compute.kernels}, "
        f"attention {trainer.attention.name}: {trainer.attention.reason}",
        *_processes(trainer),
        f"memory: {trainer.plan}",
        trainer.mfu.explain(),
    ]
    if compute.device.type == "cpu":
        lines.append("no GPU found: training on the CPU, which suits --option tiny only")
    if not len(trainer.validation.inputs):
        lines.append("the data is too small to hold out validation documents: no evaluation")
    if config.resume:
        saved = trainer.saved
        where = f"from {saved.path}" if saved else "from the start: it never saved"
        lines.append(f"resuming {trainer.run.path} {where}")
    else:
        lines.append(f"run folder {trainer.run.path}")
    return lines


def _processes(trainer: Trainer) -> list[str]:
    """How several processes divide the work; nothing of one."""
    rank = trainer.processes.rank
    if rank.world_size == 1:
        return []
    where = "" if rank.num_machines == 1 else f" on {rank.num_machines} machines"
    return [
        f"{rank.world_size} processes{where}, {ENGINES[trainer.engine.name]}, of which each takes "
        f"{trainer.config.batch_size // rank.world_size} sequences of a step and the memory below"
    ]


def cpu_speed(tokens_per_second: float, total_tokens: int) -> str:
    """How fast this CPU is, and what that means for the whole run."""
    return (
        f"measured on this CPU: about {tokens_per_second:,.0f} tokens/s, so the full run of "
        f"{count(total_tokens)} tokens would take {duration(total_tokens / tokens_per_second)}"
    )


def conclusion(trainer: Trainer, interrupted: bool) -> list[str]:
    """Where the run is, and how to go on."""
    if trainer.diagnosis:
        where = trainer.saved.path if trainer.saved else "none: the run never saved"
        return [
            trainer.diagnosis,
            f"stopped at step {trainer.step:,}; last good checkpoint: {where}",
        ]
    if not trainer.finished:
        word = "interrupted" if interrupted else "stopped"
        return [
            f"{word} at step {trainer.step:,}; saved in {trainer.saved.path}; continue with "
            f"python -m {trainer.config.command} --resume --run-dir {trainer.run.path}"
        ]
    lines = []
    loss = "" if trainer.val_loss is None else f", validation loss {trainer.val_loss:.4f}"
    stopping = trainer.early_stopping
    if stopping.exhausted:
        lines.append(
            f"stopped early: {stopping.evaluations_since_best} evaluations without a better "
            "validation loss"
        )
    if stopping.best_step is not None:
        loss += f" (best {stopping.best_loss:.4f} at step {stopping.best_step:,}, kept)"
    lines.append(
        f"done: {count(trainer.tokens)} tokens in {duration(trainer.watch.read())}{loss}; "
        f"model in {trainer.saved.path}, plots in {trainer.run.plots}"
    )
    return lines
