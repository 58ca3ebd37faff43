"""How a configuration computes here: device, recompute plan, attention, and the model on them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hamner.checkpoint.format import Checkpoint
from hamner.checkpoint.writer import BackgroundSaver, NoSaver
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.model.attention import AttentionBackend, get_attention
from hamner.model.ops import Ops, build_ops
from hamner.model.transformer import Transformer
from hamner.parallel import device
from hamner.parallel.device import Compute
from hamner.parallel.engines import DataParallel, Engine, FullySharded, open_engine
from hamner.parallel.processes import SingleProcess
from hamner.parallel.ranks import Rank
from hamner.plan import memory
from hamner.plan.communication import ONE_GPU, Parallelism
from hamner.plan.memory import MemoryPlan, Policy


@dataclass(frozen=True)
class Setup:
    """What a configuration comes to on this machine."""

    compute: Compute
    plan: MemoryPlan
    attention: AttentionBackend
    engine: Engine

    @property
    def ops(self) -> Ops:
        """The fused operations."""
        return build_ops(self.compute.kernels, self.attention)

    def model(self, config: TrainConfig, initial: Checkpoint | None = None) -> Transformer:
        """The model on its device in fp32, with the weights of `initial` or random ones."""
        # No weight has a value before it gets ours: torch's own, drawn first, would take seconds.
        with torch.device("meta"):
            model = Transformer(config.model, self.ops, self.plan.policies)
        self.engine.shard(model)
        model.to_empty(device=self.compute.device)
        if initial is None:
            model.initialize(config.seed)
        else:
            initial.load_model(model.state_dict())
        return model


def choose(config: TrainConfig, processes: SingleProcess | None = None) -> Setup:
    """Choose device, recompute policies, micro-batch, attention and, with several processes, how
    they divide the work.

    Raises:
        UserError: what is asked for does not fit or is not on this machine.
    """
    processes = processes or SingleProcess()
    compute = device.select(config)
    policies = memory.parse(config.recompute, config.model.num_layers)
    # All processes plan alike, with the memory of the one that has least.
    budget = processes.all_reduce_min(compute.budget_bytes)
    kind, plan = plan_parallel(config, compute, budget, processes.rank, policies)
    attention = get_attention(
        config.attention,
        device=compute.device,
        dtype=compute.dtype,
        head_size=config.model.head_size,
        num_heads=config.model.num_attention_heads,
        num_kv_heads=config.model.num_kv_heads,
        seq_len=config.seq_len,
        micro_batch_size=plan.micro_batch_size,
        document_mask=config.document_mask,
        folds_rope=compute.kernels == "triton" and not config.model.use_differential_attention,
    )
    return Setup(compute, plan, attention, open_engine(kind, processes, compute, config))


def open_saver(
    engine: Engine, folder: Path, *, keep: int, keep_every: int, records: Sequence[Path]
) -> BackgroundSaver | NoSaver:
    """The writer of a run's checkpoints for the state as `engine` divides it over processes.

    Args:
        engine: of the run; with DDP rank 0 has everything and saves as one process does, with FSDP2
            every process writes its shards.
        folder, keep, keep_every, records: see `BackgroundSaver`.
    """
    if isinstance(engine, FullySharded):
        from hamner.checkpoint.sharded import ShardedSaver

        return ShardedSaver(
            folder,
            engine.processes,
            engine.mesh,
            keep=keep,
            keep_every=keep_every,
            records=records,
        )
    if isinstance(engine, DataParallel) and not engine.processes.rank.is_main:
        return NoSaver()
    return BackgroundSaver(folder, keep=keep, keep_every=keep_every, records=records)


def plan_parallel(
    config: TrainConfig,
    compute: Compute,
    budget: int,
    rank: Rank,
    policies: tuple[Policy, ...] | None,
) -> tuple[str, MemoryPlan]:
    """The kind of `hamner.parallel.engines.open_engine` and the memory plan of `--parallel`.

    Raises:
        UserError: it does not fit, or a step cannot be dealt to the processes.
    """
    if rank.world_size == 1:
        return "none", plan_memory(config, compute, budget, policies)
    ddp = Parallelism("ddp", rank.local_world_size, rank.num_machines)
    rows, size = ddp.rows_per_gpu(config.batch_size), config.micro_batch_size or 1
    if rows % size:
        raise UserError(
            f"--micro-batch-size {size} does not divide the {rows} sequences that each of "
            f"{rank.world_size} processes takes of --batch-size {config.batch_size}"
        )
    if config.parallel in ("auto", "ddp"):
        try:
            return "ddp", plan_memory(config, compute, budget, policies, ddp)
        except UserError:
            if config.parallel == "ddp":
                raise
    fsdp = replace(ddp, kind="fsdp", reshard=config.fsdp_reshard)
    if rank.local_world_size == 1:
        fsdp = replace(fsdp, gpus_per_node=rank.world_size, nodes=1)
    return "fsdp", plan_memory(config, compute, budget, policies, fsdp)


def plan_memory(
    config: TrainConfig,
    compute: Compute,
    budget: int,
    policies: tuple[Policy, ...] | None = None,
    parallelism: Parallelism = ONE_GPU,
) -> MemoryPlan:
    """Fit the run into `budget` bytes on this device; `memory.choose` has the rules.

    Raises:
        UserError: it does not fit.
    """
    return memory.choose(
        config.model,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        precision=compute.precision,
        fused=compute.kernels == "triton",
        budget=budget,
        policies=policies,
        micro_batch_size=config.micro_batch_size,
        max_micro_batch_tokens=compute.max_micro_batch_tokens,
        parallelism=parallelism,
    )
