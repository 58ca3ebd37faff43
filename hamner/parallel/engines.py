"""The engines train a model with the processes of a job: with one, with DDP or with FSDP2.

Whatever the engine, a step is that of one process: its micro-batches are dealt to the processes,
each weights its own by their share of the step's kept targets, and gradients are summed.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hamner.config.train import TrainConfig
from hamner.parallel.device import Compute
from hamner.parallel.processes import SingleProcess
from hamner.parallel.tensors import is_sharded, local


class GradientSums(Protocol):
    """An optimizer gives an engine its parameters by name, and the sums of their gradients."""

    parameters: dict[str, nn.Parameter]
    accumulated: dict[str, Tensor]

    def accumulate(self) -> None: ...

    def drop_last_gradients(self) -> None: ...


class Engine:
    """An engine does here what one process needs; the others override what they change."""

    name = "none"
    warm_up_calls = 2
    """of forward and backward before they can be recorded as a CUDA graph: the first ones compile
    kernels, build tables and load libraries"""
    records_parts = True
    """whether a CUDA graph can hold the micro-batches of a step that has several in each process"""
    parameter_dtype: torch.dtype | None = None
    """of the matrices as they are held; None is the dtype that they are computed with"""

    def shard(self, model: nn.Module) -> None:
        """The parameters of a model on the meta device are divided, before they have values."""

    def wrap(self, model: nn.Module, optimizer: GradientSums) -> Callable:
        """`wrap` gives what is called for a forward pass with gradients."""
        return model

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager:
        """The context is around forward and backward of one micro-batch of a step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """The gradients of `loss`, 0-d, are left in the parameters; here processes wait for
        others."""
        loss.backward()

    def accumulate(self, optimizer: GradientSums, *, is_last: bool) -> None:
        """The gradients of a micro-batch of several are kept for the update."""
        optimizer.accumulate()

    def grad_norm(
        self, global_norm: Callable[[Sequence[Tensor]], Tensor], gradients: Mapping[str, Tensor]
    ) -> Tensor:
        """`grad_norm` gives the global 2-norm of all gradients, () fp32 on the device.

        Before it reads them it finishes the sums over the processes that backward left open.
        """
        return global_norm(list(gradients.values()))

    def inference(self, model: nn.Module) -> AbstractContextManager:
        """The context is around forward passes without gradients, which every process must make
        alike."""
        return nullcontext()


