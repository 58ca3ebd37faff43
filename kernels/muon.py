"""Muon (Jordan et al. 2024): momentum, each matrix's update made orthogonal, decoupled decay.

    momentum += (1 - beta) * (clip_coef * grad - momentum)
    update    = (1 - beta) * clip_coef * grad + beta * momentum           Nesterov
    update    = 0.2 sqrt(max(m, n)) * U V^T,  where update = U S V^T      of each logical matrix
    master   -= lr * weight_decay * master + lr * update
    param     = master, rounded

U V^T comes from an iteration that drives every singular value towards 1. With X the wide side of a
matrix, m <= n, its two steps are

    G = X X^T,   X <- T(G) X

Newton-Schulz has a quadratic T in each of four or five steps (Polar Express, Amsel et al. 2025,
arXiv:2505.16932, with coefficients that are each step's best for what the one before it leaves).
Here T is quadratics one after the other, which is a polynomial of degree 16 in G for four products
of symmetric m x m matrices, and of degree 8 for three: two steps do what four quintics do, which
with X multiplied only at two ends ("Gram Newton-Schulz") take ten such products. All of them are of
a matrix with its own transpose, and `symmetric_product` computes half of each: the tiles on and
below the diagonal, of which it stores a mirrored copy.

One step would do without the second X and G, but rounding leaves G no small eigenvalues: the second
is computed from what the first step has lifted. float16 holds G and its polynomials, not bfloat16.
Measured against the same steps in fp64 the result is closer than quintics on X in bfloat16
(tests/kernels/test_muon.py, profiles/LOG.md). In all 7 m^3 + 6 m^2 n FLOPs; quintics on X would be
4 m^3 + 12 m^2 n.

A model keeps several logical matrices in one parameter (q, k and v; gate and up; the experts):
`splits` says where they part, and matrices of one shape go through the iteration together, over all
layers. Nothing is copied for that: the updates of all layers are written into one tensor, of which
each kind of logical matrix is a strided view, read transposed where it is tall. The m x m products
of all kinds with one m are one launch: few matrices leave a part of the GPU idle at its end.

Bytes that must move, an element, beside the matmuls, for bf16 with a split master (adamw.py): grad
read (2), momentum read and written (8), update written (2) and read (2), param and remainder read
and written (8): 22, four fewer than AdamW's, whose second moment is not there. For the 270M hidden
weights of option A the iteration is 2.5 TFLOP, 4 ms at 690 TFLOP/s and 35 ms at 71.2.

A clip_coef that is not finite changes nothing, as in adamw.py.
"""

import math
from collections import defaultdict
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
    check_same_device,
    check_shape,
)
from hamner.kernels.launch import capability, define_in_place


class Step(NamedTuple):
    """A step multiplies X by a polynomial of G = scale X X^T, quadratic after quadratic:

    Y = G, then Y <- square Y Y + linear Z + constant I, where Z is G if `adds_gram`, else Y.
    """

    scale: float
    quadratics: tuple[tuple[float, float, float], ...]
    """(square, linear, constant)"""
    adds_gram: bool = False


