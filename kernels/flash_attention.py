"""This is FlashAttention with grouped-query attention, forward and backward, for training.

FlashAttention-2 (Dao 2023, arXiv:2307.08691): fused are both matmuls, the scale, the mask and the
softmax. Scores live in registers, one tile at a time; forward keeps the log-sum-exp of each row
(4 bytes), from which backward builds the scores again. norm_attention.py has the kernels rotate dq
and dk back by RoPE's angles right before they are stored.

    forward     out, lse                        2 matmuls
    dq          delta = sum(out * d_out), dq    3 matmuls, two of them for p and d_p
    dk, dv      dk, dv                          4 matmuls, two of them for p and d_p

dk and dv sum over the query heads of a group inside one program, and dq has a pass of its own: two
matmuls more than an accumulation of dq with atomics would need, but two runs give the same bits,
and no fp32 copy of dq is kept.

A matmul is 2 B H T^2 hd FLOPs, half of that under a causal mask. For option A (B 24, T 1024, H 16,
KV 4, hd 64, causal) it is 26 GFLOP, so forward does 52 and backward 180. Bytes that must move, e
bytes an element:

    forward     q, k, v, out                            B T (2 H + 2 KV) hd e
    backward    q, k, v, out, d_out, dq, dk, dv         B T (4 H + 4 KV) hd e

which is 126 MB and 252 MB: 0.15 and 0.30 ms at 850 GB/s. The floor is the arithmetic: at the 71.2
TFLOP/s of an RTX 3090, 0.72 ms forward and 2.5 ms backward. Documents shorten both, since tiles
without a pair of the same document are skipped.

What a query sees is an interval of keys, and what sees a key is an interval of queries, whatever
mixture of causal and document masks is asked for. Neither end of an interval ever decreases from
one row to the next, so for a block of rows [begin(first), end(last)) is what any row sees and
[begin(last), end(first)) what all of them see. Tiles outside the first are skipped, tiles inside
the second ("full") need no mask; what is left, the causal diagonal, the edges of documents and the
end of the sequence, goes through the same code with MASKED set.

Offsets: the position of a tile is 64-bit, offsets inside a tile 32-bit.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import check_dtype, check_like, check_same_device, check_shape
from hamner.kernels.launch import capability
from hamner.kernels.rope import launch_packed_rotation, packed_head_size

MAX_HEAD_SIZE = 128
LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """A tile is the queries and keys a program holds at once, its warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """a thread may use, so that more programs are resident; None leaves it to the compiler"""