class DataParallel(Engine):
    """Every process has the whole model, and gradients are summed while backward runs (DDP,
    arXiv:2006.15704); once a step, also when it has several micro-batches.

    Args:
        bucket_mib: MiB of gradients that are sent together.
    """

    name = "ddp"
    # DDP arranges its buckets anew in the second, and times the first ten of them, for which the
    # eleventh waits for the GPU.
    warm_up_calls = 11
    records_parts = False  # those before the last send nothing, and the last one sends sums

    def __init__(self, processes: SingleProcess, *, bucket_mib: int) -> None:
        self.processes, self.bucket_mib = processes, bucket_mib

    def wrap(self, model, optimizer):
        self.names = {parameter: name for name, parameter in optimizer.parameters.items()}
        with warnings.catch_warnings():
            # torch 2.13 has another name for it, torch 2.11 has only this one.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            wrapped = nn.parallel.DistributedDataParallel(
                model,
                # Router biases are moved alike everywhere, by the load of all processes.
                broadcast_buffers=False,
                # Between steps too: a CUDA graph finds its gradients where it left them.
                gradient_as_bucket_view=True,
                bucket_cap_mb=self.bucket_mib,
            )
        # Never again (in DDP's largest number of steps): a timed step waits for the GPU.
        wrapped._set_ddp_runtime_logging_sample_rate(2**31 - 1)
        wrapped.register_comm_hook(optimizer, self.sum_bucket)
        # It holds its hook, and so this engine, out of the garbage collector's sight.
        self.wrapped = weakref.ref(wrapped)
        return wrapped

    def sum_bucket(
        self, optimizer: GradientSums, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """DDP has the gradients of a bucket summed over the processes as they come in.

        Where a step has several micro-batches, the fp32 sums of this process are what is summed,
        this last one added. The bucket itself is then left as it is, and forgotten.
        """
        if not optimizer.accumulated:
            return _sum(bucket.buffer()).then(lambda future: future.value()[0])
        sums = [optimizer.accumulated[self.names[p]] for p in bucket.parameters()]
        for total, gradient in zip(sums, bucket.gradients(), strict=True):
            total.add_(gradient)
        whole = parameters_to_vector(sums)
        vector_to_parameters(whole, sums)
        buffer = bucket.buffer()
        return _sum(whole).then(lambda _: buffer)

    def micro_batch(self, *, is_last):
        """The gradients of all but the last micro-batch stay in this process."""
        return nullcontext() if is_last else self.wrapped().no_sync()

    def accumulate(self, optimizer, *, is_last):
        """The last micro-batch is in the sums already."""
        if is_last:
            optimizer.drop_last_gradients()
        else:
            optimizer.accumulate()


class FullySharded(Engine):
    """Parameters, gradients and moments are divided over the processes, and the weights gathered
    block by block as they are needed (FSDP2; ZeRO, arXiv:1910.02054).

    The shards are the fp32 masters: gathered in the compute dtype, their gradients summed in fp32.
    Vectors (norms, lambdas), a ten-thousandth of the model, are whole everywhere and fp32 as ever.
    With several machines each has the whole model in its processes, and only sums of gradients pass
    between machines (hybrid sharding), once a step. Within a machine every micro-batch reduces its
    gradients, or they would not stay divided.

    Args:
        reshard: free gathered weights after forward and gather them again for backward.
    """

    name = "fsdp"
    records_parts = False  # gradients add up in tensors that a graph would overwrite
    parameter_dtype = torch.float32  # shards are masters

    def __init__(self, processes: SingleProcess, compute: Compute, *, reshard: bool) -> None:
        self.processes, self.compute, self.reshard = processes, compute, reshard
        rank = processes.rank
        if rank.num_machines > 1 and rank.local_world_size > 1:
            shape, names = (rank.num_machines, rank.local_world_size), ("replicate", "shard")
        else:
            shape, names = (rank.world_size,), ("shard",)
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(compute.device.type, shape, mesh_dim_names=names)

    def shard(self, model: nn.Module) -> None:
        """`fully_shard` divides every block, then what is left of the model."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor import Shard

        shards = self.mesh.size(self.mesh.ndim - 1)
        precision = MixedPrecisionPolicy(
            param_dtype=self.compute.dtype,
            reduce_dtype=torch.float32,
            # RoPE's tables are fp32 inputs of a block.
            cast_forward_inputs=False,
        )
        self.vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
        ignored = {parameter for parameter in model.parameters() if parameter.ndim < 2}
        for module in (*model.layers, model):
            fully_shard(
                module,
                mesh=self.mesh,
                mp_policy=precision,
                # Backward begins with what is gathered last: the model's own, which stays.
                reshard_after_forward=self.reshard and module is not model,
                ignored_params=ignored,
                shard_placement_fn=lambda parameter: Shard(shard_axis(parameter.shape, shards)),
            )
            # Sums, not means: the loss is weighted by the whole step's targets.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self.model = model

    def micro_batch(self, *, is_last):
        """Between machines the gradients of all micro-batches are summed once."""
        self.model.set_requires_all_reduce(is_last)
        return nullcontext()

    def accumulate(self, optimizer, *, is_last):
        """The parameters' own gradients are fp32 and add up."""

    def grad_norm(self, global_norm, gradients):
        """The norm is of shards and vectors; vectors' gradients are summed over the processes
        first."""
        vectors = [gradients[name] for name in gradients if name in self.vectors]
        flat = parameters_to_vector(vectors)
        self.processes.sum_(flat)
        for vector, part in zip(vectors, flat.split([v.numel() for v in vectors]), strict=True):
            vector.copy_(part.view_as(vector))
        shards = [local(gradient) for gradient in gradients.values() if is_sharded(gradient)]
        square = global_norm(shards).square()
        dist.all_reduce(square, group=self.mesh.get_group("shard"))
        return (square + global_norm([flat]).square()).sqrt()

    @contextmanager
    def inference(self, model):
        """All processes run the same passes; what is chosen by the logits follows rank 0's."""

        def agree(_, __, output) -> None:
            if output.logits is not None:
                dist.broadcast(output.logits, src=0)

        hook = model.register_forward_hook(agree)
        try:
            yield
        finally:
            hook.remove()
            # Gathered weights that no backward pass frees would be those of this step for ever.
            for module in (*model.layers, model):
                module.reshard()
                # Only a backward pass that is not replayed clears FSDP2's list of forward passes:
                # with a CUDA graph it would grow as long as the run.
                state = module._get_fsdp_state()
                state._comm_ctx.post_forward_order.clear()
                if state._fsdp_param_group is not None:
                    state._fsdp_param_group._post_forward_indices.clear()


def shard_axis(shape: Sequence[int], shards: int) -> int:
    """The function gives the axis along which FSDP2 divides a parameter.

    It is the first, but the rows of every expert where the experts cannot be shared evenly: of
    eight processes four would have no part of four experts, and each gather would send twice as
    much, as FSDP2 pads all parts to the largest. It takes another axis only if that is even.
    """
    has_experts = len(shape) == 3
    return int(has_experts and shape[0] % shards != 0 and shape[1] % shards == 0)


def open_engine(
    kind: str, processes: SingleProcess, compute: Compute, config: TrainConfig
) -> Engine:
    """`open_engine` gives the engine named `kind`: none, ddp or fsdp."""
    if kind == "ddp":
        return DataParallel(processes, bucket_mib=config.ddp_bucket_mib)
    if kind == "fsdp":
        return FullySharded(processes, compute, reshard=config.fsdp_reshard)
    return Engine()


def _sum(tensor: Tensor) -> torch.futures.Future:
    return dist.all_reduce(tensor, async_op=True).get_future()
