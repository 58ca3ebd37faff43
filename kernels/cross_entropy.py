"""The output projection and the cross-entropy need not hold the logits of the whole batch.

    logits = hidden @ weight^T
    loss = mean over kept rows of  logsumexp(logits) - logits[target] + z_loss * logsumexp(logits)^2

Tokens are taken a chunk at a time. Of one chunk: logits by matmul; one kernel turns each row of
logits into its loss and, in place, into d_logits (softmax in fp32); two matmuls make d_hidden and
add to d_weight. So gradients are formed in forward, and backward only scales them. They are kept as
gradients of the *sum* of losses, and divided by the number of kept rows in that same scaling: the
count never has to reach the host, and fp16 d_logits do not underflow. The z-loss is PaLM's
(Chowdhery et al. 2022, arXiv:2204.02311).

d_weight is accumulated over chunks in fp32: chunk after chunk of bf16 additions costs model
quality. The matmul adds to the fp32 buffer itself (cuBLAS, bf16 in, fp32 out), which costs one read
and one write of the buffer a chunk.

Bytes and FLOPs, N tokens, V vocabulary, D width, C chunks, 2-byte elements:

    matmuls     6 N V D FLOPs
    logits      write, read, write, and two reads by matmuls       10 N V
    d_weight    read and write in fp32, each chunk                  8 V D C

For N 24,576, V 49,152, D 1024 the matmuls are 7.4 TFLOP: 11.4 ms at 650 TFLOP/s, 114 ms at 65. The
softmax pass between them reads and writes the logits once, 4 N V = 4.8 GB: 1.6 ms at 3.0 TB/s,
5.7 ms at 850 GB/s; C = 7 chunks add 2.8 GB.

Memory beyond the gradients themselves: chunk * V * 2 bytes of logits and V * D * 4 of d_weight. A
larger chunk passes fewer times over d_weight and gives the matmuls more rows; a smaller one takes
less memory. The default gives the logits of a chunk at most 0.35 GiB (3,584 tokens above, in seven
chunks; 0.52 GiB in all). Each further chunk costs 8 V D bytes: 0.13 ms at 3.0 TB/s. Smaller
chunks would let the logits stay in L2, but at 50 MB of L2 that is 512 tokens, and 48 passes over
d_weight cost more than the logits do.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import (
    check_dtype,
    check_like,
    check_positive,
    check_same_device,
    check_shape,
)
from hamner.kernels.launch import capability

LOGITS_BYTES = int(0.35 * 2**30)
CHUNK_MULTIPLE = 128  # keeps the matmuls' tiles full


class Config(NamedTuple):
    """A program handles `block_v` elements of a row of logits at once."""

    block_v: int
    warps: int


# A row is read twice: more elements a thread leave fewer rows in flight, which stay in L2 until
# they are read again. As measured, 9.0 on an H100, the others on an H200 that executes sm_86's code
# (profiles/LOG.md).
CONFIGS = {
    "8.6": Config(16384, 8),
    "8.0": Config(16384, 8),
    "9.0": Config(16384, 8),
}
SCALE_BLOCK, SCALE_WARPS = 2048, 4


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (rows, V) input dtype; overwritten by d_logits if WRITE_GRADIENT
    targets_ptr,  # (rows,) int64
    losses_ptr,  # (rows,) fp32
    ignore_index,
    z_loss,
    V: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    target = tl.load(targets_ptr + row)
    offs = tl.arange(0, BLOCK_V)

    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if WRITE_GRADIENT:
            for start in range(0, V, BLOCK_V):
                zeros = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + offs, zeros, mask=start + offs < V)
    else:
        is_valid = (target >= 0) & (target < V)
        # Read before the reductions below, whose barriers put it before any thread's overwriting.
        target_logit = tl.load(logits_ptr + target, mask=is_valid, other=0.0).to(tl.float32)
        row_max = -float("inf")
        row_sum = 0.0
        for start in range(0, V, BLOCK_V):
            logits = tl.load(
                logits_ptr + start + offs, mask=start + offs < V, other=-float("inf")
            ).to(tl.float32)
            new_max = tl.maximum(row_max, tl.max(logits, axis=0))
            row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(tl.exp(logits - new_max), axis=0)
            row_max = new_max
        logsumexp = row_max + tl.log(row_sum)

        loss = logsumexp - target_logit + z_loss * logsumexp * logsumexp
        # An invalid target cannot raise without a host sync; NaN is the loud answer left.
        nan = float("nan")
        tl.store(losses_ptr + row, tl.where(is_valid, loss, nan))
        if WRITE_GRADIENT:
            # exp(logits - logsumexp) would carry logsumexp's rounding into the whole row.
            scale = tl.where(is_valid, 1.0 + 2.0 * z_loss * logsumexp, nan) / row_sum
            for start in range(0, V, BLOCK_V):
                mask = start + offs < V
                logits = tl.load(logits_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
                gradient = scale * tl.exp(logits - row_max)
                gradient -= tl.where(start + offs == target, 1.0, 0.0)
                # Streamed past the cache, which holds the rows that are to be read a second time.
                tl.store(
                    logits_ptr + start + offs,
                    gradient.to(logits_ptr.dtype.element_ty),
                    mask=mask,
                    cache_modifier=".cs",
                )


@triton.jit
def scale_kernel(
    x_ptr,  # (numel,) gradient of the sum of losses
    out_ptr,  # (numel,) gradient of what backward was called on
    d_loss_ptr,  # () fp32: upstream gradient of the mean loss
    num_kept_ptr,  # () int64
    numel,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    num_kept = tl.maximum(tl.load(num_kept_ptr), 1).to(tl.float32)
    scale = tl.load(d_loss_ptr).to(tl.float32) / num_kept
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (x * scale).to(out_ptr.dtype.element_ty), mask=mask)


def launch_cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    ignore_index: int,
    z_loss: float,
    *,
    write_gradient: bool,
) -> None:
    """The launcher writes the losses of rows; on request the logits become their gradient."""
    num_rows, vocabulary = logits.shape
    config = CONFIGS[capability(logits.device)]
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(num_rows,)](
            logits, targets, losses, ignore_index, z_loss,
            V=vocabulary, WRITE_GRADIENT=write_gradient,
            BLOCK_V=min(config.block_v, triton.next_power_of_2(vocabulary)),
            num_warps=config.warps,
        )  # fmt: skip


def launch_scale(x: Tensor, d_loss: Tensor, num_kept: Tensor, dtype: torch.dtype) -> Tensor:
    """The launcher gives x * d_loss / num_kept in a new tensor of this dtype."""
    out = torch.empty_like(x, dtype=dtype)
    with torch.cuda.device_of(x):
        scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
            x, out, d_loss, num_kept, x.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS
        )
    return out


def default_chunk_size(num_tokens: int, vocabulary: int, element_size: int) -> int:
    """The chunks are equal, each with at most 0.35 GiB of logits (at least 128 tokens)."""
    limit = LOGITS_BYTES // (vocabulary * element_size) // CHUNK_MULTIPLE * CHUNK_MULTIPLE
    num_chunks = triton.cdiv(num_tokens, max(limit, CHUNK_MULTIPLE))
    return triton.cdiv(triton.cdiv(num_tokens, max(num_chunks, 1)), CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def _add_matmul_(accumulator: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """An fp32 accumulator takes a @ b without rounding the product to the dtype of a and b.

    The first product is written over what is there, which need not be zeroed and read then.
    """
    if not a.is_cuda:  # torch has no mixed matmul on the CPU
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        torch.addmm(accumulator, a, b, beta=0 if is_first else 1, out=accumulator)
    elif is_first:
        torch.mm(a, b, out_dtype=torch.float32, out=accumulator)
    else:
        torch.addmm(accumulator, a, b, out_dtype=torch.float32, out=accumulator)


@torch.library.custom_op("hamner::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    chunk_size: int | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    num_tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    num_kept = (targets != ignore_index).sum()
    losses = hidden.new_empty(num_tokens, dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if needs_gradient else hidden.new_empty(0)
    make_d_weight = weight.new_empty if num_tokens else weight.new_zeros
    d_weight = make_d_weight(weight.shape if needs_gradient else 0, dtype=torch.float32)

    if chunk_size is None:
        chunk_size = default_chunk_size(num_tokens, vocabulary, hidden.element_size())
    logits_buffer = hidden.new_empty(min(chunk_size, num_tokens), vocabulary)
    for start in range(0, num_tokens, max(chunk_size, 1)):
        chunk = slice(start, min(start + chunk_size, num_tokens))
        logits = torch.mm(hidden[chunk], weight.t(), out=logits_buffer[: chunk.stop - start])
        launch_cross_entropy_(
            logits, targets[chunk], losses[chunk],
            ignore_index=ignore_index, z_loss=z_loss, write_gradient=needs_gradient,
        )  # fmt: skip
        if needs_gradient:
            d_logits = logits
            torch.mm(d_logits, weight, out=d_hidden[chunk])
            _add_matmul_(d_weight, d_logits.t(), hidden[chunk], is_first=start == 0)
    loss = losses.sum() / num_kept.clamp(min=1)
    return loss, d_hidden, d_weight, num_kept


@_linear_cross_entropy_op.register_fake
def _(hidden, weight, targets, ignore_index, z_loss, chunk_size, needs_gradient):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if needs_gradient else 0),
        weight.new_empty(weight.shape if needs_gradient else 0, dtype=torch.float32),
        targets.new_empty((), dtype=torch.int64),
    )


@torch.library.custom_op("hamner::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward_op(
    d_loss: Tensor, d_hidden: Tensor, d_weight: Tensor, num_kept: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        launch_scale(d_hidden, d_loss, num_kept, d_hidden.dtype),
        launch_scale(d_weight, d_loss, num_kept, d_hidden.dtype),
    )


@_linear_cross_entropy_backward_op.register_fake
def _(d_loss, d_hidden, d_weight, num_kept):
    return d_hidden.new_empty(d_hidden.shape), d_hidden.new_empty(d_weight.shape)


def _linear_cross_entropy_setup_context(ctx, inputs, output):
    _, d_hidden, d_weight, num_kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(d_hidden, d_weight, num_kept)
    ctx.save_for_backward(d_hidden, d_weight, num_kept)


def _linear_cross_entropy_backward(ctx, d_loss, _d_d_hidden, _d_d_weight, _d_num_kept):
    d_hidden, d_weight = _linear_cross_entropy_backward_op(d_loss, *ctx.saved_tensors)
    return d_hidden, d_weight, None, None, None, None, None


_linear_cross_entropy_op.register_autograd(
    _linear_cross_entropy_backward, setup_context=_linear_cross_entropy_setup_context
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """The loss is the mean cross-entropy of hidden @ weight^T over the kept targets.

    Without gradients to form (under `torch.no_grad`, or when nothing requires one) none are.
    Nothing waits for the GPU.

    Args:
        hidden: (N, D) float32, float16 or bfloat16.
        weight: (V, D), dtype of hidden; may be tied to an embedding.
        targets: (N,) int64, one token id a row. Labels are not shifted here.
        ignore_index: rows with this target are left out of the loss, its mean and the gradients.
        z_loss: weight of logsumexp(logits)^2, added to each kept row's loss.
        chunk_size: rows whose logits exist at a time. Extra memory is chunk_size * V elements and,
            for gradients, V * D * 4 bytes; a smaller chunk saves the first and passes more often
            over the second. None: equal chunks of at most 0.35 GiB of logits.

    Returns:
        () float32. 0, with gradients 0, when no target is kept. A target that is neither a token id
        (0 to V - 1) nor ignore_index makes the loss and its gradients NaN: it cannot raise without
        waiting for the GPU, and reads nothing out of bounds.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_dtype("hidden", hidden)
    check_shape("hidden", hidden.shape, ("tokens", "width"))
    num_tokens, width = hidden.shape
    check_like("weight", weight, "hidden", hidden)
    check_shape("weight", weight.shape, ("vocabulary", width))
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the vocabulary is empty")
    check_dtype("targets", targets, (torch.int64,))
    check_shape("targets", targets.shape, (num_tokens,))
    check_same_device("targets", targets, "hidden", hidden)
    if chunk_size is not None:
        check_positive("chunk_size", chunk_size)
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _linear_cross_entropy_op(
        hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss,
        chunk_size=chunk_size, needs_gradient=needs_gradient,
    )[0]  # fmt: skip


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    """It is `linear_cross_entropy` in plain torch, with the logits whole.

    The softmax is computed in float64 for float64 input, else in float32. The loss has that dtype.
    """
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = torch.nn.functional.linear(hidden, weight).to(compute)
    is_kept = targets != ignore_index
    is_valid = (targets >= 0) & (targets < weight.shape[0])
    logsumexp = torch.logsumexp(logits, dim=-1)
    target_logit = logits.gather(1, torch.where(is_valid, targets, 0)[:, None])[:, 0]
    losses = logsumexp - target_logit + z_loss * logsumexp.square()
    losses = torch.where(is_valid, losses, torch.nan)
    return torch.where(is_kept, losses, 0.0).sum() / is_kept.sum().clamp(min=1)
