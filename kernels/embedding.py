"""The embedding shares its weight with the output head: both gradients meet in one tensor.

    x = weight[tokens]
    head_weight = weight                    what the output projection multiplies by

Apart, autograd zeroes a (V, D) tensor, scatters the rows of d_x into it and adds it to the head's
gradient, which is as large: V D elements written, and three times as many moved by the addition,
for N rows that matter. Here backward adds to the head's gradient the rows of the tokens that
occurred, and touches no others:

    order = stable sort of tokens           equal tokens next to each other, in the order they came
    d_head_weight[token] += sum of d_x[i] over tokens[i] == token          in fp32, rounded once

No atomics, so the sums have one order. A program walks the BLOCK_N sorted positions of a block and
sums up the run of one token after the other. A run inside a block is added at once; of a run that
crosses blocks, each part is written as a partial sum and a second kernel adds them up in order:

    partials (2 blocks, D) fp32     2 b      block b's first run, if it goes on from, or to, another
                                    2 b + 1  block b's last run, if it began inside and goes on

Bytes that must move, U tokens that differ, e bytes an element: N D e of d_x, 2 U D e of the head's
gradient. For bf16, N 24,576, D 1024 and U 6,000 that is 75 MB, 25 us at 3.0 TB/s, beside a sort of
N keys; what is saved is 4 V D e = 403 MB for V 49,152.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import check_dtype, check_same_device, check_shape

# As measured on an H100 (profiles/LOG.md): more positions a program or wider rows are no faster.
BLOCK_N, BLOCK_D, NUM_WARPS = 16, 512, 2


@triton.jit
def _add_to_row(d_weight_ptr, token, total, offs_d, D):
    """The function does d_weight[token] += total."""
    mask = offs_d < D
    ptrs = d_weight_ptr + token.to(tl.int64) * D + offs_d
    total += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, total.to(d_weight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def embedding_runs_kernel(
    d_x_ptr,  # (N, D) input dtype
    keys_ptr,  # (N,) int32 tokens, sorted
    order_ptr,  # (N,) int64 rows of d_x in that order
    d_weight_ptr,  # (V, D) input dtype, added to
    partials_ptr,  # (2 blocks, D) fp32
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All runs of a block are added to their rows, or written as the parts of longer ones."""
    block = tl.program_id(0)
    start = block * BLOCK_N
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(keys_ptr + start)
    began_before = tl.load(keys_ptr + start - 1, mask=start > 0, other=-1) == token
    slot = 2 * block
    total = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(BLOCK_N):
        position = start + i
        width = tl.where(position < N, D, 0)
        row = tl.load(order_ptr + position, mask=position < N, other=0)
        total += tl.load(d_x_ptr + row * D + offs_d, mask=offs_d < width, other=0.0).to(tl.float32)
        next_token = tl.load(keys_ptr + position + 1, mask=position + 1 < N, other=-1)
        goes_on = next_token == token
        if (position < N) & ((i == BLOCK_N - 1) | (next_token != token)):
            if goes_on | (began_before & (slot == 2 * block)):
                tl.store(partials_ptr + slot.to(tl.int64) * D + offs_d, total, mask=offs_d < D)
            else:
                _add_to_row(d_weight_ptr, token, total, offs_d, D)
            total = tl.zeros((BLOCK_D,), tl.float32)
            token = next_token
            slot = 2 * block + 1


@triton.jit
def embedding_long_runs_kernel(
    keys_ptr,  # (N,) int32 tokens, sorted
    d_weight_ptr,  # (V, D) input dtype, added to
    partials_ptr,  # (2 blocks, D) fp32
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program adds up the run that starts in its block and goes on into the next ones."""
    block = tl.program_id(0)
    end = (block + 1) * BLOCK_N
    token = tl.load(keys_ptr + end, mask=end < N, other=-1)
    first = tl.load(keys_ptr + block * BLOCK_N)
    last = tl.load(keys_ptr + end - 1, mask=end < N, other=-2)
    before = tl.load(keys_ptr + block * BLOCK_N - 1, mask=block > 0, other=-1)
    # One that fills the block and started before it is another program's.
    if (last != token) | ((first == token) & (before == token)):
        return

    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    slot = 2 * block + tl.where(first == token, 0, 1)
    total = tl.load(partials_ptr + slot.to(tl.int64) * D + offs_d, mask=mask_d, other=0.0)
    next_block = block + 1
    parts = BLOCK_N
    while parts == BLOCK_N:
        blocks = next_block + tl.arange(0, BLOCK_N)
        starts = blocks * BLOCK_N
        is_run = tl.load(keys_ptr + starts, mask=starts < N, other=-1) == token
        ptrs = partials_ptr + (2 * blocks).to(tl.int64)[:, None] * D + offs_d[None, :]
        total += tl.sum(tl.load(ptrs, mask=is_run[:, None] & mask_d[None, :], other=0.0), axis=0)
        parts = tl.sum(is_run.to(tl.int32), axis=0)
        next_block += BLOCK_N
    _add_to_row(d_weight_ptr, token, total, offs_d, D)


@torch.library.custom_op("hamner::add_embedding_gradient_", mutates_args=("d_weight",))
def _add_embedding_gradient_op(d_x: Tensor, tokens: Tensor, d_weight: Tensor) -> None:
    num_tokens, width = tokens.numel(), d_weight.shape[1]
    if num_tokens == 0:
        return
    keys, order = torch.sort(tokens.flatten().to(torch.int32), stable=True)
    blocks = triton.cdiv(num_tokens, BLOCK_N)
    partials = d_x.new_empty(2 * blocks, width, dtype=torch.float32)
    columns = triton.cdiv(width, BLOCK_D)
    launch = {"BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(d_x):
        embedding_runs_kernel[(blocks, columns)](
            d_x.contiguous(), keys, order, d_weight, partials, num_tokens, width, **launch
        )
        embedding_long_runs_kernel[(blocks, columns)](
            keys, d_weight, partials, num_tokens, width, **launch
        )


@_add_embedding_gradient_op.register_fake
def _(d_x, tokens, d_weight):
    return None


class _TiedEmbedding(torch.autograd.Function):
    """It gives two results of one weight, so that backward waits for both gradients."""

    @staticmethod
    def forward(ctx, tokens, weight):
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        ctx.set_materialize_grads(False)
        return torch.nn.functional.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx, d_x, d_head_weight):
        if d_x is None:
            return None, d_head_weight
        (tokens,) = ctx.saved_tensors
        if d_head_weight is None:
            d_head_weight = d_x.new_zeros(ctx.shape)
        d_head_weight = d_head_weight.contiguous()
        torch.ops.hamner.add_embedding_gradient_(d_x, tokens, d_head_weight)
        return None, d_head_weight


def tied_embedding(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The op looks up rows of an embedding whose weight the output head shares.

    Args:
        tokens: (...) int64, from 0 to V - 1.
        weight: (V, D) float32, float16 or bfloat16.

    Returns:
        (x, head_weight): x (..., D), head_weight (V, D), a view of weight. Backward adds to the
        gradient of head_weight in place, so nothing but the output projection should use it.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_dtype("tokens", tokens, (torch.int64,))
    check_dtype("weight", weight)
    check_shape("weight", weight.shape, ("vocabulary", "width"))
    check_same_device("tokens", tokens, "weight", weight)
    return _TiedEmbedding.apply(tokens, weight)


def tied_embedding_reference(tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """This is `tied_embedding` in plain torch."""
    return torch.nn.functional.embedding(tokens, weight), weight
