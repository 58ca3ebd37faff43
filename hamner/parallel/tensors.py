"""A process may hold only a part of a tensor: FSDP2's DTensor, known by its `to_local`.

Its type is not imported before one is made: that takes half a second, which most starts can spare.
"""

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """The function says whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process holds all of an ordinary tensor, and its shard of a DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Every process gets all of a tensor, gathered where it is divided."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """`whole`, which every process has, is copied into a tensor or this process's shard of it."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        # Without a source rank nothing is sent: each process cuts its part out of its own copy.
        whole = distribute_tensor(
            whole.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
    local(tensor).copy_(local(whole))
