"""The module says what a step on several GPUs sends, for how long, and how much the step hides.

Arithmetic alone, torch-free. DDP (Li et al. 2020, arXiv:2006.15704) keeps a copy of the model on
each GPU and all-reduces the gradients. FSDP (Zhao et al. 2023, arXiv:2304.11277) shards parameters,
gradients and optimizer state over the GPUs of a node, replicated across nodes: a block's weights
are all-gathered in bf16 for its forward and again for its backward, its gradients reduce-scattered
in fp32.

Assumed: collectives as fast as their slowest link; matmuls not slowed by those beside them; no
latency, which an all-reduce of a few MB on many nodes does not forgive.
"""

from dataclasses import dataclass
from typing import Literal

from hamner.config.model import ModelConfig
from hamner.errors import UserError
from hamner.plan.costs import BF16, FP32

QUIET = 0.05
"""share of a step below which communication is not worth changing anything for"""


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Each of `ranks` GPUs sends, and receives, 2 (n-1)/n of `size` bytes to sum them.

    A ring's count, and the least there is (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations"); nccl-tests, doc/PERFORMANCE.md, defines its "bus
    bandwidth" by it.
    """
    return 2 * (ranks - 1) / ranks * size


def all_gather_bytes(size: float, ranks: int) -> float:
    """Each GPU sends (n-1)/n of `size` bytes to gather the shards that they are in all.

    A reduce-scatter of `size` bytes sends as many: it is the other half of an all-reduce.
    """
    return (ranks - 1) / ranks * size


@dataclass(frozen=True)
class Parallelism:
    """Parallelism is how a step is spread over GPUs, and what connects them."""

    kind: Literal["auto", "ddp", "fsdp"] = "auto"
    gpus_per_node: int = 1
    nodes: int = 1
    link_gbs: float = 0.0
    """between the GPUs of a node: GB/s each way that a ring reaches"""
    network_gbs: float = 0.0
    """between nodes: GB/s each way, shared by the GPUs of a node"""
    reshard: bool = True
    """fsdp: whether gathered weights are freed between forward and backward"""

    @property
    def ranks(self) -> int:
        """There are this many GPUs in all, one process each."""
        return self.gpus_per_node * self.nodes

    @property
    def shards(self) -> int:
        """Parameters, gradients and optimizer state are cut into this many parts."""
        return self.gpus_per_node if self.kind == "fsdp" else 1

    @property
    def ring_gbs(self) -> float:
        """The slowest link of a ring through all GPUs has this many GB/s."""
        links = [self.link_gbs] * (self.gpus_per_node > 1) + [self.network_gbs] * (self.nodes > 1)
        return min(links)

    def rows_per_gpu(self, batch_size: int) -> int:
        """Each GPU takes this many sequences in a step of `batch_size`.

        Raises:
            UserError: the GPUs cannot share them evenly.
        """
        if batch_size % self.ranks:
            above = -(-batch_size // self.ranks) * self.ranks
            raise UserError(
                f"--batch-size {batch_size} is shared by all GPUs and must be a multiple of "
                f"their number, {self.ranks}: try --batch-size {above}"
            )
        return batch_size // self.ranks


ONE_GPU = Parallelism()


@dataclass(frozen=True)
class Communication:
    """A step communicates this."""

    bytes_sent: float
    """by each GPU, and as many received"""
    ms: float
    """of all collectives"""
    exposed_ms: float
    """of them, what no arithmetic hides: the step is longer by this"""

    def __add__(self, other: "Communication") -> "Communication":
        return Communication(
            self.bytes_sent + other.bytes_sent,
            self.ms + other.ms,
            self.exposed_ms + other.exposed_ms,
        )


def communicate(
    model: ModelConfig,
    parallelism: Parallelism,
    micro_batches: int,
    *,
    forward_ms: float,
    backward_ms: float,
) -> Communication:
    """The function says what a bf16 step sends, and what of it shows.

    Collectives run beside the blocks' arithmetic: DDP's beside the last micro-batch's backward,
    FSDP's beside forward and backward of each. The embedding's cannot: its weights are the first to
    be needed, its gradient the last to be whole.

    Args:
        model: shape.
        parallelism: `kind` "ddp" or "fsdp".
        micro_batches: forward and backward passes of each GPU in a step. DDP sends once a step,
            with several micro-batches their fp32 sums; FSDP with each, across nodes with the last.
        forward_ms: the blocks' forward in one micro-batch.
        backward_ms: the blocks' backward in one micro-batch.
    """
    if parallelism.ranks == 1:
        return Communication(0.0, 0.0, 0.0)
    parameters = model.num_parameters()
    tail = model.vocab_size * model.hidden_size / parameters
    gather_ms = reduce_ms = replicate_ms = sent = 0.0
    if parallelism.kind == "ddp":
        size = parameters * (BF16 if micro_batches == 1 else FP32)
        replicated = all_reduce_bytes(size, parallelism.ranks)
        replicate_ms = replicated / (parallelism.ring_gbs * 1e6)
    else:
        shards, bytes_per_ms = parallelism.shards, parallelism.link_gbs * 1e6
        gathered = all_gather_bytes(parameters * BF16, shards)
        reduced = all_gather_bytes(parameters * FP32, shards)
        replicated = all_reduce_bytes(parameters * FP32 / shards, parallelism.nodes)
        sent = micro_batches * (2 * gathered + reduced)
        gather_ms, reduce_ms = gathered / bytes_per_ms, reduced / bytes_per_ms
        if parallelism.nodes > 1:
            # The GPUs of a node send their shards side by side through its network.
            replicate_ms = replicated * shards / (parallelism.network_gbs * 1e6)

    def exposed_ms(reduce_ms: float) -> float:
        """This shows of one micro-batch whose gradients take `reduce_ms`."""
        return (
            tail * (gather_ms + reduce_ms)
            + max(0.0, (1 - tail) * gather_ms - forward_ms)
            + max(0.0, (1 - tail) * (gather_ms + reduce_ms) - backward_ms)
        )

    return Communication(
        sent + replicated,
        micro_batches * (2 * gather_ms + reduce_ms) + replicate_ms,
        (micro_batches - 1) * exposed_ms(reduce_ms) + exposed_ms(reduce_ms + replicate_ms),
    )


def gather_updates(parameters: int, parallelism: Parallelism) -> Communication:
    """The bf16 updates of so many parameters become whole on every GPU once a step, as Muon needs
    them under FSDP; nothing hides that."""
    if parallelism.shards == 1:
        return Communication(0.0, 0.0, 0.0)
    sent = all_gather_bytes(parameters * BF16, parallelism.shards)
    ms = sent / (parallelism.link_gbs * 1e6)
    return Communication(sent, ms, ms)
