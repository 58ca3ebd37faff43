"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) updates parameters in one pass.

    g = clip_coef * grad
    exp_avg    += (1 - beta1) * (g - exp_avg)
    exp_avg_sq += (1 - beta2) * (g^2 - exp_avg_sq)
    master *= 1 - lr * weight_decay
    master -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)
    param = master, rounded

Fused, in mixed precision: gradient clipping, both moments, the fp32 master's update and its
half-precision copy. Everything is in place, and one launch updates all parameters of a kind. A
clip_coef that is not finite leaves all of it unchanged: the decision to skip a bad step is taken on
the GPU, so nothing waits for it.

A bf16 param is the upper half of its master's bits, up to rounding, so of the master only the
int16 remainder needs to be stored beside it (`split_master`; the param remainders of NVIDIA Apex's
DistributedFusedAdam). The update is the same, on the whole fp32 master.

Bytes that must move, an element, for bf16: reads param and remainder (4), both moments (8) and grad
(2), writes all but grad (12): 26. A whole fp32 master is read and written (8), param only written
(2): 28. The floor is bytes / bandwidth. For 321M parameters 26 are 8.3 GB: 2.8 ms at 3.0 TB/s,
9.8 ms at 850 GB/s. The norm before it reads grad once more, 0.64 GB.

A model's parameters are a hundred tensors and more, many of them small. A launch for each leaves
the GPU half empty at its beginning and end. Here programs look their tensor up instead: its address
in a table, and the number of their chunk of it in a list.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import (
    SUPPORTED_DTYPES,
    check_contiguous,
    check_dtype,
    check_same_device,
    check_shape,
)
from hamner.kernels.launch import capability, define_in_place


class Config(NamedTuple):
    """A program updates `chunk` elements, `block` of them at a time, with its warps."""

    chunk: int
    block: int
    warps: int


# 8 elements a thread are two 16-byte loads from each fp32 state and one from a bf16 gradient. As
# measured, 9.0 on an H100, the others on an H200 that executes sm_86's code (profiles/LOG.md).
CONFIGS = {
    "8.6": Config(1024, 1024, 4),
    "8.0": Config(1024, 1024, 4),
    "9.0": Config(2048, 2048, 8),
}
STATE = ("param", "master", "grad", "exp_avg", "exp_avg_sq")
ALIGNMENT = 16
"""bytes of an address, and elements of a tensor, that let every access be as wide as possible"""
# Of the norm: 32 elements a thread, so that 321M parameters make 39,000 partial sums.
NORM_BLOCK, NORM_WARPS = 8192, 8
QUIET_NAN = tl.constexpr(0x7FC00000)
"""bits of the NaN that every NaN of a master becomes: rounding would carry some into -0.0"""


