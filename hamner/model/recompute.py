"""A block runs by its recompute policy, and single tensors are made again in backward."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hamner.plan.memory import FULL, SELECTIVE, Policy


def run_block(policy: Policy, block: Callable, x: Tensor, residual: Tensor | None, *args):
    """The function runs `block(x, residual, *args, recompute=...)` and returns what that returns.

    Autograd keeps what the policy says; `full` runs under torch's non-reentrant checkpoint.
    """
    if policy != FULL:
        return block(x, residual, *args, recompute=policy == SELECTIVE)
    # One summed stream is kept instead of the branch and the residual apart.
    stream = x if residual is None else x + residual
    return checkpoint(
        block, stream, None, *args, recompute=True, use_reentrant=False, preserve_rng_state=False
    )


@contextlib.contextmanager
def recomputed_in_backward(tensor: Tensor, recompute: Callable[[], Tensor]) -> Iterator[None]:
    """Autograd calls `recompute` in backward for what it would keep of `tensor` in this context.

    All readers share one recomputed value, which is let go of after the last of them. Where saved
    tensors have hooks already (a block that is checkpointed as a whole keeps nothing of it anyway)
    or the code is being compiled, it keeps the tensor.

    Args:
        tensor: contiguous, all of its storage; it, or views of it, are saved by operations in the
            context.
        recompute: returns a tensor of the same values, shape and dtype; holds what that takes, and
            not `tensor`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _is_hooked():
        yield
        return
    address = tensor.untyped_storage().data_ptr()
    readers = left = 0
    value: Tensor | None = None

    def pack(saved: Tensor):
        nonlocal readers
        if saved.untyped_storage().data_ptr() != address:
            return saved
        readers += 1
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(kept: Tensor | tuple) -> Tensor:
        nonlocal left, value
        if isinstance(kept, Tensor):
            return kept
        if not left:
            with torch.no_grad():
                left, value = readers, recompute()
        view = value.as_strided(*kept)
        left -= 1
        if not left:
            value = None
        return view

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _is_hooked() -> bool:
    """The answer is whether saved tensors have hooks already: autograd asks those set last alone.

    There is no public way to see them.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
