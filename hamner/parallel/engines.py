"""How a model is trained by the processes of a job: alone, with DDP or with FSDP2.

Whatever the engine, a step is that of one process: its micro-batches are dealt to the processes,
each weights its own by their share of the step's kept targets, and gradients are summed.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hamner.config.train import TrainConfig
from hamner.parallel.device import Compute
from hamner.parallel.processes import SingleProcess
from hamner.parallel.tensors import is_sharded, local

GlobalNorm = Callable[[Sequence[Tensor]], Tensor]
"""tensors on a device -> their global 2-norm, () fp32 there"""


class GradientSums(Protocol):
    """What an engine asks of an optimizer: parameters by name, and the sums of their gradients."""

    parameters: dict[str, nn.Parameter]
    accumulated: dict[str, Tensor]

    def accumulate(self) -> None: ...

    def drop_last_gradients(self) -> None: ...


_NEVER = 2**31 - 1
"""steps, DDP's largest number of them"""


class Engine:
    """Everything here; what the other engines change."""

    name = "none"
    warm_up_calls = 2
    """of forward and backward before they can be recorded as a CUDA graph: the first ones compile
    kernels, build tables and load libraries"""

    def shard(self, model: nn.Module) -> None:
        """Divide the parameters of a model on the meta device, before they have values."""

    def parameter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which matrices are held that are computed with in `dtype`."""
        return dtype

    def wrap(self, model: nn.Module, optimizer: GradientSums) -> Callable:
        """What is called for a forward pass with gradients."""
        return model

    @contextlib.contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch of a step."""
        yield

    def can_record(self, micro_batches: int) -> bool:
        """Whether forward and backward of every micro-batch can be one CUDA graph.

        Args:
            micro_batches: of a step, in each process.
        """
        return True

    def backward(self, loss: Tensor) -> None:
        """Leave the gradients of `loss`, 0-d, in the parameters; here processes wait for others."""
        loss.backward()

    def accumulate(self, optimizer: GradientSums, *, is_last: bool) -> None:
        """After a micro-batch of several: keep its gradients for the update."""
        optimizer.accumulate()

    def grad_norm(self, global_norm: GlobalNorm, gradients: Mapping[str, Tensor]) -> Tensor:
        """The global 2-norm of all gradients, () fp32 on the device.

        Before it reads them it finishes the sums over the processes that backward left open.
        """
        return global_norm(list(gradients.values()))

    @contextlib.contextmanager
    def inference(self, model: nn.Module) -> Iterator[None]:
        """Around forward passes without gradients, which every process must make alike."""
        yield


class DataParallel(Engine):
    """The whole model in every process, gradients summed while backward runs (DDP,
    arXiv:2006.15704); once a step, also when it has several micro-batches.

    Args:
        processes: of the job.
        bucket_mib: MiB of gradients that are sent together.
    """

    name = "ddp"
    # DDP arranges its buckets anew in the second, and times the first ten of them, for which the
    # eleventh waits for the GPU.
    warm_up_calls = 11

    def __init__(self, processes: SingleProcess, *, bucket_mib: int) -> None:
        self.processes, self.bucket_mib = processes, bucket_mib

    def wrap(self, model, optimizer):
        """The model in DistributedDataParallel."""
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
        # Never again: a timed step waits for the GPU.
        wrapped._set_ddp_runtime_logging_sample_rate(_NEVER)
        wrapped.register_comm_hook(optimizer, self.sum_bucket)
        # It holds its hook, and so this engine, out of the garbage collector's sight.
        self.wrapped = weakref.ref(wrapped)
        return wrapped

    def sum_bucket(
        self, optimizer: GradientSums, bucket: dist.GradBucket
    ) -> torch.futures.Future[torch.Tensor]:
        """Sum the gradients of a bucket over the processes; called by DDP as they come in.

        Where a step has several micro-batches, the fp32 sums of this process are what is summed,
        this last one added. The bucket itself is then left as it is, and forgotten.
        """
        if not optimizer.accumulated:
            return _sum(bucket.buffer()).then(lambda future: future.value()[0])
        names = [self.names[parameter] for parameter in bucket.parameters()]
        parts = [
            optimizer.accumulated[name].add_(gradient).flatten()
            for name, gradient in zip(names, bucket.gradients(), strict=True)
        ]
        sums = torch.cat(parts)
        for name, gradient, part in zip(
            names, bucket.gradients(), sums.split([len(p) for p in parts]), strict=True
        ):
            optimizer.accumulated[name] = part.view(gradient.shape)
        buffer = bucket.buffer()
        return _sum(sums).then(lambda _: buffer)

    def can_record(self, micro_batches):
        """One that is the last and the first: others send nothing, or sums."""
        return micro_batches == 1

    @contextlib.contextmanager
    def micro_batch(self, *, is_last):
        """Gradients of all but the last micro-batch stay in this process."""
        with contextlib.nullcontext() if is_last else self.wrapped().no_sync():
            yield

    def accumulate(self, optimizer, *, is_last):
        """The last micro-batch is in the sums already."""
        if is_last:
            optimizer.drop_last_gradients()
        else:
            optimizer.accumulate()


