"""Muon (Jordan et al. 2024): momentum, each matrix's update made orthogonal, decoupled decay.

    momentum += (1 - beta) * (clip_coef * grad - momentum)
    update    = (1 - beta) * clip_coef * grad + beta * momentum           Nesterov
    update    = 0.2 sqrt(max(m, n)) * U V^T,  where update = U S V^T      of each logical matrix
    master   -= lr * weight_decay * master + lr * update
    param     = master, rounded

U V^T comes from an iteration that drives every singular value towards 1 (Newton-Schulz; here with
the coefficients of Polar Express, Amsel et al. 2025, arXiv:2505.16932, each step's the best for
what the one before it leaves). With X the wide side of a matrix, m <= n, one step is

    G = X X^T,   Q = a I + b G + c G G,   X <- Q X

Q commutes with G, so several steps need X only at their ends ("Gram Newton-Schulz"): the product
of their Q is gathered while G <- Q G Q. Only small m x m products are left, all of them symmetric,
and `symmetric_product` computes half of each: the tiles on and below the diagonal, of which it
stores a mirrored copy. Rounding errors of G grow like a^2 a step where eigenvalues are small, and
turn them negative, which the polynomials carry away: so G is computed anew from X after the first
two steps, in whose coefficients a is large, and float16 holds it, not bfloat16. Measured against
the same steps in fp32 this is closer than X in bfloat16 all the way (tests/kernels/test_muon.py).
Four steps are 10 m^3 + 6 m^2 n FLOPs, against 4 m^3 + 12 m^2 n with X all the way.

A model keeps several logical matrices in one parameter (q, k and v; gate and up; the experts):
`splits` says where they part, and matrices of one shape go through the iteration together, over all
layers. Nothing is copied for that: the updates of all layers are written into one tensor, of which
each kind of logical matrix is a strided view, read transposed where it is tall.

Bytes that must move, an element, beside the matmuls, for bf16 with a split master (adamw.py): grad
read (2), momentum read and written (8), update written (2) and read (2), param and remainder read
and written (8): 22, four fewer than AdamW's, whose second moment is not there. For the 270M hidden
weights of option A the iteration's four steps are 2.9 TFLOP, 4 ms at 690 TFLOP/s and 41 ms at 71.2.

A clip_coef that is not finite changes nothing, as in adamw.py.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.adamw import (
    CONFIGS,
    element_type,
    join_master,
    load_master,
    split_master,
    store_master,
    table_chunk,
    table_entry,
    tensor_table,
)
from hamner.kernels.checks import (
    check_contiguous,
    check_dtype,
    check_like,
    check_same_device,
    check_shape,
)
from hamner.kernels.launch import capability, define_in_place

POLAR_EXPRESS = (
    (8.089256959190564, -22.297789245260553, 15.747758400660448),
    (3.943378132484332, -2.784615046554493, 0.5038087073896522),
    (3.4729456505183145, -2.5005020560788345, 0.47892752482413115),
    (2.5523222055131347, -1.8868219743979882, 0.4426195090056677),
)
"""(a, b, c) of each step, the best four for singular values from 0.003 to 1, which come into
0.76-1.23 (arXiv:2505.16932, algorithm 1, with its safety of 1.02 and cushion of 0.02)"""
SAFETY = 1.02
"""X is divided by so many Frobenius norms: rounding must not lift a singular value above 1, from
where the first step's polynomial would carry it away"""
RMS = 0.2
"""root mean square of AdamW's updates, which Muon's are scaled to"""
FIRST_STEPS = 2
"""of the iteration, after which the Gram matrix is computed anew"""
SMALLEST_NORM = 1e-15
"""of Frobenius, below which an update counts as zero"""


