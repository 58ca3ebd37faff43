"""What a run says before its first step and after its last."""

from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.train import TrainConfig
from hamner.train.display import count, duration
from hamner.train.early_stopping import EarlyStopping
from hamner.train.metrics import Mfu
from hamner.train.step import TrainStep

ENGINES = {
    "ddp": "each with the whole model (DDP)",
    "fsdp": "with weights, gradients and moments divided over them (FSDP2)",
}


def introduction(
    config: TrainConfig,
    run: RunFolder,
    step: TrainStep,
    *,
    mfu: Mfu,
    total_tokens: int,
    has_validation: bool,
    saved: Checkpoint | None,
) -> list[str]:
    """The lines say what will run, on what, and where it is kept."""
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
        mfu.explain(),
    ]
    if step.compute.device.type == "cpu":
        lines.append("no GPU found: training on the CPU, which suits --option tiny only")
    if not has_validation:
        lines.append("the data is too small to hold out validation documents: no evaluation")
    if config.resume:
        where = f"from {saved.path}" if saved else "from the start: it never saved"
        lines.append(f"resuming {run.path} {where}")
    else:
        lines.append(f"run folder {run.path}")
    return lines


def _processes(step: TrainStep) -> list[str]:
    """A line on how several processes divide the work; none for one."""
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
    """The lines of a run that diverged."""
    where = saved.path if saved else "none: the run never saved"
    return [diagnosis, f"stopped at step {step:,}; last good checkpoint: {where}"]


def stopped_before_the_end(
    config: TrainConfig, run: RunFolder, step: int, saved: Checkpoint, *, interrupted: bool
) -> list[str]:
    """The line of a run that can go on."""
    word = "interrupted" if interrupted else "stopped"
    command = "hamner.train" if config.sft is None else "hamner.sft"
    return [
        f"{word} at step {step:,}; saved in {saved.path}; continue with "
        f"python -m {command} --resume --run-dir {run.path}"
    ]


def done(
    run: RunFolder,
    saved: Checkpoint,
    *,
    tokens: int,
    seconds: float,
    val_loss: float | None,
    stopping: EarlyStopping,
) -> list[str]:
    """The lines of a run that has its length, or that stopped improving."""
    lines = []
    loss = "" if val_loss is None else f", validation loss {val_loss:.4f}"
    if stopping.exhausted:
        lines.append(
            f"stopped early: {stopping.evaluations_since_best} evaluations without a better "
            "validation loss"
        )
    if stopping.best_step is not None:
        loss += f" (best {stopping.best_loss:.4f} at step {stopping.best_step:,}, kept)"
    lines.append(
        f"done: {count(tokens)} tokens in {duration(seconds)}{loss}; "
        f"model in {saved.path}, plots in {run.plots}"
    )
    return lines
