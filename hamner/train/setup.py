"""The module fits a configuration to its machines: device, memory plan, attention, and the model.

Rank 0 decides and the other ranks follow, so that nothing can differ between them.
"""

from dataclasses import dataclass, replace

import torch

from hamner.checkpoint.format import Checkpoint
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.model.attention import (
    AttentionBackend,
    AttentionChoice,
    AttentionShape,
    build_attention,
    choose_attention,
    waits_for_gpu,
)
from hamner.model.ops import build_ops
from hamner.model.transformer import Transformer
from hamner.parallel import device
from hamner.parallel.device import Compute
from hamner.parallel.engines import Engine, open_engine
from hamner.parallel.processes import SingleProcess
from hamner.parallel.ranks import Rank
from hamner.plan import memory
from hamner.plan.communication import ONE_GPU, Parallelism
from hamner.plan.memory import MemoryPlan


@dataclass(frozen=True)
class Setup:
    """A setup is what a configuration comes to on this machine."""

    compute: Compute
    plan: MemoryPlan
    attention: AttentionBackend
    engine: Engine
    records_graph: bool
    """whether forward and backward of a micro-batch are one CUDA graph"""

    def model(self, config: TrainConfig, initial: Checkpoint | None = None) -> Transformer:
        """The model gets its device, and in fp32 the weights of `initial` or random ones."""
        ops = build_ops(self.compute.kernels, self.attention)
        # No weight has a value before it gets ours: torch's own, drawn first, would take seconds.
        with torch.device("meta"):
            model = Transformer(config.model, ops, self.plan.policies)
        self.engine.shard(model)
        model.to_empty(device=self.compute.device)
        if initial is None:
            model.initialize(config.seed)
        else:
            initial.load_model(model.state_dict())
        return model


def choose(config: TrainConfig, processes: SingleProcess) -> Setup:
    """`choose` fits a run to its machines: device, recompute policies, micro-batch, attention and,
    with several processes, how they divide the work.

    Raises:
        UserError: what is asked for does not fit or is not on this machine.
    """
    compute = device.select(config)
    # Everyone has the memory of the one that has least.
    budget = processes.all_reduce_min(compute.budget_bytes)
    kind, plan, choice = processes.from_main(
        lambda: decide(config, compute, budget, processes.rank)
    )
    engine = open_engine(kind, processes, compute, config)
    micro_batches = config.batch_size // (plan.micro_batch_size * processes.rank.world_size)
    return Setup(
        compute=compute,
        plan=plan,
        attention=build_attention(choice, attention_shape(config, compute, plan)),
        engine=engine,
        records_graph=processes.from_main(
            lambda: can_record(config, compute, choice.name) and engine.can_record(micro_batches)
        ),
    )


def decide(
    config: TrainConfig, compute: Compute, budget: int, rank: Rank
) -> tuple[str, MemoryPlan, AttentionChoice]:
    """`decide` plans a step within `budget` bytes of each process, and times attention if asked to.

    Returns:
        The kind of engine (see `open_engine`), the plan and the attention, as plain data that can
        be sent to the other ranks.

    Raises:
        UserError: it does not fit, or the attention cannot do what is asked.
    """
    kind, plan = plan_parallel(config, compute, budget, rank)
    shape = attention_shape(config, compute, plan)
    return kind, plan, choose_attention(config.attention, shape)


def attention_shape(config: TrainConfig, compute: Compute, plan: MemoryPlan) -> AttentionShape:
    """The function says what attention of a micro-batch is asked for."""
    return AttentionShape.of_model(
        config.model,
        device=compute.device,
        dtype=compute.dtype,
        seq_len=config.seq_len,
        micro_batch_size=plan.micro_batch_size,
        document_mask=config.document_mask,
        folds_rope=compute.kernels == "triton" and not config.model.use_differential_attention,
    )


def can_record(config: TrainConfig, compute: Compute, attention: str) -> bool:
    """Forward and backward can be one CUDA graph unless something in them forbids it: the plain ops
    wait for the GPU in places, flash-attn does with documents, compiled code has graphs of its own,
    and `Engine.can_record` says where what the processes send does."""
    return (
        config.cuda_graph
        and compute.device.type == "cuda"
        and compute.kernels == "triton"
        and not (config.compile or waits_for_gpu(attention, config.document_mask))
    )


def plan_parallel(
    config: TrainConfig, compute: Compute, budget: int, rank: Rank
) -> tuple[str, MemoryPlan]:
    """The function finds the kind of engine and the memory plan that `--parallel` comes to.

    Raises:
        UserError: it does not fit, or a step cannot be dealt to the processes.
    """
    if rank.world_size == 1:
        return "none", plan_memory(config, compute, budget)
    ddp = Parallelism("ddp", rank.local_world_size, rank.num_machines)
    rows, size = ddp.rows_per_gpu(config.batch_size), config.micro_batch_size or 1
    if rows % size:
        raise UserError(
            f"--micro-batch-size {size} does not divide the {rows} sequences that each of "
            f"{rank.world_size} processes takes of --batch-size {config.batch_size}"
        )
    if config.parallel in ("auto", "ddp"):
        try:
            return "ddp", plan_memory(config, compute, budget, ddp)
        except UserError:
            if config.parallel == "ddp":
                raise
    fsdp = replace(ddp, kind="fsdp", reshard=config.fsdp_reshard)
    if rank.local_world_size == 1:
        fsdp = replace(fsdp, gpus_per_node=rank.world_size, nodes=1)
    return "fsdp", plan_memory(config, compute, budget, fsdp)


def plan_memory(
    config: TrainConfig, compute: Compute, budget: int, parallelism: Parallelism = ONE_GPU
) -> MemoryPlan:
    """The function fits the run into `budget` bytes on this device; `memory.choose` has the rules.

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
        policies=memory.parse(config.recompute, config.model.num_layers),
        micro_batch_size=config.micro_batch_size,
        max_micro_batch_tokens=compute.max_micro_batch_tokens,
        parallelism=parallelism,
    )