class Config(NamedTuple):
    """A config holds the tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dk_dv: Tile


# By capability, then by (head size, value head size) rounded up to 64 or 128. `python -m
# bench.tune_flash_attention` measures on the GPU at hand and prints a row. 8.6 at 64, 64 and at
# 128, 128 is what an H200 that executes sm_86's code runs fastest (profiles/LOG.md, 2026-11-29), of
# what spills with neither Triton 3.6 nor 3.9, except dq at 64, 64: 128 x 32 is 6% faster there, but
# computes 6% more under the diagonal at T 1024, and what it saves is reads of shared memory, which
# an sm_86, with a quarter of the matmuls a clock, has time for. 64, 128 is by reasoning.
#
# sm_86 does 256 fused multiply-adds a clock and multiprocessor in bf16, so the matmuls are what
# costs. What matters is to have eight warps resident, in two blocks of four or one of eight, that
# fill the tensor cores in each other's softmax: of 255 registers a thread, they take all 65,536.
# Share of 101,376 bytes of shared memory, registers a thread (the most that Triton 3.6 or 3.9
# takes, documents and RoPE or not), blocks resident:
#
#                 forward                  dq                       dk_dv
#     64, 64      48%  255  2 of 4 warps   48%  243  2 of 4 warps   49%  255  2 of 4 warps
#     64, 128     65%  246  1 of 8         48%  168  2 of 4         61%  255  1 of 8
#     128, 128    97%  253  1 of 8         97%  195  1 of 8         81%  224  1 of 8
_SM86 = {
    (64, 64): Config(
        forward=Tile(128, 64, 4, 3),
        dq=Tile(64, 64, 4, 3),
        dk_dv=Tile(64, 64, 4, 3),
    ),
    (64, 128): Config(
        forward=Tile(128, 64, 8, 3),
        dq=Tile(64, 32, 4, 3),
        dk_dv=Tile(32, 128, 8, 2),
    ),
    (128, 128): Config(
        forward=Tile(128, 64, 8, 3),
        dq=Tile(128, 32, 8, 3),
        dk_dv=Tile(16, 128, 8, 3),
    ),
}
# The fastest on an H100 (profiles/LOG.md) of those that do not spill. 64 rows to four warps is the
# shape of Hopper's warpgroup matmul; several such blocks on a multiprocessor beat one large tile,
# and a fourth one in forward is worth holding its registers down.
# Not measured: dk_dv at 128, 128, which had four stages until it spilled with RoPE on Triton 3.6.
_SM90 = {
    (64, 64): Config(
        forward=Tile(64, 64, 4, 3, max_registers=128),
        dq=Tile(64, 64, 4, 3),
        dk_dv=Tile(64, 64, 4, 3),
    ),
    (64, 128): Config(
        forward=Tile(128, 64, 8, 3),
        dq=Tile(64, 64, 4, 2),
        dk_dv=Tile(64, 128, 8, 2),
    ),
    (128, 128): Config(
        forward=Tile(64, 64, 4, 3),
        dq=Tile(64, 64, 4, 2),
        dk_dv=Tile(32, 64, 4, 3),
    ),
}
CONFIGS = {"8.6": _SM86, "8.0": _SM86, "9.0": _SM90}

# float32 is for debugging: exact products, without tensor cores.
FLOAT32_CONFIG = Config(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))

# Query heads whose blocks start together. At T 1024 and head size 64 they and their keys and values
# are 20 MB, which an H100's L2 holds.
HEADS_TOGETHER = tl.constexpr(64)


# In the kernels a tensor is its pointer and its strides of batch, time and head (that of the head's
# elements is 1): `_select_head` gives a pointer to the rows of one head and the stride of a row.


@triton.constexpr_function
def padded(head_size: int) -> int:
    """The function gives the width of a tile that holds heads of this size."""
    return max(16, triton.next_power_of_2(head_size))


@triton.jit
def _assign_block(num_blocks, HEADS: tl.constexpr):
    """A program gets a block of rows, counted from the one with the most work, and a head, counted
    over batches.

    Under a causal mask one block has up to `num_blocks` times the work of another. Head by head,
    the longest block of the last head would start when nearly all else is done, and the GPU would
    wait for it. So HEADS heads start together, first the longest block of each: what starts last
    is short, and the longest blocks of the next heads fill the gaps that these leave.
    """
    pid = tl.program_id(0)
    first_head = pid // (num_blocks * HEADS) * HEADS
    pid -= first_head * num_blocks
    num_heads = tl.minimum(HEADS, tl.num_programs(0) // num_blocks - first_head)
    return pid // num_heads, first_head + pid % num_heads


@triton.jit
def _select_head(tensor, batch, head):
    """The result is a pointer to the first row of a head, and the stride from row to row."""
    ptr, stride_b, stride_t, stride_h = tensor
    return ptr + batch * stride_b + head * stride_h, stride_t


@triton.jit
def _see(rows, T, batch, documents, CAUSAL: tl.constexpr, QUERIES: tl.constexpr):
    """A query sees the keys [begin, end); where rows are not QUERIES, such queries see a key.

    `rows` are one row, or a block of them, int32.
    """
    begin = rows * 0
    end = begin + T
    if documents is not None:
        begin = tl.load(documents[0] + batch * T + tl.minimum(rows, T - 1))
        end = tl.load(documents[1] + batch * T + tl.minimum(rows, T - 1))
    if CAUSAL:
        if QUERIES:
            end = rows + 1
        else:
            begin = rows
    return begin, end


@triton.jit
def _is_seen(offs, bounds):
    """The mask of a tile holds where a row, of `_see`'s bounds, sees a column."""
    begin, end = bounds
    return (offs[None, :] >= begin[:, None]) & (offs[None, :] < end[:, None])