STEPS = (
    Step(
        128.0,
        (
            (0.03176248084367252, -4.172934823796818, 0.0),
            (0.023926944855978474, 3.559991318108019, 0.0),
            (-0.00937082059840711, -1.6165908743214075, 0.0),
            (0.012258402933930011, -1.4694267674949268, 44.76112243812889),
        ),
    ),
    Step(
        1.0,
        (
            (0.411983509783345, -1.7384473275445926, 1.161726821195274),
            (1.6130665867477771, -0.056784103090464944, -0.30930534661160414),
            (1.5213756770975542, -0.32382796479980064, 1.3666053559553961),
        ),
        adds_gram=True,
    ),
)
"""Of degree 33 and 17 in singular values, found by minimax over such quadratics, the second step's
for what the first leaves: 0.003 to 1 comes into 0.13-1.87 and then into 0.796-1.204, and what is
smaller is multiplied by 299 (four steps of Polar Express for the same interval: 0.76-1.23, 283).
Where float16 would round small eigenvalues coarsely, they are kept small, as polynomials that are 0
at 0, and scaled up, as far as no square leaves float16."""
SAFETY = 1.02
"""X is divided by so many Frobenius norms: rounding must not lift a singular value above 1, from
where the first step's polynomial would carry it away"""
RMS = 0.2
"""root mean square of AdamW's updates, which Muon's are scaled to"""
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
    addend_ptr,  # (B, M, M), symmetric, or None
    factors_ptr,  # (B,) fp32, or None
    out_ptr,  # (B, M, M)
    stride_b,  # of x
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
    """The result is factor (product_factor x x^T + addend_factor addend + identity_factor I)."""
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
    right_ptr = x_ptr + batch * stride_b + tl.cast(column * BLOCK, tl.int64) * stride_m
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
                x, addend, factors, out, *x.stride(), rows, depth,
                product_factor, addend_factor, identity_factor,
                EVEN=rows % config.block == 0 and depth % config.block_k == 0,
                BLOCK=config.block, BLOCK_K=config.block_k,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip


define_in_place("hamner::symmetric_product_", _launch_symmetric_product, mutates=("out",))


