"""The module fits a configuration to its machines: engine, memory plan, attention, CUDA graph.

Rank 0 decides and the other ranks follow, so that nothing can differ between them.
"""

from dataclasses import replace

from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.model.attention import AttentionBackend, get_attention
from hamner.model.attention_timing import AttentionShape, waits_for_gpu
from hamner.parallel.device import Compute
from hamner.parallel.ranks import Rank
from hamner.plan import memory
from hamner.plan.communication import ONE_GPU, Parallelism
from hamner.plan.memory import MemoryPlan


def decide(
    config: TrainConfig, compute: Compute, budget: int, rank: Rank
) -> tuple[str, MemoryPlan, AttentionBackend]:
    """`decide` plans a step within `budget` bytes of each process, and times attention if asked to.

    Returns:
        The kind of engine (see `open_engine`), the plan and the attention, as plain data that can
        be sent to the other ranks.

    Raises:
        UserError: it does not fit, or the attention cannot do what is asked.
    """
    kind, plan = plan_parallel(config, compute, budget, rank)
    shape = attention_shape(config, compute, plan)
    return kind, plan, get_attention(config.attention, shape)


def attention_shape(config: TrainConfig, compute: Compute, plan: MemoryPlan) -> AttentionShape:
    """The function says what attention of a micro-batch is asked for."""
    # The backward pass of qk-norm rotates back, whatever the attention.
    is_apart = config.model.use_differential_attention or config.model.qk_norm
    return AttentionShape.of_model(
        config.model,
        device=compute.device,
        dtype=compute.dtype,
        seq_len=config.seq_len,
        micro_batch_size=plan.micro_batch_size,
        document_mask=config.document_mask,
        folds_rope=compute.kernels == "triton" and not is_apart,
    )


def can_record(config: TrainConfig, compute: Compute, attention: str) -> bool:
    """Forward and backward can be one CUDA graph unless something in them forbids it: the plain ops
    wait for the GPU in places, flash-attn does with documents, compiled code has graphs of its own,
    and `Engine.records_parts` says where what the processes send does."""
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
        config,
        budget,
        precision=compute.precision,
        fused=compute.kernels == "triton",
        policies=memory.parse(config.recompute, config.model.num_layers),
        max_micro_batch_tokens=compute.max_micro_batch_tokens,
        parallelism=parallelism,
    )