class ProductConfig(NamedTuple):
    """Rows and columns of an output tile, the step along K, warps, pipeline stages."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int


PRODUCT_CONFIGS = {
    "8.6": ProductConfig(128, 32, 8, 4),
    "8.0": ProductConfig(128, 32, 8, 4),
    "9.0": ProductConfig(128, 64, 4, 3),
}
FLOAT32_PRODUCT = ProductConfig(32, 32, 4, 1)


@triton.jit
def symmetric_product_kernel(
    x_ptr,  # (B, M, K) input dtype
    y_ptr,  # (B, M, K) input dtype
    addend_ptr,  # (B, M, M), symmetric, or None
    factors_ptr,  # (B,) fp32, or None
    out_ptr,  # (B, M, M)
    stride_b,  # of x and y
    stride_m,
    stride_k,
    M,
    K,
    product_factor,
    addend_factor,
    identity_factor,
    EVEN: tl.constexpr,  # M is a multiple of BLOCK, and K of BLOCK_K
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The result is factor (product_factor x y^T + addend_factor addend + identity_factor I)."""
    blocks = tl.cdiv(M, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    pid = tl.program_id(0)
    batch = (pid // tiles).to(tl.int64)
    # Tiles on and below the diagonal, row by row: row r begins at r (r + 1) / 2.
    tile = pid % tiles
    row = ((tl.sqrt_rn((8 * tile + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    column = tile - row * (row + 1) // 2

    offs = tl.arange(0, BLOCK)
    offs_k = tl.arange(0, BLOCK_K)
    rows = M - row * BLOCK
    columns = M - column * BLOCK
    # The position of a tile is 64-bit, offsets inside it 32-bit.
    left_ptr = x_ptr + batch * stride_b + tl.cast(row * BLOCK, tl.int64) * stride_m
    right_ptr = y_ptr + batch * stride_b + tl.cast(column * BLOCK, tl.int64) * stride_m
    offs_x = offs[:, None] * stride_m + offs_k[None, :] * stride_k
    step = tl.cast(BLOCK_K, tl.int64) * stride_k
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            left = tl.load(left_ptr + offs_x)
            right = tl.load(right_ptr + offs_x)
        else:
            mask_k = offs_k[None, :] < K - start
            left = tl.load(left_ptr + offs_x, mask=(offs[:, None] < rows) & mask_k, other=0.0)
            right = tl.load(right_ptr + offs_x, mask=(offs[:, None] < columns) & mask_k, other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
        left_ptr += step
        right_ptr += step

    out = acc * product_factor
    lower = (batch * M + row * BLOCK) * M + column * BLOCK
    offs_out = offs[:, None] * M + offs[None, :]
    mask = (offs[:, None] < rows) & (offs[None, :] < columns)
    if addend_ptr is not None:
        addend = tl.load(addend_ptr + lower + offs_out, mask=mask, other=0.0)
        out += addend.to(tl.float32) * addend_factor
    is_diagonal = (row == column) & (offs[:, None] == offs[None, :])
    out += tl.where(is_diagonal, identity_factor, 0.0)
    if factors_ptr is not None:
        out *= tl.load(factors_ptr + batch)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + lower + offs_out, out, mask=mask)
    if row != column:
        upper = (batch * M + column * BLOCK) * M + row * BLOCK
        tl.store(out_ptr + upper + offs_out, tl.trans(out), mask=tl.trans(mask))


@triton.jit
def momentum_kernel(
    addresses_ptr,  # (3, num_tensors) int64: grads, momenta, updates
    numels_ptr,  # (num_tensors,) int64
    chunks_ptr,  # (programs, 2) int32
    num_tensors,
    clip_coef_ptr,  # () fp32
    beta,
    one_minus_beta,
    GRAD: tl.constexpr,
    UPDATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, numel = table_chunk(numels_ptr, chunks_ptr, CHUNK, ALIGNED)
    grad_ptr = table_entry(addresses_ptr, 0, tensor, num_tensors, GRAD, ALIGNED)
    momentum_ptr = table_entry(addresses_ptr, 1, tensor, num_tensors, tl.float32, ALIGNED)
    update_ptr = table_entry(addresses_ptr, 2, tensor, num_tensors, UPDATE, ALIGNED)
    clip_coef = tl.load(clip_coef_ptr).to(tl.float32)
    # A skipped step's update is zero, not what memory held: nothing else is iterated on.
    is_finite = tl.abs(clip_coef) < float("inf")
    end = tl.where(is_finite, numel, 0)
    clip_coef = tl.where(is_finite, clip_coef, 0.0)
    for first in range(0, CHUNK, BLOCK):
        offs = start + first + tl.arange(0, BLOCK)
        mask = offs < end
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32) * clip_coef
        momentum = tl.load(momentum_ptr + offs, mask=mask, other=0.0)
        momentum += one_minus_beta * (grad - momentum)
        update = one_minus_beta * grad + beta * momentum
        tl.store(momentum_ptr + offs, momentum, mask=mask)
        tl.store(update_ptr + offs, update.to(UPDATE), mask=offs < numel)


@triton.jit
def apply_kernel(
    addresses_ptr,  # (3, num_tensors) int64: masters, updates, params if any
    numels_ptr,  # (num_tensors,) int64
    chunks_ptr,  # (programs, 2) int32
    num_tensors,
    clip_coef_ptr,  # () fp32
    lr,
    decay,
    MASTER: tl.constexpr,  # fp32, or int16: the remainder beside param
    UPDATE: tl.constexpr,
    PARAM: tl.constexpr,  # of the copy of master, or of what its remainder is beside; or None
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update is master -= decay * master, then master -= lr * update."""
    tensor, start, numel = table_chunk(numels_ptr, chunks_ptr, CHUNK, ALIGNED)
    master_ptr = table_entry(addresses_ptr, 0, tensor, num_tensors, MASTER, ALIGNED)
    update_ptr = table_entry(addresses_ptr, 1, tensor, num_tensors, UPDATE, ALIGNED)
    param_ptr = None
    if PARAM is not None:
        stored: tl.constexpr = tl.int16 if tl.int16 == MASTER else PARAM
        param_ptr = table_entry(addresses_ptr, 2, tensor, num_tensors, stored, ALIGNED)
    clip_coef = tl.load(clip_coef_ptr).to(tl.float32)
    end = tl.where(tl.abs(clip_coef) < float("inf"), numel, 0)
    for first in range(0, CHUNK, BLOCK):
        offs = start + first + tl.arange(0, BLOCK)
        mask = offs < end
        update = tl.load(update_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        master = load_master(master_ptr, param_ptr, offs, mask)
        master -= decay * master
        master -= lr * update
        store_master(master, master_ptr, param_ptr, offs, mask, PARAM)


def _launch_symmetric_product(
    x: Tensor,
    y: Tensor,
    addend: Tensor | None,
    factors: Tensor | None,
    out: Tensor,
    product_factor: float,
    addend_factor: float,
    identity_factor: float,
) -> None:
    batch, rows, depth = x.shape
    config = FLOAT32_PRODUCT
    if x.dtype != torch.float32:
        config = PRODUCT_CONFIGS[capability(x.device)]
    blocks = triton.cdiv(rows, config.block)
    programs = batch * (blocks * (blocks + 1) // 2)
    if programs:
        with torch.cuda.device_of(x):
            symmetric_product_kernel[(programs,)](
                x, y, addend, factors, out, *x.stride(), rows, depth,
                product_factor, addend_factor, identity_factor,
                EVEN=rows % config.block == 0 and depth % config.block_k == 0,
                BLOCK=config.block, BLOCK_K=config.block_k,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip


define_in_place("hamner::symmetric_product_", _launch_symmetric_product, mutates=("out",))


def symmetric_product(
    x: Tensor,
    y: Tensor | None = None,
    *,
    product_factor: float = 1.0,
    addend: Tensor | None = None,
    addend_factor: float = 0.0,
    identity_factor: float = 0.0,
    factors: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The op computes a polynomial of symmetric matrices, by half.

    The result is factors (product_factor x y^T + addend_factor addend + identity_factor I).

    It computes the tiles on and below the diagonal and mirrors the others.

    Args:
        x: (B, M, K) float32, float16 or bfloat16, any strides.
        y: (B, M, K) of the dtype and the strides of x, such that x y^T is symmetric but for
            rounding; x itself by default.
        product_factor: of x y^T, summed in float32.
        addend: (B, M, M) float32, float16 or bfloat16, symmetric, contiguous.
        addend_factor: of addend.
        identity_factor: of the identity.
        factors: (B,) float32, by which the whole result is multiplied.
        out_dtype: of the result; that of x by default.

    Returns:
        (B, M, M), contiguous.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_shape("x", x.shape, ("B", "M", "K"))
    check_dtype("x", x)
    y = x if y is None else y
    check_shape("y", y.shape, x.shape)
    check_like("y", y, "x", x)
    if y.stride() != x.stride():
        raise ValueError(f"y has strides {y.stride()}, x has {x.stride()}; they must agree")
    if addend is not None:
        check_shape("addend", addend.shape, (x.shape[0], x.shape[1], x.shape[1]))
        check_dtype("addend", addend)
        check_same_device("addend", addend, "x", x)
        check_contiguous("addend", addend)
    if factors is not None:
        check_shape("factors", factors.shape, (x.shape[0],))
        check_dtype("factors", factors, (torch.float32,))
        check_same_device("factors", factors, "x", x)
        check_contiguous("factors", factors)
    out = x.new_empty((x.shape[0], x.shape[1], x.shape[1]), dtype=out_dtype or x.dtype)
    torch.ops.hamner.symmetric_product_(
        x, y, addend, factors, out=out, product_factor=product_factor,
        addend_factor=addend_factor, identity_factor=identity_factor,
    )  # fmt: skip
    return out


def symmetric_product_reference(
    x: Tensor,
    y: Tensor | None = None,
    *,
    product_factor: float = 1.0,
    addend: Tensor | None = None,
    addend_factor: float = 0.0,
    identity_factor: float = 0.0,
    factors: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The function is `symmetric_product` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = product_factor * (x @ (x if y is None else y).mT).to(wide)
    if addend is not None:
        out = out + addend_factor * addend
    out = out + identity_factor * torch.eye(x.shape[1], device=x.device)
    if factors is not None:
        out = out * factors[:, None, None]
    return out.to(out_dtype or x.dtype)


Coefficients = Sequence[tuple[float, float, float]]
Product = Callable[..., Tensor]


def orthogonalize_(
    updates: Tensor,
    splits: Sequence[int],
    coefficients: Coefficients = POLAR_EXPRESS,
    safety: float = SAFETY,
    product: Product = symmetric_product,
) -> None:
    """The function replaces each logical matrix by 0.2 sqrt(max(m, n)) times its U V^T, in place.

    Args:
        updates: (B, R, C), contiguous, float32, float16 or bfloat16.
        splits: rows of the logical matrices, R in all; neighbours of one size are iterated on
            together.
        coefficients: (a, b, c) of each step of the iteration, more than `FIRST_STEPS`.
        safety: what the Frobenius norm is multiplied by before X is divided by it.
        product: `symmetric_product` or its reference.

    Raises:
        ValueError: the splits are not R rows.
    """
    check_contiguous("updates", updates)
    if sum(splits) != updates.shape[1]:
        raise ValueError(f"splits {tuple(splits)} are not the {updates.shape[1]} rows of updates")
    if updates.numel() == 0:
        return
    start = 0
    for rows, neighbours in itertools.groupby(splits):
        end = start + rows * len(list(neighbours))
        packed = updates[:, start:end].unflatten(1, (-1, rows))
        start = end
        # A copy where the parameter packs other matrices beside several of this size.
        matrices = packed.reshape(-1, *packed.shape[2:])
        _orthogonalize_together_(matrices, coefficients, safety=safety, product=product)
        if matrices.data_ptr() != packed.data_ptr():
            packed.copy_(matrices.view_as(packed))


def _orthogonalize_together_(
    matrices: Tensor, coefficients: Coefficients, *, safety: float, product: Product
) -> None:
    """The function is `orthogonalize_` for (B, rows, columns) matrices, each of them a logical one.

    G and the product of the Q are float16 where the matrices are bfloat16: their elements are at
    most their largest singular value, 32, and bfloat16 would round eight times as coarsely.
    """
    is_wide = matrices.shape[1] <= matrices.shape[2]
    dtype = torch.float16 if matrices.dtype == torch.bfloat16 else matrices.dtype
    norm = torch.linalg.vector_norm(
        matrices, dim=(1, 2), dtype=torch.promote_types(matrices.dtype, torch.float32)
    )
    # X is never divided by its norm: its Gram matrix is, and the first steps' product.
    factors = 1.0 / (safety * norm.clamp(min=SMALLEST_NORM))
    gram = product(matrices if is_wide else matrices.mT, factors=factors.square(), out_dtype=dtype)
    transform = _transform(
        gram, coefficients[:FIRST_STEPS], product, factors=factors, out_dtype=matrices.dtype
    )
    x = torch.bmm(*((transform, matrices) if is_wide else (matrices, transform)))
    gram = product(x if is_wide else x.mT, out_dtype=dtype)
    transform = _transform(gram, coefficients[FIRST_STEPS:], product, out_dtype=matrices.dtype)
    scale = RMS * math.sqrt(max(matrices.shape[1:]))
    matrices.baddbmm_(*((transform, x) if is_wide else (x, transform)), beta=0, alpha=scale)


def _transform(gram: Tensor, steps: Coefficients, product: Product, **ends_with) -> Tensor:
    """The function gives the product of the steps' Q, of which the last has these options."""
    transform = None
    for number, (a, b, c) in enumerate(steps):
        is_last = number == len(steps) - 1
        polynomial = product(
            gram, product_factor=c, addend=gram, addend_factor=b, identity_factor=a,
            **(ends_with if is_last and transform is None else {}),
        )  # fmt: skip
        if transform is None:
            transform = polynomial
        else:
            transform = product(polynomial, transform, **(ends_with if is_last else {}))
        if not is_last:
            gram = product(product(polynomial, gram), polynomial)
    return transform


def _launch_momentum(
    grads: list[Tensor],
    momenta: list[Tensor],
    updates: list[Tensor],
    clip_coef: Tensor,
    beta: float,
) -> None:
    torch.autograd.graph.increment_version((*momenta, *updates))
    config = CONFIGS[capability(clip_coef.device)]
    table = tensor_table([grads, momenta, updates], config.chunk)
    with torch.cuda.device_of(clip_coef):
        momentum_kernel[(len(table.chunks),)](
            table.addresses, table.numels, table.chunks, len(grads), clip_coef, beta, 1.0 - beta,
            GRAD=element_type(grads), UPDATE=element_type(updates),
            ALIGNED=table.is_aligned, CHUNK=config.chunk, BLOCK=config.block,
            num_warps=config.warps,
        )  # fmt: skip


define_in_place("hamner::muon_momentum_", _launch_momentum, mutates=("momenta", "updates"))


def _launch_apply(
    params: list[Tensor],  # empty where they are the masters
    masters: list[Tensor],
    updates: list[Tensor],
    clip_coef: Tensor,
    lr: float,
    decay: float,
) -> None:
    torch.autograd.graph.increment_version((*params, *masters))
    config = CONFIGS[capability(clip_coef.device)]
    table = tensor_table([masters, updates, *([params] if params else [])], config.chunk)
    with torch.cuda.device_of(clip_coef):
        apply_kernel[(len(table.chunks),)](
            table.addresses, table.numels, table.chunks, len(masters), clip_coef, lr, decay,
            MASTER=element_type(masters), UPDATE=element_type(updates),
            PARAM=element_type(params),
            ALIGNED=table.is_aligned, CHUNK=config.chunk, BLOCK=config.block,
            num_warps=config.warps,
        )  # fmt: skip


define_in_place("hamner::muon_apply_", _launch_apply, mutates=("params", "masters"))


@torch.no_grad()
def muon_momentum_(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    beta: float,
    clip_coef: Tensor,
) -> None:
    """The op takes gradients into momenta, in place, and writes Nesterov's updates.

    Args:
        grads: float32, float16 or bfloat16, contiguous, any shapes.
        momenta: float32, of the same shapes.
        updates: float32, float16 or bfloat16, of the same shapes; written, with zeros where
            clip_coef is not finite.
        beta: decay of the momenta, in [0, 1).
        clip_coef: () float32 on the device, multiplies the gradients; where it is not finite the
            momenta stay as they are.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta is {beta}; it must be in [0, 1)")
    for grad, momentum, update in zip(grads, momenta, updates, strict=True):
        check_dtype("grad", grad)
        check_dtype("momentum", momentum, (torch.float32,))
        check_dtype("update", update)
        for name, tensor in (("grad", grad), ("momentum", momentum), ("update", update)):
            check_shape(name, tensor.shape, grad.shape)
            check_same_device(name, tensor, "clip_coef", clip_coef)
            check_contiguous(name, tensor)
    if grads:
        torch.ops.hamner.muon_momentum_(
            list(grads), list(momenta), list(updates), clip_coef=clip_coef, beta=beta
        )


@torch.no_grad()
def muon_apply_(
    params: Sequence[Tensor],
    masters: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    clip_coef: Tensor,
) -> None:
    """The op takes master -= lr (weight_decay master + update), in place, and rounds it to param.

    Args:
        params: what the model computes with; or `masters` themselves, when those are float32.
        masters: float32, or the int16 remainders beside bfloat16 params (adamw.py).
        updates: float32, float16 or bfloat16. All three have the same shapes and are contiguous.
        lr: learning rate.
        weight_decay: decoupled; times lr.
        clip_coef: () float32 on the device; nothing changes where it is not finite.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    for param, master, update in zip(params, masters, updates, strict=True):
        check_dtype("master", master, (torch.float32, torch.int16))
        check_dtype("update", update)
        check_dtype(
            "param", param, (torch.bfloat16,) if master.dtype == torch.int16 else (param.dtype,)
        )
        for name, tensor in (("param", param), ("master", master), ("update", update)):
            check_shape(name, tensor.shape, master.shape)
            check_same_device(name, tensor, "clip_coef", clip_coef)
            check_contiguous(name, tensor)
    if params:
        is_whole = all(param is master for param, master in zip(params, masters, strict=True))
        torch.ops.hamner.muon_apply_(
            [] if is_whole else list(params), list(masters), list(updates),
            clip_coef=clip_coef, lr=lr, decay=lr * weight_decay,
        )  # fmt: skip


@torch.no_grad()
def muon_momentum_reference_(
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    beta: float,
    clip_coef: Tensor,
) -> None:
    """The function is `muon_momentum_` in plain torch, in the dtype of the momenta."""
    is_finite = clip_coef.isfinite()
    for grad, momentum, update in zip(grads, momenta, updates, strict=True):
        grad = torch.where(is_finite, grad.to(momentum.dtype) * clip_coef, 0.0)
        new_momentum = momentum.lerp(grad, 1.0 - beta)
        update.copy_(torch.where(is_finite, grad.lerp(new_momentum, beta), 0.0))
        momentum.copy_(torch.where(is_finite, new_momentum, momentum))


@torch.no_grad()
def muon_apply_reference_(
    params: Sequence[Tensor],
    masters: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    clip_coef: Tensor,
) -> None:
    """The function is `muon_apply_` in plain torch, in the dtype of master; split ones' float32."""
    is_finite = clip_coef.isfinite()
    for param, master, update in zip(params, masters, updates, strict=True):
        is_split = master.dtype == torch.int16
        weight = join_master(param, master) if is_split else master
        weight = weight - lr * weight_decay * weight - lr * update.to(weight.dtype)
        new_param, new_master = (
            split_master(weight) if is_split else (weight.to(param.dtype), weight)
        )
        master.copy_(torch.where(is_finite, new_master, master))
        param.copy_(torch.where(is_finite, new_param, param))