class FullySharded(Engine):
    """Parameters, gradients and moments divided over the processes, the weights gathered block by
    block as they are needed (FSDP2; ZeRO, arXiv:1910.02054).

    The shards are the fp32 masters: gathered in the compute dtype, their gradients summed in fp32.
    Vectors (norms, lambdas), a ten-thousandth of the model, are whole everywhere and fp32 as ever.
    With several machines each has the whole model in its processes, and only sums of gradients pass
    between machines (hybrid sharding), once a step. Within a machine every micro-batch reduces its
    gradients, or they would not stay divided.

    Args:
        processes: of the job.
        compute: of this one.
        reshard: free gathered weights after forward and gather them again for backward.
    """

    name = "fsdp"

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
        """`fully_shard` every block, then what is left of the model."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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
            )
            # Sums, not means: the loss is weighted by the whole step's targets.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self.model = model

    def parameter_dtype(self, dtype):
        """Shards are masters."""
        return torch.float32

    def can_record(self, micro_batches):
        """One: gradients add up in tensors that a graph would overwrite."""
        return micro_batches == 1

    @contextlib.contextmanager
    def micro_batch(self, *, is_last):
        """Between machines the gradients of all micro-batches are summed once."""
        self.model.set_requires_all_reduce(is_last)
        yield

    def accumulate(self, optimizer, *, is_last):
        """The parameters' own gradients are fp32 and add up."""

    def grad_norm(self, global_norm, gradients):
        """Of shards and vectors; the vectors' gradients are summed over the processes first."""
        vectors = [gradients[name] for name in gradients if name in self.vectors]
        flat = torch.cat([vector.flatten() for vector in vectors])
        self.processes.sum_(flat)
        for vector, part in zip(vectors, flat.split([v.numel() for v in vectors]), strict=True):
            vector.copy_(part.view_as(vector))
        shards = [local(gradient) for gradient in gradients.values() if is_sharded(gradient)]
        square = global_norm(shards).square()
        dist.all_reduce(square, group=self.mesh.get_group("shard"))
        return (square + global_norm([flat]).square()).sqrt()

    @contextlib.contextmanager
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
                _forget_passes(module)


def open_engine(
    kind: str, processes: SingleProcess, compute: Compute, config: TrainConfig
) -> Engine:
    """The engine named `kind`: none, ddp or fsdp."""
    if kind == "ddp":
        return DataParallel(processes, bucket_mib=config.ddp_bucket_mib)
    if kind == "fsdp":
        return FullySharded(processes, compute, reshard=config.fsdp_reshard)
    return Engine()


def _forget_passes(module: nn.Module) -> None:
    """Drop FSDP2's list of forward passes, which only a backward pass that is not replayed clears:
    with a CUDA graph it would grow as long as the run."""
    state = module._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    if state._fsdp_param_group is not None:
        state._fsdp_param_group._post_forward_indices.clear()


def _sum(tensor: Tensor) -> torch.futures.Future:
    return dist.all_reduce(tensor, async_op=True).get_future()