def symmetric_product(
    x: Tensor,
    *,
    product_factor: float = 1.0,
    addend: Tensor | None = None,
    addend_factor: float = 0.0,
    identity_factor: float = 0.0,
    factors: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The op computes a matrix times its own transpose, by half, and adds to it.

    The result is factors (product_factor x x^T + addend_factor addend + identity_factor I). It
    computes the tiles on and below the diagonal and mirrors the others.

    Args:
        x: (B, M, K) float32, float16 or bfloat16, any strides.
        product_factor: of x x^T, summed in float32.
        addend: (B, M, M) float32, float16 or bfloat16, symmetric, contiguous.
        addend_factor: of addend.
        identity_factor: of the identity.
        factors: (B,) float32, by which the whole result is multiplied.
        out: (B, M, M) float32, float16 or bfloat16, contiguous, not x or addend; written. By
            default a new one of the dtype of x.

    Returns:
        out.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_shape("x", x.shape, ("B", "M", "K"))
    check_dtype("x", x)
    square = (x.shape[0], x.shape[1], x.shape[1])
    out = x.new_empty(square) if out is None else out
    for name, tensor in (("addend", addend), ("out", out)):
        if tensor is not None:
            check_shape(name, tensor.shape, square)
            check_dtype(name, tensor)
            check_same_device(name, tensor, "x", x)
            check_contiguous(name, tensor)
    if factors is not None:
        check_shape("factors", factors.shape, (x.shape[0],))
        check_dtype("factors", factors, (torch.float32,))
        check_same_device("factors", factors, "x", x)
        check_contiguous("factors", factors)
    torch.ops.hamner.symmetric_product_(
        x, addend, factors, out=out, product_factor=product_factor,
        addend_factor=addend_factor, identity_factor=identity_factor,
    )  # fmt: skip
    return out


def symmetric_product_reference(
    x: Tensor,
    *,
    product_factor: float = 1.0,
    addend: Tensor | None = None,
    addend_factor: float = 0.0,
    identity_factor: float = 0.0,
    factors: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The function is `symmetric_product` in plain torch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    result = product_factor * (x @ x.mT).to(wide)
    if addend is not None:
        result = result + addend_factor * addend
    result = result + identity_factor * torch.eye(x.shape[1], device=x.device)
    if factors is not None:
        result = result * factors[:, None, None]
    return result.to(x.dtype) if out is None else out.copy_(result)


Product = Callable[..., Tensor]


def orthogonalize_(
    updates: Sequence[Tensor],
    splits: Sequence[Sequence[int]],
    steps: Sequence[Step] = STEPS,
    safety: float = SAFETY,
    product: Product = symmetric_product,
) -> None:
    """The function replaces each logical matrix by 0.2 sqrt(max(m, n)) times its U V^T, in place.

    Args:
        updates: (B, R, C) each, contiguous, float32, bfloat16 or, with Frobenius norms from 1e-3
            to 1e3, float16, of one dtype.
        splits: of each, rows of the logical matrices, R in all. Matrices whose shorter sides are
            equal go through the iteration together.
        steps: of the iteration, two or more.
        safety: what the Frobenius norm is multiplied by before X is divided by it.
        product: `symmetric_product` or its reference.

    Raises:
        ValueError: the splits are not R rows, or there are fewer than two steps.
    """
    if len(steps) < 2:
        raise ValueError(f"steps has {len(steps)}; the iteration takes at least 2")
    by_side = defaultdict(list)
    for update, rows in zip(updates, splits, strict=True):
        check_contiguous("updates", update)
        if sum(rows) != update.shape[1]:
            raise ValueError(f"splits {tuple(rows)} are not the {update.shape[1]} rows of updates")
        for matrices in _logical_matrices(update, rows):
            if matrices.numel():
                by_side[min(matrices.shape[1:])].append(matrices)
    for together in by_side.values():
        _orthogonalize_together_(together, steps, safety=safety, product=product)


def _logical_matrices(update: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """The function views (B, R, C) as few tensors (B', rows, C) of a logical matrix each."""
    if len(set(rows)) == 1:
        return [update.view(-1, rows[0], update.shape[2])]
    return update.split(list(rows), dim=1)


def _orthogonalize_together_(
    matrices: Sequence[Tensor], steps: Sequence[Step], *, safety: float, product: Product
) -> None:
    """The function is `orthogonalize_` for (B, rows, columns) tensors with the same shorter side,
    each element of B being a logical matrix."""
    wide = torch.promote_types(matrices[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(x, dim=(1, 2), dtype=wide) for x in matrices]
    # X is never divided by its norm: its first Gram matrix is, and what multiplies X first.
    factors = 1.0 / (safety * torch.cat(norms).clamp(min=SMALLEST_NORM))
    current = _multiplied(matrices, _transforms(matrices, steps[0], product, factors))
    for step in steps[1:-1]:
        current = _multiplied(current, _transforms(current, step, product))
    transforms = _transforms(current, steps[-1], product)
    for out, x, transform in zip(matrices, current, transforms, strict=True):
        scale = RMS * math.sqrt(max(out.shape[1:]))
        out.baddbmm_(*_in_order(x, transform), beta=0, alpha=scale)


def _multiplied(matrices: Sequence[Tensor], transforms: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(matrices, transforms, strict=True)
    return [torch.bmm(*_in_order(x, transform)) for x, transform in pairs]


def _in_order(x: Tensor, transform: Tensor) -> tuple[Tensor, Tensor]:
    """The transform multiplies a matrix along its shorter side."""
    return (transform, x) if x.shape[1] <= x.shape[2] else (x, transform)


def _transforms(
    matrices: Sequence[Tensor], step: Step, product: Product, factors: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The function gives what a step multiplies its matrices by, after they were multiplied by
    their factors.

    Gram matrices and what is computed of them are float16 where the matrices are bfloat16, which
    would round eight times as coarsely.
    """
    dtype, counts = matrices[0].dtype, [len(x) for x in matrices]
    squared = [None] * len(counts) if factors is None else factors.square().split(counts)
    side = min(matrices[0].shape[1:])
    gram = matrices[0].new_empty(
        (sum(counts), side, side), dtype=torch.float16 if dtype == torch.bfloat16 else dtype
    )
    for x, factor, out in zip(matrices, squared, gram.split(counts), strict=True):
        across = x if x.shape[1] == side else x.mT
        product(across, product_factor=step.scale, factors=factor, out=out)
    polynomial = gram
    for number, (square, linear, constant) in enumerate(step.quadratics, 1):
        is_last = number == len(step.quadratics)
        polynomial = product(
            polynomial, product_factor=square, addend=gram if step.adds_gram else polynomial,
            addend_factor=linear, identity_factor=constant,
            factors=factors if is_last else None,
            out=torch.empty_like(gram, dtype=dtype) if is_last else None,
        )  # fmt: skip
    return polynomial.split(counts)


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
