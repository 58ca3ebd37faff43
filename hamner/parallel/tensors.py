"""Tensors of which a process may hold a part only: FSDP2's DTensor, told by its `to_local`.

Its type is not imported before one is made: that takes half a second, which most starts can spare.
"""

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of an ordinary one, its shard of a DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy `whole`, which every process has, into a tensor or this process's shard of it."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        # Without a source rank nothing is sent: each process cuts its part out of its own copy.
        whole = distribute_tensor(
            whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    local(tensor).copy_(local(whole))
