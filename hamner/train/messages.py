"""A run says this before its first step and after its last."""

from hamner.checkpoint.format import Checkpoint
from hamner.train.display import count, duration
from hamner.train.early_stopping import EarlyStopping
from hamner.train.log import TrainLog
from hamner.train.saves import Progress
from hamner.train.step import TrainStep

ENGINES = {
    "ddp": "each with the whole model (DDP)",
    "fsdp": "with weights, gradients and moments divided over them (FSDP2)",
}


def introduction(log: TrainLog, saved: Checkpoint | None, *, has_validation: bool) -> list[str]:
    """The lines say what will run, on what, and where it is kept."""
    config, step, total_tokens = log.config, log.train_step, log.display.total_tokens
    parameters, active = (config.model.num_parameters(active=active) for active in (False, True))
    size = f"{parameters:,} parameters"
    if active != parameters:
        size += f", {active:,} active per token"
    lines = [
        f"option {config.option}: {size}; {count(total_tokens)} tokens in "
        f"{total_tokens // config.tokens_per_step:,} steps of "
        f"{config.batch_size} x {config.seq_len}",
        f"on {step.compute.name}, {step.compute.precision}, kernels {step.compute.kernels}, "
        f"attention {step.attention.name}: {step.attention.reason}",
        *_processes(step),
        f"memory: {step.plan}",
        log.mfu.explain(),
    ]
    if step.compute.device.type == "cpu":
        lines.append("no GPU found: training on the CPU, which suits --option tiny only")
    if not has_validation:
        lines.append("the data is too small to hold out validation documents: no evaluation")
    if config.resume:
        where = f"from {saved.path}" if saved else "from the start: it never saved"
        lines.append(f"resuming {log.run.path} {where}")
    else:
        lines.append(f"run folder {log.run.path}")
    return lines


def _processes(step: TrainStep) -> list[str]:
    """A line says how several processes divide the work; there is none for one."""
    rank = step.processes.rank
    if rank.world_size == 1:
        return []
    where = "" if rank.num_machines == 1 else f" on {rank.num_machines} machines"
    return [
        f"{rank.world_size} processes{where}, {ENGINES[step.engine.name]}, of which each takes "
        f"{step.config.batch_size // rank.world_size} sequences of a step and the memory below"
    ]


def cpu_speed(tokens_per_second: float, total_tokens: int) -> str:
    """The sentence says how fast this CPU is, and what that means for the whole run."""
    return (
        f"measured on this CPU: about {tokens_per_second:,.0f} tokens/s, so the full run of "
        f"{count(total_tokens)} tokens would take {duration(total_tokens / tokens_per_second)}"
    )


def stopped_by_itself(diagnosis: str, step: int, saved: Checkpoint | None) -> list[str]:
    """The lines are those of a run that diverged."""
    where = saved.path if saved else "none: the run never saved"
    return [diagnosis, f"stopped at step {step:,}; last good checkpoint: {where}"]


def stopped_before_the_end(
    log: TrainLog, step: int, saved: Checkpoint, *, interrupted: bool
) -> list[str]:
    """The line of a run that can go on says how."""
    word = "interrupted" if interrupted else "stopped"
    return [
        f"{word} at step {step:,}; saved in {saved.path}; continue with "
        f"python -m {log.config.command} --resume --run-dir {log.run.path}"
    ]


def done(
    log: TrainLog, progress: Progress, saved: Checkpoint, stopping: EarlyStopping
) -> list[str]:
    """The lines are those of a run that has its length, or that stopped improving."""
    lines = []
    loss = "" if progress.val_loss is None else f", validation loss {progress.val_loss:.4f}"
    if stopping.exhausted:
        lines.append(
            f"stopped early: {stopping.evaluations_since_best} evaluations without a better "
            "validation loss"
        )
    if stopping.best_step is not None:
        loss += f" (best {stopping.best_loss:.4f} at step {stopping.best_step:,}, kept)"
    lines.append(
        f"done: {count(progress.tokens)} tokens in {duration(log.watch.read())}{loss}; "
        f"model in {saved.path}, plots in {log.run.plots}"
    )
    return lines