@triton.jit
def table_entry(
    addresses_ptr,  # (columns, num_tensors) int64
    column: tl.constexpr,
    tensor,
    num_tensors,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The pointer is that of a tensor's first element."""
    pointer = tl.load(addresses_ptr + column * num_tensors + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def table_chunk(
    numels_ptr,  # (tensors,) int64
    chunks_ptr,  # (programs, 2) int32
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A program has a tensor, the first element of its chunk, and the tensor's size."""
    program = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * program)
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    numel = tl.load(numels_ptr + tensor)
    if ALIGNED:
        numel = tl.multiple_of(numel, 16)
    return tensor, start, numel


@triton.jit
def bias_correction(step, log_beta):
    """The correction is 1 - beta^step = -expm1(step * log(beta)), to fp32 rounding.

    Near 0, where the subtraction would cancel, by expm1's series, which is exact to fp32 after
    eight terms when its argument is within 0.5.
    """
    z = step * log_beta
    series = 1.0
    for n in tl.static_range(8, 1, -1):
        series = 1.0 + z / n * series
    return -tl.where(z > -0.5, z * series, tl.exp(z) - 1.0)


@triton.jit
def load_master(
    master_ptr,  # fp32, or int16: the remainder beside param
    param_ptr,  # int16 beside a remainder: the bits of bf16
    offs,
    mask,
):
    """A master is fp32, joined on the bits as in join_master where it is split."""
    if master_ptr.dtype.element_ty == tl.int16:
        # No sum here leaves int32.
        upper = tl.load(param_ptr + offs, mask=mask, other=0).to(tl.int32) << 16
        bits = upper + tl.load(master_ptr + offs, mask=mask, other=0).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
    else:
        master = tl.load(master_ptr + offs, mask=mask, other=0.0)
    return master


@triton.jit
def store_master(
    master,  # fp32
    master_ptr,  # as in load_master
    param_ptr,  # the same, or of the copy of master, or None
    offs,
    mask,
    PARAM: tl.constexpr,  # of the copy of master
):
    """The master is stored whole, with its copy if any, or split as in split_master."""
    if master_ptr.dtype.element_ty == tl.int16:
        bits = tl.where(master == master, master.to(tl.int32, bitcast=True), QUIET_NAN)
        remainder = bits.to(tl.int16)
        tl.store(master_ptr + offs, remainder, mask=mask)
        upper = bits - remainder.to(tl.int32)
        tl.store(param_ptr + offs, (upper >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(master_ptr + offs, master, mask=mask)
        if PARAM is not None:
            tl.store(param_ptr + offs, master.to(PARAM), mask=mask)


@triton.jit
def adamw_kernel(
    addresses_ptr,  # (5, num_tensors) int64: masters, grads, exp_avgs, exp_avg_sqs, params if any
    numels_ptr,  # (num_tensors,) int64
    chunks_ptr,  # (programs, 2) int32
    num_tensors,
    clip_coef_ptr,  # () fp32
    lr_ptr,  # () fp32, or None: lr
    lr,
    step_ptr,  # () any dtype, or None: step
    step,
    one_minus_beta1,
    log_beta1,
    one_minus_beta2,
    log_beta2,
    eps,
    weight_decay,
    MASTER: tl.constexpr,  # fp32, or int16: the remainder beside param
    GRAD: tl.constexpr,  # any dtype
    PARAM: tl.constexpr,  # of the copy of master, or of what its remainder is beside; or None
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, numel = table_chunk(numels_ptr, chunks_ptr, CHUNK, ALIGNED)
    master_ptr = table_entry(addresses_ptr, 0, tensor, num_tensors, MASTER, ALIGNED)
    grad_ptr = table_entry(addresses_ptr, 1, tensor, num_tensors, GRAD, ALIGNED)
    exp_avg_ptr = table_entry(addresses_ptr, 2, tensor, num_tensors, tl.float32, ALIGNED)
    exp_avg_sq_ptr = table_entry(addresses_ptr, 3, tensor, num_tensors, tl.float32, ALIGNED)
    param_ptr = None
    if PARAM is not None:
        stored: tl.constexpr = tl.int16 if tl.int16 == MASTER else PARAM
        param_ptr = table_entry(addresses_ptr, 4, tensor, num_tensors, stored, ALIGNED)

    clip_coef = tl.load(clip_coef_ptr).to(tl.float32)
    # Nothing is read or written when clip_coef is not finite; NaN compares as not less.
    end = tl.where(tl.abs(clip_coef) < float("inf"), numel, 0)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.float32)
    correction1 = bias_correction(step, log_beta1)
    correction2 = bias_correction(step, log_beta2)

    for first in range(0, CHUNK, BLOCK):
        offs = start + first + tl.arange(0, BLOCK)
        mask = offs < end
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32) * clip_coef
        exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0)
        master = load_master(master_ptr, param_ptr, offs, mask)

        exp_avg += one_minus_beta1 * (grad - exp_avg)
        exp_avg_sq += one_minus_beta2 * (grad * grad - exp_avg_sq)
        denominator = tl.sqrt(exp_avg_sq) / tl.sqrt(correction2) + eps
        master -= lr * weight_decay * master
        master -= lr / correction1 * (exp_avg / denominator)

        tl.store(exp_avg_ptr + offs, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=mask)
        store_master(master, master_ptr, param_ptr, offs, mask, PARAM)


@triton.jit
def sum_squares_kernel(
    addresses_ptr,  # (1, num_tensors) int64
    numels_ptr,  # (num_tensors,) int64
    chunks_ptr,  # (programs, 2) int32
    partial_ptr,  # (programs,) fp32
    num_tensors,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, numel = table_chunk(numels_ptr, chunks_ptr, BLOCK, ALIGNED)
    x_ptr = table_entry(addresses_ptr, 0, tensor, num_tensors, DTYPE, ALIGNED)
    offs = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x * x, axis=0))


class TensorTable(NamedTuple):
    """A kernel finds its operands by this table on their device."""

    addresses: Tensor  # (columns, tensors) int64
    numels: Tensor  # (tensors,) int64
    chunks: Tensor  # (programs, 2) int32: a tensor, and the number of a chunk of it
    is_aligned: bool  # whether ALIGNMENT divides all addresses and sizes


def tensor_table(columns: Sequence[Sequence[Tensor]], chunk_size: int) -> TensorTable:
    """The table is of tensors worked on together: columns[0][i], columns[1][i] and so on.

    Nothing waits for the GPU, and a table that was asked for before is not built again: the first
    time must not be while a CUDA graph is recorded.

    Args:
        columns: of equally many contiguous tensors each, with the sizes of columns[0]; on one
            device.
        chunk_size: elements a program works on.
    """
    device = columns[0][0].device
    numels = tuple(tensor.numel() for tensor in columns[0])
    addresses = tuple(tuple(tensor.data_ptr() for tensor in column) for column in columns)
    is_aligned = math.gcd(*numels, *itertools.chain(*addresses)) % ALIGNMENT == 0
    chunks = _chunks(numels, chunk_size, device)
    return TensorTable(
        _on_device(addresses, device), _on_device(numels, device), chunks, is_aligned
    )


@functools.lru_cache(maxsize=32)
def _on_device(values: tuple, device: torch.device) -> Tensor:
    return _copied(torch.tensor(values, dtype=torch.int64), device)


@functools.lru_cache(maxsize=32)
def _chunks(numels: tuple[int, ...], chunk_size: int, device: torch.device) -> Tensor:
    """The chunks of `TensorTable` come tensor by tensor, those of each in their order."""
    counts = torch.tensor([triton.cdiv(numel, chunk_size) for numel in numels])
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    first = (counts.cumsum(0) - counts)[tensor]
    number = torch.arange(len(tensor)) - first
    return _copied(torch.stack((tensor, number), dim=1).to(torch.int32), device)


def _copied(values: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for the GPU.
    values = values.pin_memory() if device.type == "cuda" else values
    return values.to(device, non_blocking=True)


def _launch_adamw(
    params: list[Tensor],  # empty where they are the masters
    masters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    clip_coef: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    step_tensor: Tensor | None,
    step: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    torch.autograd.graph.increment_version((*params, *masters, *exp_avgs, *exp_avg_sqs))
    config = CONFIGS[capability(clip_coef.device)]
    columns = [masters, grads, exp_avgs, exp_avg_sqs, *([params] if params else [])]
    table = tensor_table(columns, config.chunk)
    with torch.cuda.device_of(clip_coef):
        adamw_kernel[(len(table.chunks),)](
            table.addresses, table.numels, table.chunks, len(masters), clip_coef,
            lr_tensor, lr, step_tensor, step,
            # On the host in fp64: 1 - 0.999 in fp32 is already off by 1e-5.
            1.0 - beta1, _log(beta1), 1.0 - beta2, _log(beta2), eps, weight_decay,
            MASTER=element_type(masters), GRAD=element_type(grads), PARAM=element_type(params),
            ALIGNED=table.is_aligned, CHUNK=config.chunk, BLOCK=config.block,
            num_warps=config.warps,
        )  # fmt: skip


define_in_place(
    "hamner::adamw_", _launch_adamw, mutates=("params", "masters", "exp_avgs", "exp_avg_sqs")
)


def element_type(tensors: Sequence[Tensor]) -> tl.dtype | None:
    """The tensors, if there are any, have this dtype in Triton."""
    return getattr(tl, str(tensors[0].dtype).removeprefix("torch.")) if tensors else None


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """The function splits fp32 weights into bf16 ones and the int16 remainder that restores them.

    The bits of master are (bits of param << 16) + remainder, so param is master rounded to nearest.
    `Tensor.to(torch.bfloat16)` differs in exact ties alone, which it rounds to even and this away
    from zero. Lossless, also where param overflows to infinity, but for the payload of NaNs.

    Args:
        master: float32, any shape.

    Returns:
        param: bfloat16, shape of master.
        remainder: int16, shape of master.

    Raises:
        TypeError: master is not float32.
    """
    check_dtype("master", master, (torch.float32,))
    bits = torch.where(master.isnan(), QUIET_NAN.value, master.view(torch.int32))
    remainder = bits.to(torch.int16)
    param = ((bits - remainder) >> 16).to(torch.int16).view(torch.bfloat16)
    return param, remainder


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """The function restores the float32 weights that `split_master` split.

    Raises:
        TypeError: param is not bfloat16 or remainder not int16.
    """
    check_dtype("param", param, (torch.bfloat16,))
    check_dtype("remainder", remainder, (torch.int16,))
    bits = (param.detach().view(torch.int16).to(torch.int32) << 16) + remainder
    return bits.view(torch.float32)


@torch.no_grad()
def adamw_(
    param: Tensor | Sequence[Tensor],
    master: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    clip_coef: Tensor,
) -> None:
    """The op takes one step in place, as `torch.optim.AdamW` does, on parameters or shards of them.

    The first five are tensors, or sequences of equally many: parameters of one kind (the same
    dtypes) and of the same scalars, updated by one launch.

    Args:
        param: what the model computes with, any shape; or `master` itself, when that is fp32.
        master: float32 parameter; or the int16 remainder beside a bfloat16 param (`split_master`).
        grad: float32, float16 or bfloat16 gradient.
        exp_avg: float32 first moment.
        exp_avg_sq: float32 second moment. All five have one shape and are contiguous.
        lr: learning rate, or a () float32 tensor on the device.
        betas: decay of the moments, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled; times lr.
        step: number of this step, from 1, or a () tensor on the device.
        clip_coef: () float32 on the device, multiplies grad (`clip_coefficient`). Not finite:
            nothing changes.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    columns = _columns((param, master, grad, exp_avg, exp_avg_sq))
    params, masters, grads, exp_avgs, exp_avg_sqs = columns
    for state in zip(*columns, strict=True):
        _check_parameter(state, clip_coef)
        if [x.dtype for x in state] != [column[0].dtype for column in columns]:
            raise TypeError("parameters updated together must have the same dtypes")
    _check_scalars(betas, lr, step, clip_coef)
    if not params:
        return
    lr_is_tensor, step_is_tensor = isinstance(lr, Tensor), isinstance(step, Tensor)
    beta1, beta2 = betas
    torch.ops.hamner.adamw_(
        [] if all(x is y for x, y in zip(params, masters, strict=True)) else params,
        masters=masters, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs,
        clip_coef=clip_coef,
        lr_tensor=lr if lr_is_tensor else None, lr=0.0 if lr_is_tensor else lr,
        step_tensor=step if step_is_tensor else None, step=0.0 if step_is_tensor else float(step),
        beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip


def _check_scalars(
    betas: tuple[float, float], lr: float | Tensor, step: int | Tensor, clip_coef: Tensor
) -> None:
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} is {beta}; it must be in [0, 1)")
    for name, scalar in (("lr", lr), ("step", step), ("clip_coef", clip_coef)):
        if isinstance(scalar, Tensor) and (
            scalar.numel() != 1 or scalar.device != clip_coef.device
        ):
            raise ValueError(
                f"{name} has {scalar.numel()} elements on {scalar.device}; it must be one, "
                f"on {clip_coef.device}"
            )


def _columns(columns: Sequence[Tensor | Sequence[Tensor]]) -> list[list[Tensor]]:
    """The columns are of equally many tensors, or an error names them."""
    listed = [[column] if isinstance(column, Tensor) else list(column) for column in columns]
    if len({len(column) for column in listed}) > 1:
        raise ValueError(
            f"got {[len(column) for column in listed]} tensors; there must be equally many of "
            f"{', '.join(STATE[:-1])} and {STATE[-1]}"
        )
    return listed


def _check_parameter(state: Sequence[Tensor], clip_coef: Tensor) -> None:
    param, master, grad, exp_avg, exp_avg_sq = state
    if master.dtype == torch.int16 and param.dtype != torch.bfloat16:
        raise TypeError(f"param is {param.dtype}; beside an int16 master it must be bfloat16")
    check_dtype("master", master, (torch.float32, torch.int16))
    check_dtype("exp_avg", exp_avg, (torch.float32,))
    check_dtype("exp_avg_sq", exp_avg_sq, (torch.float32,))
    check_dtype("param", param)
    check_dtype("grad", grad)
    for name, tensor in zip(STATE, state, strict=True):
        check_shape(name, tensor.shape, master.shape)
        check_same_device(name, tensor, "clip_coef", clip_coef)
        check_contiguous(name, tensor)


@torch.library.custom_op("hamner::global_grad_norm", mutates_args=())
def _global_grad_norm_op(grads: list[Tensor]) -> Tensor:
    by_dtype = ([grad for grad in grads if grad.dtype == dtype] for dtype in SUPPORTED_DTYPES)
    kinds = [[grad.contiguous() for grad in kind] for kind in by_dtype if kind]
    tables = [tensor_table([kind], NORM_BLOCK) for kind in kinds]
    counts = [len(table.chunks) for table in tables]
    partials = grads[0].new_empty(sum(counts), dtype=torch.float32)
    with torch.cuda.device_of(partials):
        for kind, table, part in zip(kinds, tables, partials.split(counts), strict=True):
            sum_squares_kernel[(len(part),)](
                table.addresses, table.numels, table.chunks, part, len(table.numels),
                DTYPE=element_type(kind), ALIGNED=table.is_aligned,
                BLOCK=NORM_BLOCK, num_warps=NORM_WARPS,
            )  # fmt: skip
    return partials.sum().sqrt()


@_global_grad_norm_op.register_fake
def _(grads):
    return grads[0].new_empty((), dtype=torch.float32)


def global_grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The op gives the 2-norm of all gradients together, without waiting for the GPU.

    One launch for each dtype, whose partial sums are added in a fixed order: torch's multi-tensor
    norm leaves its fast path when half-precision gradients are to be summed in fp32.

    Args:
        grads: float32, float16 or bfloat16 gradients of any shapes, on one device; at least one.

    Returns:
        () float32; not finite when any gradient is not.

    Raises:
        ValueError: grads is empty.
        TypeError: another dtype.
    """
    _check_grads(grads)
    return _global_grad_norm_op(list(grads))


def _check_grads(grads: Sequence[Tensor]) -> None:
    if not grads:
        raise ValueError("grads is empty; there is no device to put the norm on")
    for grad in grads:
        check_dtype("a gradient", grad)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Gradients of this norm, multiplied by the coefficient, have a norm of at most max_norm.

    Args:
        norm: () float32, from `global_grad_norm`.
        max_norm: the limit; `math.inf` clips nothing.

    Returns:
        () float32: min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`, but NaN
        for a norm that is not finite, at which `adamw_` skips the step.
    """
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), coefficient, torch.nan)


def global_grad_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """It is `global_grad_norm` in plain torch."""
    _check_grads(grads)
    # `dtype`, or the norms of bf16 gradients would be rounded to bf16 before they are combined.
    norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def adamw_reference_(
    param, master, grad, exp_avg, exp_avg_sq, *, lr, betas, eps, weight_decay, step, clip_coef
) -> None:
    """It is `adamw_` in plain torch, in the dtype of master; of a split one in float32."""
    beta1, beta2 = betas
    states = zip(*_columns((param, master, grad, exp_avg, exp_avg_sq)), strict=True)
    for param, master, grad, exp_avg, exp_avg_sq in states:
        is_split = master.dtype == torch.int16
        weight = join_master(param, master) if is_split else master
        step = torch.as_tensor(step, dtype=torch.float64, device=weight.device)
        correction1 = (1.0 - beta1**step).to(weight.dtype)
        correction2 = (1.0 - beta2**step).to(weight.dtype)
        grad = grad.to(weight.dtype) * clip_coef
        new_exp_avg = exp_avg.lerp(grad, 1.0 - beta1)
        new_exp_avg_sq = exp_avg_sq.lerp(grad.square(), 1.0 - beta2)
        denominator = new_exp_avg_sq.sqrt() / correction2.sqrt() + eps
        weight = weight - lr * weight_decay * weight
        weight = weight - lr / correction1 * (new_exp_avg / denominator)
        new_param, new_master = weight.to(param.dtype), weight
        if is_split:
            new_param, new_master = split_master(weight)
        is_finite = clip_coef.isfinite()
        for state, new_state in (
            (exp_avg, new_exp_avg),
            (exp_avg_sq, new_exp_avg_sq),
            (master, new_master),
            (param, new_param),
        ):
            state.copy_(torch.where(is_finite, new_state, state))
