"""The experts of a mixture are SwiGLU MLPs over ragged groups of tokens, none dropped.

N tokens of width D, each sent to K of E experts of intermediate size I. The M = N * K assignments
are pairs token * K + slot, which `moe_route` sorted by expert (`order`, `offsets`: moe_routing.py).
"Sorted" rows are in that order, row r holding pair `order[r]`; "by pair" is row token * K + slot.

forward
    gate_up       (M, 2I)   grouped matmul that gathers x by token in its loads; in its epilogue
    hidden        (M, I)    SwiGLU times the routing weight: w * silu(gate) * up
    slots         (M, D)    grouped matmul; row r of the sorted order is stored at its pair order[r]
    out           (N, D)    each token adds up its own K rows of slots
backward
    d_hidden      (M, I)    grouped matmul that gathers d_out by token in its loads
    d_gate_up     (M, 2I)   one pass, which also gives d_weights and, over d_hidden, hidden again
    d_down        (E, D, I) d_out^T hidden over each expert's rows, gathers d_out
    d_gate_up_w   (E, 2I, D) d_gate_up^T x over each expert's rows, gathers x
    d_slots, d_x            grouped matmul stored by pair, then each token adds up its K rows

The routing weight goes on the hidden rows rather than on the expert's output: those are being
written anyway, what is left to combine are plain sums, and the weight's gradient is a dot product
of rows that backward holds: d_weight = <silu(gate) * up, d_hidden>.

x and d_out are never copied M rows long. No atomics. The host never learns a group's size: grids
have the most tiles that M rows can make, ceil(M / BLOCK_M) + E - 1; each program finds its expert
and rows in `offsets`, and those beyond the last tile leave.

Floor: 6 M D I FLOPs forward and 12 M D I backward, those of a dense MLP of intermediate size K * I;
at N 24,576, K 2, D 768, I 1536 that is 0.35 and 0.70 TFLOP, 4.9 and 9.8 ms at 71 TFLOP/s. Beside
the matmuls' own operands these elements move: (K + 1) N D to sum the slots, forward and backward,
and for d_gate_up 6 M I where hidden is recomputed, 5 M I where it was kept.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import (
    check_contiguous,
    check_dtype,
    check_like,
    check_same_device,
    check_shape,
)
from hamner.kernels.launch import capability, swizzled_tile
from hamner.kernels.moe_routing import MAX_EXPERTS, Routing


class Pairs(NamedTuple):
    """The M pairs of a token and a slot are sorted by expert, as in `Routing`."""

    order: Tensor
    offsets: Tensor
    top_k: int


class MatmulConfig(NamedTuple):
    """A program has a tile, BLOCK_K of the reduced dimension at a step, warps and stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    gate_up: MatmulConfig  # BLOCK_N columns of gate and as many of up
    matmul: MatmulConfig
    weight_grad: MatmulConfig


# As measured (`python -m bench.tune grouped_matmul`, profiles/LOG.md), 9.0 on an H100, the others
# on an H200 that executes sm_86's code. There 128 x 128 tiles with three steps of 32 in flight take
# 48 KiB and under 256 registers, so that two blocks share a multiprocessor and one multiplies while
# the other waits for memory or stores its tile; of weight_grad's three do. 8.0 serves 8.9 too,
# which has the same shared memory. On 9.0 wgmma wants wide tiles, but weight_grad must fill 132
# multiprocessors with those of 4 experts. It finds rows through `order`: a step loads its indices
# first, so that the pipeline needs about twice the stages for as many steps in flight.
AMPERE_CONFIG = Config(
    gate_up=MatmulConfig(128, 64, 32, 4, 4),
    matmul=MatmulConfig(128, 128, 32, 4, 4),
    weight_grad=MatmulConfig(128, 64, 32, 4, 6),
)
CONFIGS = {
    "8.6": AMPERE_CONFIG,
    "8.0": AMPERE_CONFIG,
    "9.0": Config(
        gate_up=MatmulConfig(128, 128, 64, 8, 4),
        matmul=MatmulConfig(128, 256, 64, 8, 4),
        weight_grad=MatmulConfig(128, 128, 64, 8, 6),
    ),
}
# float32 is for debugging: exact products, so no tensor cores, and one row for every card.
FLOAT32_CONFIG = Config(
    gate_up=MatmulConfig(32, 32, 16, 4, 2),
    matmul=MatmulConfig(32, 64, 16, 4, 2),
    weight_grad=MatmulConfig(32, 64, 16, 4, 2),
)
# Eight elements a thread: one 16-byte load of bf16 from each input. The blocks divide 768 and 1536.
SWIGLU_GRAD_CONFIG = {"BLOCK_M": 4, "BLOCK_N": 512, "num_warps": 8}
SUM_SLOTS_CONFIG = {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}