@triton.jit
def _cut_into_tiles(
    first,
    T,
    batch,
    documents,
    CAUSAL: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the rows [first, first + ROWS) see is cut into tiles.

    Returns:
        begin, full_begin, full_end, end: [full_begin, full_end) is full; [begin, full_begin) and
        [full_end, end) need a mask. All but the end are multiples of BLOCK.
    """
    first_begin, first_end = _see(first, T, batch, documents, CAUSAL, QUERIES)
    last = tl.minimum(first + ROWS, T) - 1
    last_begin, end = _see(last, T, batch, documents, CAUSAL, QUERIES)
    begin = first_begin // BLOCK * BLOCK
    full_begin = tl.cdiv(last_begin, BLOCK) * BLOCK
    full_end = tl.maximum(first_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _load_tile(
    ptr,
    stride,
    start,
    num_rows,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """A tile is rows [start, start + ROWS) of one head, zero beyond HEAD_SIZE.

    Rows past the end repeat the last one where CLAMPED (predicated loads cost registers enough to
    spill): what they give must be masked, or not stored.
    """
    offs_row = tl.arange(0, ROWS)
    offs_d = tl.arange(0, padded(HEAD_SIZE))
    if CLAMPED:
        offs_row = tl.minimum(offs_row, num_rows - 1 - start)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (offs_row[:, None] * stride + offs_d[None, :])
    if padded(HEAD_SIZE) == HEAD_SIZE:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=offs_d[None, :] < HEAD_SIZE, other=0.0)
    return tile


@triton.jit
def _store_tile(ptr, stride, start, num_rows, tile, HEAD_SIZE: tl.constexpr):
    """The tile's rows become rows from `start` of one head, without what is beyond HEAD_SIZE."""
    offs_row = tl.arange(0, tile.shape[0])
    offs_d = tl.arange(0, tile.shape[1])
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (offs_row[:, None] * stride + offs_d[None, :])
    mask = (start + offs_row[:, None] < num_rows) & (offs_d[None, :] < HEAD_SIZE)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_back(
    tile,  # (ROWS, HEAD_SIZE) fp32
    start,
    num_rows,
    batch,
    tables,  # pointers to cos and sin, (num_positions, HEAD_SIZE / 2), and num_positions, or None
    positions_ptr,  # (B, num_rows) int32, or None: the row itself
    HEAD_SIZE: tl.constexpr,
):
    """The gradient of rope.py's result becomes that of its input: it is rotated by -sin."""
    if tables is not None:
        HALF: tl.constexpr = HEAD_SIZE // 2
        cos_ptr, sin_ptr, num_positions = tables
        position = start + tl.arange(0, tile.shape[0])
        if positions_ptr is not None:
            positions_ptr += batch * num_rows
            position = tl.load(positions_ptr + tl.minimum(position, num_rows - 1))
            position = tl.maximum(position, 0)
        position = tl.minimum(position, num_positions - 1)
        offs = position[:, None] * HALF + tl.arange(0, HALF)[None, :]
        cos = tl.load(cos_ptr + offs).to(tl.float32)
        sin = tl.load(sin_ptr + offs).to(tl.float32)
        # A matmul's accumulator has both halves of a row in one thread: the split moves nothing.
        halves = tl.permute(tl.reshape(tile, (tile.shape[0], 2, HALF)), (0, 2, 1))
        first, second = tl.split(halves)
        rotated = tl.join(first * cos + second * sin, second * cos - first * sin)
        tile = tl.reshape(tl.permute(rotated, (0, 2, 1)), tile.shape)
    return tile


@triton.jit
def flash_attention_forward_kernel(
    q,  # (B, T, H, HEAD_SIZE) input dtype
    k,  # (B, T, KV, HEAD_SIZE) input dtype
    v,  # (B, T, KV, V_HEAD_SIZE) input dtype
    out_ptr,  # (B, T, H, V_HEAD_SIZE) input dtype
    lse_ptr,  # (B, H, T) fp32, base 2
    documents,  # pointers to starts and ends, (B, T) int32, or None
    T,
    H,
    scale_log2,
    GROUP: tl.constexpr,  # query heads to a key/value head
    CAUSAL: tl.constexpr,
    EVEN_T: tl.constexpr,  # T is a multiple of BLOCK_M and BLOCK_N
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax, first over the full tiles of keys, then over those that need a mask."""
    num_blocks = tl.cdiv(T, BLOCK_M)
    rank, any_head = _assign_block(num_blocks, HEADS_TOGETHER)
    block = num_blocks - 1 - rank  # under a causal mask the last queries see the most keys
    head = (any_head % H).to(tl.int64)
    batch = (any_head // H).to(tl.int64)
    q_ptr, stride_qt = _select_head(q, batch, head)
    k_ptr, stride_kt = _select_head(k, batch, head // GROUP)
    v_ptr, stride_vt = _select_head(v, batch, head // GROUP)

    first = block * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    begin, full_begin, full_end, end = _cut_into_tiles(
        first, T, batch, documents, CAUSAL, True, BLOCK_M, BLOCK_N
    )
    q_tile = _load_tile(q_ptr, stride_qt, first, T, BLOCK_M, HEAD_SIZE, not EVEN_T)
    acc = tl.zeros([BLOCK_M, padded(V_HEAD_SIZE)], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for MASKED in tl.static_range(2):
        loop_begin, loop_end, hole_size = full_begin, full_end, 0
        if MASKED:
            loop_begin, loop_end, hole_size = begin, end, full_end - full_begin
            seen = _see(offs_m, T, batch, documents, CAUSAL, True)
        for position in range(loop_begin, loop_end - hole_size, BLOCK_N):
            start = position + tl.where(position < full_begin, 0, hole_size)
            k_tile = _load_tile(
                k_ptr, stride_kt, start, T, BLOCK_N, HEAD_SIZE, MASKED and not EVEN_T
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if MASKED:
                is_seen = _is_seen(start + tl.arange(0, BLOCK_N), seen)
                scores = tl.where(is_seen, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
            shift = new_max
            if MASKED:
                # A row that has seen no key yet: -inf less -inf would be NaN.
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores * scale_log2 - shift[:, None])
            correction = tl.exp2(row_max - shift)
            row_sum = row_sum * correction + tl.sum(p, 1)
            acc = acc * correction[:, None]
            v_tile = _load_tile(
                v_ptr, stride_vt, start, T, BLOCK_N, V_HEAD_SIZE, MASKED and not EVEN_T
            )
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
            row_max = new_max

    # From 32 bits again: with 64-bit pointers kept over the loops, 128 x 64 tiles of four warps
    # spill.
    lse_ptr += any_head.to(tl.int64) * T
    tl.store(lse_ptr + offs_m, row_max + tl.log2(row_sum), mask=offs_m < T)
    out_ptr += ((any_head // H).to(tl.int64) * T * H + any_head % H) * V_HEAD_SIZE
    out = acc / row_sum[:, None]
    _store_tile(out_ptr, H * V_HEAD_SIZE, first, T, out, V_HEAD_SIZE)


@triton.jit
def flash_attention_dq_kernel(
    q,  # (B, T, H, HEAD_SIZE) input dtype
    k,  # (B, T, KV, HEAD_SIZE) input dtype
    v,  # (B, T, KV, V_HEAD_SIZE) input dtype
    out_ptr,  # (B, T, H, V_HEAD_SIZE) input dtype
    d_out,  # (B, T, H, V_HEAD_SIZE) input dtype
    lse_ptr,  # (B, H, T) fp32, base 2
    delta_ptr,  # (B, H, T) fp32, written here: sum over a row of out * d_out
    dq,  # (B, T, H, HEAD_SIZE) input dtype
    documents,  # pointers to starts and ends, (B, T) int32, or None
    tables,  # as `_rotate_back` takes them, or None: q and k were not rotated
    positions_ptr,  # (B, T) int32, or None: the row
    T,
    H,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_T: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The full tiles of keys are added to dq first, then those that need a mask."""
    num_blocks = tl.cdiv(T, BLOCK_M)
    # Head by head, unlike the others: 2% faster here (profiles/LOG.md).
    pid = tl.program_id(0)
    block = num_blocks - 1 - pid % num_blocks
    head = (pid // num_blocks % H).to(tl.int64)
    batch = (pid // num_blocks // H).to(tl.int64)
    q_ptr, stride_qt = _select_head(q, batch, head)
    k_ptr, stride_kt = _select_head(k, batch, head // GROUP)
    v_ptr, stride_vt = _select_head(v, batch, head // GROUP)
    d_out_ptr, stride_dot = _select_head(d_out, batch, head)
    dq_ptr, stride_dqt = _select_head(dq, batch, head)
    out_ptr += (batch * T * H + head) * V_HEAD_SIZE
    lse_ptr += (batch * H + head) * T
    delta_ptr += (batch * H + head) * T

    first = block * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    begin, full_begin, full_end, end = _cut_into_tiles(
        first, T, batch, documents, CAUSAL, True, BLOCK_M, BLOCK_N
    )
    d_out_tile = _load_tile(d_out_ptr, stride_dot, first, T, BLOCK_M, V_HEAD_SIZE, not EVEN_T)
    out = _load_tile(out_ptr, H * V_HEAD_SIZE, first, T, BLOCK_M, V_HEAD_SIZE, not EVEN_T)
    delta = tl.sum(out.to(tl.float32) * d_out_tile.to(tl.float32), 1)
    tl.store(delta_ptr + offs_m, delta, mask=offs_m < T)
    lse = tl.load(lse_ptr + tl.minimum(offs_m, T - 1))
    q_tile = _load_tile(q_ptr, stride_qt, first, T, BLOCK_M, HEAD_SIZE, not EVEN_T)
    acc = tl.zeros([BLOCK_M, padded(HEAD_SIZE)], tl.float32)
    for MASKED in tl.static_range(2):
        loop_begin, loop_end, hole_size = full_begin, full_end, 0
        if MASKED:
            loop_begin, loop_end, hole_size = begin, end, full_end - full_begin
            seen = _see(offs_m, T, batch, documents, CAUSAL, True)
        for position in range(loop_begin, loop_end - hole_size, BLOCK_N):
            start = position + tl.where(position < full_begin, 0, hole_size)
            k_tile = _load_tile(
                k_ptr, stride_kt, start, T, BLOCK_N, HEAD_SIZE, MASKED and not EVEN_T
            )
            v_tile = _load_tile(
                v_ptr, stride_vt, start, T, BLOCK_N, V_HEAD_SIZE, MASKED and not EVEN_T
            )
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            p = tl.exp2(scores * scale_log2 - lse[:, None])
            if MASKED:
                p = tl.where(_is_seen(start + tl.arange(0, BLOCK_N), seen), p, 0.0)
            dp = tl.dot(d_out_tile, tl.trans(v_tile), input_precision="ieee")
            d_scores = p * (dp - delta[:, None])
            acc = tl.dot(d_scores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    acc = _rotate_back(acc * scale, first, T, batch, tables, positions_ptr, HEAD_SIZE)
    _store_tile(dq_ptr, stride_dqt, first, T, acc, HEAD_SIZE)


@triton.jit
def flash_attention_dk_dv_kernel(
    q,  # (B, T, H, HEAD_SIZE) input dtype
    k,  # (B, T, KV, HEAD_SIZE) input dtype
    v,  # (B, T, KV, V_HEAD_SIZE) input dtype
    d_out,  # (B, T, H, V_HEAD_SIZE) input dtype
    lse_ptr,  # (B, H, T) fp32, base 2
    delta_ptr,  # (B, H, T) fp32
    dk,  # (B, T, KV, HEAD_SIZE) input dtype
    dv,  # (B, T, KV, V_HEAD_SIZE) input dtype
    documents,  # pointers to starts and ends, (B, T) int32, or None
    tables,  # as `_rotate_back` takes them, or None: q and k were not rotated
    positions_ptr,  # (B, T) int32, or None: the row
    T,
    KV,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_T: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The tiles of queries that need a mask are added to dk and dv first, then the full ones, over
    all heads of the group.

    Scores are built transposed, so that p and d_scores are left operands as they stand.
    """
    num_blocks = tl.cdiv(T, BLOCK_N)
    # Under a causal mask the first keys are seen by the most queries.
    block, any_head = _assign_block(num_blocks, tl.cdiv(HEADS_TOGETHER, GROUP))
    kv_head = (any_head % KV).to(tl.int64)
    batch = (any_head // KV).to(tl.int64)
    q_ptr, stride_qt = _select_head(q, batch, kv_head * GROUP)
    k_ptr, stride_kt = _select_head(k, batch, kv_head)
    v_ptr, stride_vt = _select_head(v, batch, kv_head)
    d_out_ptr, stride_dot = _select_head(d_out, batch, kv_head * GROUP)
    dk_ptr, stride_dkt = _select_head(dk, batch, kv_head)
    dv_ptr, stride_dvt = _select_head(dv, batch, kv_head)
    lse_ptr += (batch * KV + kv_head) * GROUP * T
    delta_ptr += (batch * KV + kv_head) * GROUP * T

    first = block * BLOCK_N
    offs_n = first + tl.arange(0, BLOCK_N)
    begin, full_begin, full_end, end = _cut_into_tiles(
        first, T, batch, documents, CAUSAL, False, BLOCK_N, BLOCK_M
    )
    k_tile = _load_tile(k_ptr, stride_kt, first, T, BLOCK_N, HEAD_SIZE, not EVEN_T)
    v_tile = _load_tile(v_ptr, stride_vt, first, T, BLOCK_N, V_HEAD_SIZE, not EVEN_T)
    dk_acc = tl.zeros([BLOCK_N, padded(HEAD_SIZE)], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, padded(V_HEAD_SIZE)], tl.float32)
    # Hopper's matmuls run while the warps go on, but one whose result the next line needs is waited
    # for, with all before it. With dp in front of p, those of dv and dk run on into the next tile.
    # Wider heads have no registers for a dp that waits.
    DP_FIRST: tl.constexpr = padded(HEAD_SIZE) + padded(V_HEAD_SIZE) <= 128
    for FULL in tl.static_range(2):
        loop_begin, loop_end, hole_size = full_begin, full_end, 0
        if not FULL:
            loop_begin, loop_end, hole_size = begin, end, full_end - full_begin
            seen = _see(offs_n, T, batch, documents, CAUSAL, False)
        # One loop over heads and tiles together keeps the load pipeline full from head to head. Its
        # first loads are prepared even when there is no tile, hence the divisor of at least 1.
        num_tiles = tl.cdiv(loop_end - loop_begin - hole_size, BLOCK_M)
        for i in range(GROUP * num_tiles):
            head = i // tl.maximum(num_tiles, 1)
            start = loop_begin + (i - head * num_tiles) * BLOCK_M
            start += tl.where(start < full_begin, 0, hole_size)
            head = tl.cast(head, tl.int64)
            q_tile = _load_tile(
                q_ptr + head * q[3], stride_qt, start, T,
                BLOCK_M, HEAD_SIZE, not FULL and not EVEN_T,
            )  # fmt: skip
            d_out_tile = _load_tile(
                d_out_ptr + head * d_out[3], stride_dot, start, T,
                BLOCK_M, V_HEAD_SIZE, not FULL and not EVEN_T,
            )  # fmt: skip
            offs_m = start + tl.arange(0, BLOCK_M)
            offs_row = offs_m if FULL or EVEN_T else tl.minimum(offs_m, T - 1)
            lse = tl.load(lse_ptr + head * T + offs_row)
            delta = tl.load(delta_ptr + head * T + offs_row)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
            if DP_FIRST:
                dp = tl.dot(v_tile, tl.trans(d_out_tile), input_precision="ieee")
            p = tl.exp2(scores * scale_log2 - lse[None, :])
            if not FULL:
                p = tl.where(_is_seen(offs_m, seen), p, 0.0)
            dv_acc = tl.dot(p.to(d_out_tile.dtype), d_out_tile, dv_acc, input_precision="ieee")
            if not DP_FIRST:
                dp = tl.dot(v_tile, tl.trans(d_out_tile), input_precision="ieee")
            d_scores = p * (dp - delta[None, :])
            dk_acc = tl.dot(d_scores.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    # dv first: its registers are then free for the rotation of dk.
    _store_tile(dv_ptr, stride_dvt, first, T, dv_acc, V_HEAD_SIZE)
    dk_acc = _rotate_back(dk_acc * scale, first, T, batch, tables, positions_ptr, HEAD_SIZE)
    _store_tile(dk_ptr, stride_dkt, first, T, dk_acc, HEAD_SIZE)


INTERPRETED = not isinstance(flash_attention_forward_kernel, triton.JITFunction)


def select_config(
    device: torch.device, dtype: torch.dtype, head_size: int, v_head_size: int
) -> Config:
    """The function selects the launch configuration for these head sizes."""
    if dtype == torch.float32:
        return FLOAT32_CONFIG
    size = 64 if head_size <= 64 else 128
    v_size = 64 if size == 64 and v_head_size <= 64 else 128
    return CONFIGS[capability(device)][size, v_size]


def document_bounds(document_ids: Tensor) -> Tensor:
    """The function finds where each token's document begins and ends, without waiting for the GPU.

    Args:
        document_ids: (B, T) int32, non-decreasing along T.

    Returns:
        (2, B, T) int32, starts and ends: the token's document is [start, end) of its row.
    """
    document_ids = document_ids.contiguous()
    bounds = document_ids.new_empty(2, *document_ids.shape)
    for out, right in zip(bounds, (False, True), strict=True):
        torch.searchsorted(document_ids, document_ids, out_int32=True, right=right, out=out)
    return bounds


def _with_strides(x: Tensor) -> tuple[Tensor | int, ...]:
    """The result is a tensor as the kernels take it."""
    return x, *x.stride()[:3]


def _options(q: Tensor, k: Tensor, v: Tensor, tile: Tile, *, causal: bool) -> dict[str, object]:
    """The result is what all three kernels are specialised on, and their launch options."""
    seq_len, num_heads, head_size = q.shape[1:]
    return {
        "GROUP": num_heads // k.shape[2],
        "CAUSAL": causal,
        "EVEN_T": seq_len % tile.block_m == 0 and seq_len % tile.block_n == 0,
        "HEAD_SIZE": head_size,
        "V_HEAD_SIZE": v.shape[-1],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The launcher attends.

    Args:
        q, k, v: (B, T, H, hd), (B, T, KV, hd), (B, T, KV, hd_v), any strides but the last.
        documents: of `document_bounds`, or None.
        causal: whether a query sees only keys up to its own position.
        scale: of the scores.

    Returns:
        out (B, T, H, hd_v), and lse (B, H, T) fp32: the log-sum-exp of each row of scores, base 2.
    """
    batch_size, seq_len, num_heads, head_size = q.shape
    out = q.new_empty(batch_size, seq_len, num_heads, v.shape[-1])
    lse = q.new_empty(batch_size, num_heads, seq_len, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tile = select_config(q.device, q.dtype, head_size, v.shape[-1]).forward
    grid = (triton.cdiv(seq_len, tile.block_m) * num_heads * batch_size,)
    with torch.cuda.device_of(q):
        flash_attention_forward_kernel[grid](
            *map(_with_strides, (q, k, v)), out, lse,
            None if documents is None else documents.unbind(),
            seq_len, num_heads, scale * LOG2_E, **_options(q, k, v, tile, causal=causal),
        )  # fmt: skip
    return out, lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    causal: bool,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """The launcher differentiates, into dq, dk and dv: shaped as q, k and v, any strides but the
    last.

    The other arguments are those of `launch_forward`, with its results and the gradient of out.
    With cos, sin and positions, by which q and k were rotated (rope.py), dq and dk are rotated back
    before they are stored; q's head size must be one that is not padded.
    """
    if out.numel() == 0:
        return
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    batch_size, seq_len, num_heads, head_size = q.shape
    num_kv_heads = k.shape[2]
    config = select_config(q.device, q.dtype, head_size, v.shape[-1])
    delta = torch.empty_like(lse)
    bounds = None if documents is None else documents.unbind()
    tables = None if cos is None else (cos.contiguous(), sin.contiguous(), cos.shape[0])
    positions = None if positions is None else positions.contiguous()
    q_, k_, v_, d_out_, dq_, dk_, dv_ = map(_with_strides, (q, k, v, d_out, dq, dk, dv))
    with torch.cuda.device_of(q):
        grid = (triton.cdiv(seq_len, config.dq.block_m) * num_heads * batch_size,)
        flash_attention_dq_kernel[grid](
            q_, k_, v_, out.contiguous(), d_out_, lse, delta, dq_, bounds, tables, positions,
            seq_len, num_heads, scale, scale * LOG2_E,
            **_options(q, k, v, config.dq, causal=causal),
        )  # fmt: skip
        grid = (triton.cdiv(seq_len, config.dk_dv.block_n) * num_kv_heads * batch_size,)
        flash_attention_dk_dv_kernel[grid](
            q_, k_, v_, d_out_, lse, delta, dk_, dv_, bounds, tables, positions,
            seq_len, num_kv_heads, scale, scale * LOG2_E,
            **_options(q, k, v, config.dk_dv, causal=causal),
        )  # fmt: skip


_flash_attention_op = torch.library.custom_op(
    "hamner::flash_attention", launch_forward, mutates_args=()
)


@_flash_attention_op.register_fake
def _(q, k, v, documents, causal, scale):
    batch_size, seq_len, num_heads, _ = q.shape
    out = q.new_empty(batch_size, seq_len, num_heads, v.shape[-1])
    return out, q.new_empty(batch_size, num_heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("hamner::flash_attention_backward", mutates_args=())
def _flash_attention_backward_op(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    launch_backward(
        d_out, q, k, v,
        out=out, lse=lse, documents=documents, causal=causal, scale=scale, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return dq, dk, dv


@_flash_attention_backward_op.register_fake
def _(d_out, q, k, v, out, lse, documents, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *qkv, documents, ctx.causal, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*qkv, *output, documents)


def _backward(ctx, d_out, _d_lse):
    d_qkv = _flash_attention_backward_op(
        d_out, *ctx.saved_tensors, causal=ctx.causal, scale=ctx.scale
    )
    return *d_qkv, None, None, None


_flash_attention_op.register_autograd(_backward, setup_context=_setup_context)


def split_qkv(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed (..., (H + 2 KV) hd) is viewed as q (..., H, hd), k and v (..., KV, hd)."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    return heads.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)


def split_qk(qk: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Packed (..., (H + KV) hd) is viewed as q (..., H, hd) and k (..., KV, hd)."""
    heads = qk.unflatten(-1, (num_heads + num_kv_heads, -1))
    return heads.split((num_heads, num_kv_heads), dim=-2)


@torch.library.custom_op("hamner::flash_attention_qkv_backward", mutates_args=())
def _flash_attention_qkv_backward_op(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    causal: bool,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    normed_qk: Tensor | None = None,
) -> Tensor:
    """The op takes q and k from `normed_qk`, (B, T, (H + KV) hd), where they are not qkv's own."""
    d_qkv = qkv.new_empty(qkv.shape)
    num_heads, head_size = out.shape[2:]
    heads = {"num_heads": num_heads, "num_kv_heads": (qkv.shape[-1] // head_size - num_heads) // 2}
    # The halves of a padded head are not those of its tile: it is rotated back in a second pass.
    is_padded = head_size != padded(head_size)
    rotation = {"cos": cos, "sin": sin, "positions": positions}
    q, k, v = split_qkv(qkv, **heads)
    if normed_qk is not None:
        q, k = split_qk(normed_qk, **heads)
    dq, dk, dv = split_qkv(d_qkv, **heads)
    launch_backward(
        d_out.view(out.shape), q, k, v,
        out=out, lse=lse, documents=documents, causal=causal, scale=scale,
        dq=dq, dk=dk, dv=dv, **({} if is_padded else rotation),
    )  # fmt: skip
    if is_padded and cos is not None:
        launch_packed_rotation(d_qkv, **heads, **rotation, inverse=True, in_place=True)
    return d_qkv


@_flash_attention_qkv_backward_op.register_fake
def _(d_out, qkv, *_rest):
    return qkv.new_empty(qkv.shape)


class _PackedAttention(torch.autograd.Function):
    """It composes registered ops on packed heads, whose gradient is written as one tensor."""

    @staticmethod
    def forward(ctx, qkv, num_heads, num_kv_heads, documents, causal, scale):
        q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
        ctx.causal, ctx.scale = causal, scale
        out, lse = _flash_attention_op(q, k, v, documents, causal=causal, scale=scale)
        ctx.save_for_backward(qkv, out, lse, documents)
        return out.flatten(-2)

    @staticmethod
    def backward(ctx, d_out):
        d_qkv = _flash_attention_qkv_backward_op(
            d_out, *ctx.saved_tensors, causal=ctx.causal, scale=ctx.scale,
            cos=None, sin=None, positions=None,
        )  # fmt: skip
        return d_qkv, None, None, None, None, None


def _check_tensor(name: str, tensor: Tensor) -> None:
    check_dtype(name, tensor)
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its last must be 1")
    check_device(name, tensor)


def check_device(name: str, tensor: Tensor) -> None:
    """The kernels must be able to run where `tensor` is.

    Raises:
        TypeError, ValueError: they cannot.
    """
    if tensor.is_cuda:
        return
    if not INTERPRETED:
        raise ValueError(
            f"{name} is on {tensor.device}; the kernel needs a CUDA device "
            "(or Triton's interpreter, TRITON_INTERPRET=1)"
        )
    if tensor.dtype == torch.bfloat16:
        raise TypeError(f"{name} is bfloat16, which Triton's interpreter computes wrongly")


def _check_head_size(name: str, head_size: int) -> None:
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"{name} has head size {head_size}; it must be 1 to {MAX_HEAD_SIZE}")


def _check_num_heads(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads {num_heads} must be a positive multiple of num_kv_heads {num_kv_heads}"
        )


def check_packed_width(width: int, num_heads: int, num_kv_heads: int) -> int:
    """The function checks packed rows (H + 2 KV) hd and gives their head size.

    Raises:
        ValueError: no such heads, or of a size that the kernels do not take.
    """
    _check_num_heads(num_heads, num_kv_heads)
    head_size = packed_head_size(width, num_heads, num_kv_heads)
    _check_head_size("qkv", head_size)
    return head_size


def _scale(scale: float | None, head_size: int) -> float:
    if scale is None:
        return head_size**-0.5
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    return float(scale)


def optional_document_bounds(document_ids: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The function checks ids against `tokens` (B, T, ...), if there are any, and gives their
    `document_bounds`.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    if document_ids is None:
        return None
    check_dtype("document_ids", document_ids, (torch.int32,))
    check_shape("document_ids", document_ids.shape, tokens.shape[:2])
    check_same_device("document_ids", document_ids, "the tokens", tokens)
    return document_bounds(document_ids)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The op computes softmax(scale * q k^T + mask) v, with grouped-query heads.

    Args:
        q: (B, T, H, hd) float32, float16 or bfloat16, hd up to 128 (64 and 128 waste nothing).
            Strides are free but the last, which is 1: q, k and v may be views of one tensor.
        k: (B, T, KV, hd): as many keys as queries, KV a divisor of H. Query head h sees
            key/value head h // (H / KV).
        v: (B, T, KV, hd_v), hd_v up to 128.
        causal: whether a query sees only keys up to its own position.
        document_ids: (B, T) int32, non-decreasing along T: a query sees only keys of its own
            document.
        scale: of the scores, positive; 1 / sqrt(hd) when None.

    Returns:
        (B, T, H, hd_v) in the dtype of q. The softmax is computed in float32, the weights are
        rounded to the dtype of v before they meet it.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_shape(name, tensor.shape, ("B", "T", "heads", "head size"))
        _check_tensor(name, tensor)
        _check_head_size(name, tensor.shape[-1])
        check_like(name, tensor, "q", q)
        if tensor.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} has (B, T) {tuple(tensor.shape[:2])}, q {tuple(q.shape[:2])}; "
                "they must agree"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head size {k.shape[-1]}, q {q.shape[-1]}; they must agree")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads, k {k.shape[2]}; they must agree")
    _check_num_heads(q.shape[2], k.shape[2])
    documents = optional_document_bounds(document_ids, q)
    scale = _scale(scale, q.shape[-1])
    out, _ = _flash_attention_op(q, k, v, documents, causal=causal, scale=scale)
    return out


def flash_attention_qkv(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The op is `flash_attention` on packed heads; backward writes one packed gradient, uncopied.

    Args:
        qkv: (B, T, (H + 2 KV) hd): the heads of q, then of k, then of v. The last stride is 1.
        num_heads: H.
        num_kv_heads: KV.
        causal, document_ids, scale: as in `flash_attention`.

    Returns:
        (B, T, H hd) in the dtype of qkv.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_shape("qkv", qkv.shape, ("B", "T", "(H + 2 KV) hd"))
    head_size = check_packed_width(qkv.shape[-1], num_heads, num_kv_heads)
    _check_tensor("qkv", qkv)
    documents = optional_document_bounds(document_ids, qkv)
    scale = _scale(scale, head_size)
    return _PackedAttention.apply(qkv, num_heads, num_kv_heads, documents, causal, scale)


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """This is `flash_attention` in plain torch, all scores in memory; float64 for float64."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * _scale(scale, q.shape[-1])
    positions = torch.arange(q.shape[1], device=q.device)
    visible = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
    if causal:
        visible = positions[None, :] <= positions[:, None]
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    p = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v)