def _config(x: Tensor) -> Config:
    return FLOAT32_CONFIG if x.dtype == torch.float32 else CONFIGS[capability(x.device)]


@triton.jit
def _find_rows(
    offsets_ptr,  # (E + 1,) int32
    tile,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A row tile has an expert (E if there is no such tile), a first row, and its expert's end."""
    offs_e = tl.arange(0, triton.next_power_of_2(NUM_EXPERTS))
    mask_e = offs_e < NUM_EXPERTS
    start = tl.load(offsets_ptr + offs_e, mask=mask_e, other=0)
    end = tl.load(offsets_ptr + 1 + offs_e, mask=mask_e, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles, axis=0)
    expert = tl.sum(tl.where(mask_e & (last_tile <= tile), 1, 0), axis=0)
    is_expert = offs_e == expert
    row = tl.sum(tl.where(is_expert, start + (tile - last_tile + tiles) * BLOCK_M, 0), axis=0)
    row_end = tl.sum(tl.where(is_expert, end, 0), axis=0)
    return expert, row, row_end


@triton.jit
def _add_dot(acc, a, b, rows):
    """The result is acc + a @ b, for acc's `rows`."""
    if a.dtype == tl.float32:
        # Each block is summed by itself: one chain over all of the reduced dimension would round at
        # every step. The choice, always the same, keeps the compiler from making it one again.
        block = tl.dot(a, b, input_precision="ieee")
        acc += tl.where(rows[:, None] >= 0, block, 0.0)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _swiglu(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def gate_up_kernel(
    x_ptr,  # (N, D)
    routing_weights_ptr,  # (N, K) fp32
    order_ptr,  # (M,) int32
    offsets_ptr,  # (E + 1,) int32
    weight_ptr,  # (E, 2I, D): rows of gate, then of up
    gate_up_ptr,  # (M, 2I)
    hidden_ptr,  # (M, I)
    stride_x,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n_tiles: tl.constexpr = triton.cdiv(INTERMEDIATE, BLOCK_N)
    m_tile, n_tile = swizzled_tile(tl.num_programs(0) // num_n_tiles, num_n_tiles)
    expert, row, row_end = _find_rows(offsets_ptr, m_tile, NUM_EXPERTS, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return

    rows = row + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    pairs = tl.load(order_ptr + rows, mask=mask_m, other=0)
    tokens = (pairs // TOP_K).to(tl.int64)
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (INTERMEDIATE % BLOCK_N == 0) | (offs_n < INTERMEDIATE)
    offs_k = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + tokens[:, None] * stride_x + offs_k[None, :]
    gate_ptrs = weight_ptr + expert.to(tl.int64) * (2 * INTERMEDIATE * WIDTH)
    gate_ptrs += offs_n[None, :] * WIDTH + offs_k[:, None]
    up_ptrs = gate_ptrs + INTERMEDIATE * WIDTH
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        mask_k = (WIDTH % BLOCK_K == 0) | (offs_k < WIDTH - k)
        # Rows past the group's end read token 0: finite work whose results are never stored.
        x = tl.load(x_ptrs + k, mask=mask_k[None, :], other=0.0)
        mask_w = mask_k[:, None] & mask_n[None, :]
        gate_w = tl.load(gate_ptrs + k, mask=mask_w, other=0.0)
        up_w = tl.load(up_ptrs + k, mask=mask_w, other=0.0)
        gate = _add_dot(gate, x, gate_w, rows)
        up = _add_dot(up, x, up_w, rows)

    mask = mask_m[:, None] & mask_n[None, :]
    gate = gate.to(gate_up_ptr.dtype.element_ty)
    up = up.to(gate_up_ptr.dtype.element_ty)
    rows = rows.to(tl.int64)
    gate_up_ptrs = gate_up_ptr + rows[:, None] * (2 * INTERMEDIATE) + offs_n[None, :]
    tl.store(gate_up_ptrs, gate, mask=mask)
    tl.store(gate_up_ptrs + INTERMEDIATE, up, mask=mask)

    # From the rounded gate and up, so that recomputing it in backward gives the same bits.
    routing_weights = tl.load(routing_weights_ptr + pairs, mask=mask_m, other=0.0)
    hidden = _swiglu(gate.to(tl.float32), up.to(tl.float32)) * routing_weights[:, None]
    hidden_ptrs = hidden_ptr + rows[:, None] * INTERMEDIATE + offs_n[None, :]
    tl.store(hidden_ptrs, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_matmul_kernel(
    a_ptr,  # GATHER: (N, NUM_INNER), row of token; else (M, NUM_INNER), sorted by expert
    weight_ptr,  # (E, NUM_COLS, NUM_INNER) if TRANSPOSED else (E, NUM_INNER, NUM_COLS)
    order_ptr,  # (M,) int32
    offsets_ptr,  # (E + 1,) int32
    out_ptr,  # (M, NUM_COLS). GATHER: sorted by expert; else row of pair
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_COLS: tl.constexpr,
    NUM_INNER: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_n_tiles: tl.constexpr = triton.cdiv(NUM_COLS, BLOCK_N)
    m_tile, n_tile = swizzled_tile(tl.num_programs(0) // num_n_tiles, num_n_tiles)
    expert, row, row_end = _find_rows(offsets_ptr, m_tile, NUM_EXPERTS, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return

    rows = row + tl.arange(0, BLOCK_M)
    mask_m = rows < row_end
    pairs = tl.load(order_ptr + rows, mask=mask_m, other=0)
    # Rows past the group's end read row 0: finite work whose results are never stored.
    if GATHER:
        a_rows = pairs // TOP_K
        out_rows = rows
    else:
        a_rows = tl.where(mask_m, rows, 0)
        out_rows = pairs
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (NUM_COLS % BLOCK_N == 0) | (offs_n < NUM_COLS)
    offs_k = tl.arange(0, BLOCK_K)

    a_ptrs = a_ptr + a_rows.to(tl.int64)[:, None] * NUM_INNER + offs_k[None, :]
    stride_k: tl.constexpr = 1 if TRANSPOSED else NUM_COLS
    stride_n: tl.constexpr = NUM_INNER if TRANSPOSED else 1
    weight_ptrs = weight_ptr + expert.to(tl.int64) * (NUM_COLS * NUM_INNER)
    weight_ptrs += offs_k[:, None] * stride_k + offs_n[None, :] * stride_n
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, NUM_INNER, BLOCK_K):
        mask_k = (NUM_INNER % BLOCK_K == 0) | (offs_k < NUM_INNER - k)
        a = tl.load(a_ptrs + k, mask=mask_k[None, :], other=0.0)
        mask_w = mask_k[:, None] & mask_n[None, :]
        weight = tl.load(weight_ptrs + k * stride_k, mask=mask_w, other=0.0)
        out = _add_dot(out, a, weight, rows)

    out_ptrs = out_ptr + out_rows.to(tl.int64)[:, None] * NUM_COLS + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_kernel(
    d_out_ptr,  # (M, NUM_OUT) sorted by expert, or (N, NUM_OUT) if GATHER_D_OUT
    input_ptr,  # (N, NUM_IN), rows stride_input apart, or (M, NUM_IN) sorted if GATHER_D_OUT
    order_ptr,  # (M,) int32
    offsets_ptr,  # (E + 1,) int32
    d_weight_ptr,  # (E, NUM_OUT, NUM_IN)
    stride_input,
    TOP_K: tl.constexpr,
    NUM_OUT: tl.constexpr,
    NUM_IN: tl.constexpr,
    GATHER_D_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    m_tile, n_tile = swizzled_tile(triton.cdiv(NUM_OUT, BLOCK_M), triton.cdiv(NUM_IN, BLOCK_N))
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)

    offs_m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (NUM_OUT % BLOCK_M == 0) | (offs_m < NUM_OUT)
    mask_n = (NUM_IN % BLOCK_N == 0) | (offs_n < NUM_IN)
    d_weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + offs_k
        mask_k = rows < end
        tokens = tl.load(order_ptr + rows, mask=mask_k, other=0) // TOP_K
        if GATHER_D_OUT:
            d_out_rows = tokens.to(tl.int64)
            input_rows = rows.to(tl.int64)
        else:
            d_out_rows = rows.to(tl.int64)
            input_rows = tokens.to(tl.int64)
        d_out = tl.load(
            d_out_ptr + d_out_rows[None, :] * NUM_OUT + offs_m[:, None],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        inputs = tl.load(
            input_ptr + input_rows[:, None] * stride_input + offs_n[None, :],
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        d_weight = _add_dot(d_weight, d_out, inputs, offs_m)

    d_weight_ptrs = d_weight_ptr + expert * (NUM_OUT * NUM_IN)
    d_weight_ptrs += offs_m[:, None] * NUM_IN + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    tl.store(d_weight_ptrs, d_weight.to(d_weight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_grad_kernel(
    gate_up_ptr,  # (M, 2I)
    d_hidden_ptr,  # (M, I), becomes w * silu(gate) * up if RECOMPUTE
    routing_weights_ptr,  # (N, K) fp32
    order_ptr,  # (M,) int32
    d_gate_up_ptr,  # (M, 2I)
    d_routing_weights_ptr,  # (N, K) fp32
    num_rows,
    INTERMEDIATE: tl.constexpr,
    RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < num_rows
    pairs = tl.load(order_ptr + rows, mask=mask_m, other=0)
    weights = tl.load(routing_weights_ptr + pairs, mask=mask_m, other=0.0)[:, None]
    d_weights = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(0, INTERMEDIATE, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = (INTERMEDIATE % BLOCK_N == 0) | (offs_n < INTERMEDIATE)
        mask = mask_m[:, None] & mask_n[None, :]
        offs_gate = rows[:, None] * (2 * INTERMEDIATE) + offs_n[None, :]
        d_hidden_ptrs = d_hidden_ptr + rows[:, None] * INTERMEDIATE + offs_n[None, :]
        gate = tl.load(gate_up_ptr + offs_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + offs_gate + INTERMEDIATE, mask=mask, other=0.0).to(tl.float32)
        d_hidden = tl.load(d_hidden_ptrs, mask=mask, other=0.0).to(tl.float32)

        hidden = _swiglu(gate, up)
        d_weights += tl.sum(hidden * d_hidden, axis=1)
        if RECOMPUTE:
            # Same offsets and dtype as the load: the thread that writes an element has read it.
            tl.store(d_hidden_ptrs, (hidden * weights).to(d_hidden_ptr.dtype.element_ty), mask=mask)
        sigmoid = tl.sigmoid(gate)
        d_swiglu = d_hidden * weights
        d_gate = d_swiglu * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_up = d_swiglu * gate * sigmoid
        out_type = d_gate_up_ptr.dtype.element_ty
        tl.store(d_gate_up_ptr + offs_gate, d_gate.to(out_type), mask=mask)
        tl.store(d_gate_up_ptr + offs_gate + INTERMEDIATE, d_up.to(out_type), mask=mask)
    tl.store(d_routing_weights_ptr + pairs, d_weights, mask=mask_m)


@triton.jit(do_not_specialize=["num_tokens"])
def sum_slots_kernel(
    slots_ptr,  # (N, K, D)
    out_ptr,  # (N, D)
    num_tokens,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < num_tokens)[:, None] & (offs_n < WIDTH)[None, :]
    slots_ptrs = slots_ptr + offs_m[:, None] * (TOP_K * WIDTH) + offs_n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(TOP_K):
        total += tl.load(slots_ptrs + k * WIDTH, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_m[:, None] * WIDTH + offs_n[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


def _grid(num_rows: int, num_experts: int, num_cols: int, config: MatmulConfig) -> tuple[int]:
    """The grid has as many row tiles as groups of `num_rows` rows in all can make."""
    num_m_tiles = triton.cdiv(num_rows, config.BLOCK_M) + num_experts - 1
    return (num_m_tiles * triton.cdiv(num_cols, config.BLOCK_N),)


def launch_gate_up(
    x: Tensor, routing_weights: Tensor, pairs: Pairs, gate_up_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The launcher gives (gate_up, hidden) of `gate_up_kernel`, whose header has the shapes."""
    num_experts, double_intermediate, width = gate_up_weight.shape
    num_rows, intermediate = pairs.order.numel(), double_intermediate // 2
    gate_up = x.new_empty((num_rows, double_intermediate))
    hidden = x.new_empty((num_rows, intermediate))
    config = _config(x).gate_up
    with torch.cuda.device_of(x):
        gate_up_kernel[_grid(num_rows, num_experts, intermediate, config)](
            x, routing_weights, pairs.order, pairs.offsets, gate_up_weight, gate_up, hidden,
            x.stride(0), NUM_EXPERTS=num_experts, TOP_K=pairs.top_k,
            WIDTH=width, INTERMEDIATE=intermediate, **config._asdict(),
        )  # fmt: skip
    return gate_up, hidden


def launch_grouped_matmul(
    a: Tensor, weight: Tensor, pairs: Pairs, *, gather: bool, transposed: bool
) -> Tensor:
    """The launcher gives `out` of `grouped_matmul_kernel`, whose header has the shapes."""
    num_rows, num_experts = pairs.order.numel(), weight.shape[0]
    num_cols, num_inner = weight.shape[1:] if transposed else weight.mT.shape[1:]
    out = a.new_empty((num_rows, num_cols))
    config = _config(a).matmul
    with torch.cuda.device_of(a):
        grouped_matmul_kernel[_grid(num_rows, num_experts, num_cols, config)](
            a, weight, pairs.order, pairs.offsets, out,
            NUM_EXPERTS=num_experts, TOP_K=pairs.top_k, NUM_COLS=num_cols, NUM_INNER=num_inner,
            GATHER=gather, TRANSPOSED=transposed, **config._asdict(),
        )  # fmt: skip
    return out


def launch_weight_grad(
    d_out: Tensor, inputs: Tensor, pairs: Pairs, *, gather_d_out: bool
) -> Tensor:
    """The launcher gives `d_weight` of `weight_grad_kernel`; zeros for an expert without rows."""
    num_experts = pairs.offsets.numel() - 1
    num_out, num_in = d_out.shape[1], inputs.shape[1]
    d_weight = inputs.new_empty((num_experts, num_out, num_in))
    config = _config(inputs).weight_grad
    num_tiles = triton.cdiv(num_out, config.BLOCK_M) * triton.cdiv(num_in, config.BLOCK_N)
    with torch.cuda.device_of(inputs):
        weight_grad_kernel[(num_tiles, num_experts)](
            d_out.contiguous(), inputs, pairs.order, pairs.offsets, d_weight, inputs.stride(0),
            TOP_K=pairs.top_k, NUM_OUT=num_out, NUM_IN=num_in, GATHER_D_OUT=gather_d_out,
            **config._asdict(),
        )  # fmt: skip
    return d_weight


def launch_swiglu_grad(
    gate_up: Tensor, d_hidden: Tensor, routing_weights: Tensor, order: Tensor, *, recompute: bool
) -> tuple[Tensor, Tensor]:
    """The launcher gives (d_gate_up, d_routing_weights) of `swiglu_grad_kernel`."""
    num_rows, intermediate = d_hidden.shape
    d_gate_up = torch.empty_like(gate_up)
    d_routing_weights = torch.empty_like(routing_weights)
    with torch.cuda.device_of(gate_up):
        swiglu_grad_kernel[(triton.cdiv(num_rows, SWIGLU_GRAD_CONFIG["BLOCK_M"]),)](
            gate_up, d_hidden, routing_weights, order, d_gate_up, d_routing_weights, num_rows,
            INTERMEDIATE=intermediate, RECOMPUTE=recompute, **SWIGLU_GRAD_CONFIG,
        )  # fmt: skip
    return d_gate_up, d_routing_weights


def launch_sum_slots(slots: Tensor, top_k: int) -> Tensor:
    """The launcher adds up the K rows of each token: (N * K, D), by pair, to (N, D)."""
    num_tokens, width = slots.shape[0] // top_k, slots.shape[1]
    out = slots.new_empty((num_tokens, width))
    block_m, block_n = SUM_SLOTS_CONFIG["BLOCK_M"], SUM_SLOTS_CONFIG["BLOCK_N"]
    with torch.cuda.device_of(slots):
        sum_slots_kernel[(triton.cdiv(num_tokens, block_m), triton.cdiv(width, block_n))](
            slots, out, num_tokens, TOP_K=top_k, WIDTH=width, **SUM_SLOTS_CONFIG
        )
    return out


@torch.library.custom_op("hamner::moe_mlp", mutates_args=())
def _moe_mlp(
    x: Tensor,
    routing_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op gives out, and for backward gate_up and hidden, which is empty if recomputed."""
    pairs = Pairs(order, offsets, top_k=routing_weights.shape[1])
    gate_up, hidden = launch_gate_up(x, routing_weights, pairs, gate_up_weight)
    slots = launch_grouped_matmul(hidden, down_weight, pairs, gather=False, transposed=True)
    return launch_sum_slots(slots, pairs.top_k), gate_up, x.new_empty(0) if recompute else hidden


@_moe_mlp.register_fake
def _(x, routing_weights, order, offsets, gate_up_weight, down_weight, recompute):
    num_rows, intermediate = order.shape[0], down_weight.shape[2]
    hidden = x.new_empty(0 if recompute else (num_rows, intermediate))
    return x.new_empty(x.shape), x.new_empty((num_rows, 2 * intermediate)), hidden


@torch.library.custom_op("hamner::moe_mlp_backward", mutates_args=())
def _moe_mlp_backward(
    d_out: Tensor,
    x: Tensor,
    routing_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    gate_up: Tensor,
    hidden: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op gives gradients of x, the routing weights, gate_up_weight and down_weight."""
    d_out = d_out.contiguous()
    pairs = Pairs(order, offsets, top_k=routing_weights.shape[1])
    d_hidden = launch_grouped_matmul(d_out, down_weight, pairs, gather=True, transposed=False)
    d_gate_up, d_routing_weights = launch_swiglu_grad(
        gate_up, d_hidden, routing_weights, order, recompute=recompute
    )
    if recompute:
        hidden = d_hidden
    d_down_weight = launch_weight_grad(d_out, hidden, pairs, gather_d_out=True)
    d_gate_up_weight = launch_weight_grad(d_gate_up, x, pairs, gather_d_out=False)
    d_slots = launch_grouped_matmul(
        d_gate_up, gate_up_weight, pairs, gather=False, transposed=False
    )
    d_x = launch_sum_slots(d_slots, pairs.top_k)
    return d_x, d_routing_weights, d_gate_up_weight, d_down_weight


@_moe_mlp_backward.register_fake
def _(d_out, x, routing_weights, order, offsets, gate_up, hidden, *weights_and_recompute):
    inputs = (x, routing_weights, *weights_and_recompute[:2])
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


def _setup_context(ctx, inputs, output):
    x, routing_weights, order, offsets, gate_up_weight, down_weight, ctx.recompute = inputs
    _, gate_up, hidden = output
    ctx.save_for_backward(
        x, routing_weights, order, offsets, gate_up, hidden, gate_up_weight, down_weight
    )
    ctx.mark_non_differentiable(gate_up, hidden)
    # Or autograd would make zeros of the size of gate_up for a gradient that is never used.
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, _d_gate_up, _d_hidden):
    if d_out is None:
        return (None,) * 7
    gradients = _moe_mlp_backward(d_out, *ctx.saved_tensors, ctx.recompute)
    d_x, d_routing_weights, d_gate_up_weight, d_down_weight = gradients
    return d_x, d_routing_weights, None, None, d_gate_up_weight, d_down_weight, None


_moe_mlp.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, routing: Routing, gate_up_weight: Tensor, down_weight: Tensor) -> None:
    check_shape("x", x.shape, ("N", "D"))
    num_tokens, width = x.shape
    check_shape("gate_up_weight", gate_up_weight.shape, ("E", "2I", width))
    num_experts, double_intermediate, _ = gate_up_weight.shape
    if double_intermediate % 2 or num_experts > MAX_EXPERTS:
        raise ValueError(
            f"gate_up_weight has shape {tuple(gate_up_weight.shape)}; it must be (E, 2I, {width}), "
            f"E at most {MAX_EXPERTS}"
        )
    check_shape("down_weight", down_weight.shape, (num_experts, width, double_intermediate // 2))
    check_shape("routing.weights", routing.weights.shape, (num_tokens, "K"))
    check_shape("routing.order", routing.order.shape, (routing.weights.numel(),))
    check_shape("routing.offsets", routing.offsets.shape, (num_experts + 1,))
    for name in ("weights", "order", "offsets"):
        check_same_device(f"routing.{name}", getattr(routing, name), "x", x)
    check_like("gate_up_weight", gate_up_weight, "x", x)
    check_like("down_weight", down_weight, "x", x)


def moe_mlp(
    x: Tensor,
    routing: Routing,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    *,
    recompute: bool = True,
) -> Tensor:
    """Each token goes through its experts' SwiGLU MLPs, and their outputs are added by weight.

    `out[n] = sum_k weights[n, k] * down[e] @ (silu(gate[e] @ x[n]) * (up[e] @ x[n]))`, where `e` is
    `experts[n, k]`. No token is dropped. Differentiable in x, both weights and `routing.weights`.

    Args:
        x: (N, D) fp32, bf16 or fp16.
        routing: from `moe_route` for the same N tokens and E experts.
        gate_up_weight: (E, 2I, D), contiguous, gate first; dtype of x.
        down_weight: (E, D, I), contiguous; dtype of x.
        recompute: keep gate_up (N * K, 2I) for backward and recompute the SwiGLU's output from it,
            in the pass that differentiates it; False keeps that output (N * K, I) too. Same bits.

    Returns:
        (N, D), dtype of x.

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: a shape, stride or device that is not supported.
    """
    _check(x, routing, gate_up_weight, down_weight)
    check_dtype("x", x)
    check_dtype("routing.weights", routing.weights, (torch.float32,))
    check_dtype("routing.order", routing.order, (torch.int32,))
    check_dtype("routing.offsets", routing.offsets, (torch.int32,))
    check_contiguous("gate_up_weight", gate_up_weight)
    check_contiguous("down_weight", down_weight)
    if x.stride(1) != 1:
        x = x.contiguous()
    routed = (routing.weights.contiguous(), routing.order, routing.offsets)
    return _moe_mlp(x, *routed, gate_up_weight, down_weight, recompute=recompute)[0]


def moe_mlp_reference(
    x: Tensor, routing: Routing, gate_up_weight: Tensor, down_weight: Tensor
) -> Tensor:
    """It is `moe_mlp` in plain torch, a loop over experts, on any device; also fp64.

    Reads `routing.weights` and `routing.experts`. The host waits for each group's size.
    """
    _check(x, routing, gate_up_weight, down_weight)
    compute = x.dtype if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(x.shape, dtype=compute, device=x.device)
    for expert in range(gate_up_weight.shape[0]):
        token, slot = torch.where(routing.experts == expert)
        gate, up = torch.nn.functional.linear(x[token], gate_up_weight[expert]).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate.to(compute)) * up.to(compute)
        hidden = hidden * routing.weights[token, slot, None].to(compute)
        rows = torch.nn.functional.linear(hidden.to(x.dtype), down_weight[expert])
        out = out.index_add(0, token, rows.to(compute))
    return out.to(x.dtype)
