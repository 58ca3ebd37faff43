"""FlashAttention with grouped-query attention, forward and backward, for training.

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
from hamner.kernels.rope import launch_packed_rotation

MAX_HEAD_SIZE = 128
LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """Queries and keys a program holds at once, with its warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """a thread may use, so that more programs are resident; None leaves it to the compiler"""


class Config(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dk_dv: Tile


# By capability, then by (head size, value head size) rounded up to 64 or 128. `python -m
# bench.tune_flash_attention` measures on the GPU at hand and prints a row. 8.6 is chosen by
# reasoning and by what ptxas says of registers, not measured.
#
# sm_86 does 256 fused multiply-adds a clock and multiprocessor in bf16, so the matmuls are what
# costs, and a short tile in the inner loop (block_n; block_m in dk_dv) is cheap. What matters is to
# have eight warps resident, in two blocks of four or one of eight, that fill the tensor cores in
# each other's softmax: of 255 registers a thread, they take all 65,536. With four warps, 128 x 64
# tiles spill in forward at head size 64. Share of 101,376 bytes of shared memory, registers a
# thread (the most that Triton 3.6 or 3.9 takes, documents and RoPE or not), blocks resident:
#
#                 forward                  dq                       dk_dv
#     64, 64      32%  222  2 of 4 warps   48%  242  2 of 4 warps   33%  193  2 of 4 warps
#     64, 128     65%  246  1 of 8         48%  168  2 of 4         61%  250  1 of 8
#     128, 128    97%  253  1 of 8         81%  189  1 of 8         81%  228  1 of 8
_SM86 = {
    (64, 64): Config(
        forward=Tile(128, 32, 4, 3),
        dq=Tile(64, 64, 4, 3),
        dk_dv=Tile(32, 64, 4, 3),
    ),
    (64, 128): Config(
        forward=Tile(128, 64, 8, 3),
        dq=Tile(64, 32, 4, 3),
        dk_dv=Tile(32, 128, 8, 2),
    ),
    (128, 128): Config(
        forward=Tile(128, 64, 8, 3),
        dq=Tile(128, 32, 8, 2),
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


@triton.jit
def _place_in_grid(num_blocks, HEADS: tl.constexpr):
    """A program's block of rows, counted from the one with the most work, and its head, counted
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
def _key_bounds(
    query,  # int32: one query, or a block of them
    T,
    document_start_ptr,  # (T,) int32
    document_end_ptr,  # (T,) int32
    CAUSAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """The keys [begin, end) that each query sees."""
    begin = query * 0
    end = begin + T
    if HAS_DOCUMENTS:
        begin = tl.load(document_start_ptr + tl.minimum(query, T - 1))
    if CAUSAL:
        end = query + 1
    elif HAS_DOCUMENTS:
        end = tl.load(document_end_ptr + tl.minimum(query, T - 1))
    return begin, end


@triton.jit
def _query_bounds(
    key,  # int32: one key, or a block of them
    T,
    document_start_ptr,  # (T,) int32
    document_end_ptr,  # (T,) int32
    CAUSAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """The queries [begin, end) that see each key."""
    begin = key * 0
    end = begin + T
    if HAS_DOCUMENTS:
        end = tl.load(document_end_ptr + tl.minimum(key, T - 1))
    if CAUSAL:
        begin = key
    elif HAS_DOCUMENTS:
        begin = tl.load(document_start_ptr + tl.minimum(key, T - 1))
    return begin, end


@triton.jit
def _split_range(first_begin, first_end, last_begin, last_end, BLOCK: tl.constexpr):
    """Cut what a block of rows sees into tiles.

    Returns:
        begin, full_begin, full_end, end: [full_begin, full_end) is full; [begin, full_begin) and
        [full_end, end) need a mask. All but the end are multiples of BLOCK.
    """
    begin = first_begin // BLOCK * BLOCK
    full_begin = tl.cdiv(last_begin, BLOCK) * BLOCK
    full_end = tl.maximum(first_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, last_end


@triton.jit
def _load_tile(
    ptr,
    stride,
    start,
    num_rows,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLAMPED: tl.constexpr,
):
    """Rows [start, start + ROWS) of one head, (ROWS, BLOCK_D), zero beyond HEAD_SIZE.

    Rows past the end repeat the last one where CLAMPED (predicated loads cost registers enough to
    spill): what they give must be masked, or not stored.
    """
    offs_row = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    if CLAMPED:
        offs_row = tl.minimum(offs_row, num_rows - 1 - start)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (offs_row[:, None] * stride + offs_d[None, :])
    if BLOCK_D == HEAD_SIZE:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=offs_d[None, :] < HEAD_SIZE, other=0.0)
    return tile


@triton.jit
def _store_tile(
    ptr,
    stride,
    start,
    num_rows,
    tile,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write `tile` (ROWS, BLOCK_D) to rows [start, start + ROWS) of one head."""
    offs_row = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (offs_row[:, None] * stride + offs_d[None, :])
    mask = (start + offs_row[:, None] < num_rows) & (offs_d[None, :] < HEAD_SIZE)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_back(
    tile,  # (ROWS, HEAD_SIZE) fp32
    start,
    num_rows,
    cos_ptr,  # (num_positions, HEAD_SIZE / 2)
    sin_ptr,  # (num_positions, HEAD_SIZE / 2)
    positions_ptr,  # (num_rows,) int32, or None: the row itself
    num_positions,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
):
    """The gradient of rope.py's result made that of its input: rotated by -sin."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    position = start + tl.arange(0, ROWS)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + tl.minimum(position, num_rows - 1))
        position = tl.maximum(position, 0)
    position = tl.minimum(position, num_positions - 1)
    offs = position[:, None] * HALF + tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + offs).to(tl.float32)
    sin = tl.load(sin_ptr + offs).to(tl.float32)
    # A matmul's accumulator has both halves of a row in one thread, so the split moves nothing.
    first, second = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))
    rotated = tl.join(first * cos + second * sin, second * cos - first * sin)
    return tl.reshape(tl.permute(rotated, (0, 2, 1)), (ROWS, HEAD_SIZE))


@triton.jit
def _attend(
    acc,  # (BLOCK_M, BLOCK_DV) fp32
    row_sum,  # (BLOCK_M,) fp32
    row_max,  # (BLOCK_M,) fp32, base 2
    q,  # (BLOCK_M, BLOCK_D)
    k_ptr,  # (T, HEAD_SIZE)
    v_ptr,  # (T, V_HEAD_SIZE)
    stride_kt,
    stride_vt,
    begin,
    end,
    hole_begin,
    hole_size,
    T,
    offs_m,  # (BLOCK_M,) int32
    document_start_ptr,  # (T,) int32
    document_end_ptr,  # (T,) int32
    scale_log2,
    CAUSAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    EVEN_T: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the keys [begin, end) without [hole_begin, hole_begin + hole_size)."""
    CLAMPED: tl.constexpr = MASKED and not EVEN_T
    if MASKED:
        key_begin, key_end = _key_bounds(
            offs_m, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
        )
    for position in range(begin, end - hole_size, BLOCK_N):
        start = position
        if MASKED:
            start += tl.where(position < hole_begin, 0, hole_size)
        k = _load_tile(k_ptr, stride_kt, start, T, BLOCK_N, HEAD_SIZE, BLOCK_D, CLAMPED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            offs_n = start + tl.arange(0, BLOCK_N)
            visible = (offs_n[None, :] >= key_begin[:, None]) & (offs_n[None, :] < key_end[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        shift = new_max
        if MASKED:
            # A row that has seen no key yet: -inf less -inf would be NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores * scale_log2 - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(p, 1)
        acc = acc * correction[:, None]
        v = _load_tile(v_ptr, stride_vt, start, T, BLOCK_N, V_HEAD_SIZE, BLOCK_DV, CLAMPED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def flash_attention_forward_kernel(
    q_ptr,  # (B, T, H, HEAD_SIZE) input dtype
    k_ptr,  # (B, T, KV, HEAD_SIZE) input dtype
    v_ptr,  # (B, T, KV, V_HEAD_SIZE) input dtype
    out_ptr,  # (B, T, H, V_HEAD_SIZE) input dtype
    lse_ptr,  # (B, H, T) fp32, base 2
    document_start_ptr,  # (B, T) int32, or None
    document_end_ptr,  # (B, T) int32, or None
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    T,
    H,
    scale_log2,
    GROUP: tl.constexpr,  # query heads to a key/value head
    CAUSAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    EVEN_T: tl.constexpr,  # T is a multiple of BLOCK_M and BLOCK_N
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    num_blocks = tl.cdiv(T, BLOCK_M)
    rank, any_head = _place_in_grid(num_blocks, HEADS_TOGETHER)
    block = num_blocks - 1 - rank  # under a causal mask the last queries see the most keys
    head = (any_head % H).to(tl.int64)
    batch = (any_head // H).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // GROUP * stride_kh
    v_ptr += batch * stride_vb + head // GROUP * stride_vh
    out_ptr += (batch * T * H + head) * V_HEAD_SIZE
    lse_ptr += (batch * H + head) * T
    if HAS_DOCUMENTS:
        document_start_ptr += batch * T
        document_end_ptr += batch * T

    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, T) - 1
    offs_m = first + tl.arange(0, BLOCK_M)
    first_begin, first_end = _key_bounds(
        first, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
    )
    last_begin, last_end = _key_bounds(
        last, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
    )
    begin, full_begin, full_end, end = _split_range(
        first_begin, first_end, last_begin, last_end, BLOCK_N
    )

    q = _load_tile(q_ptr, stride_qt, first, T, BLOCK_M, HEAD_SIZE, BLOCK_D, not EVEN_T)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, stride_kt, stride_vt,
        full_begin, full_end, 0, 0, T, offs_m, document_start_ptr, document_end_ptr, scale_log2,
        CAUSAL, HAS_DOCUMENTS, EVEN_T,
        HEAD_SIZE, V_HEAD_SIZE, BLOCK_N, BLOCK_D, BLOCK_DV, MASKED=False,
    )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, stride_kt, stride_vt,
        begin, end, full_begin, full_end - full_begin,
        T, offs_m, document_start_ptr, document_end_ptr, scale_log2,
        CAUSAL, HAS_DOCUMENTS, EVEN_T,
        HEAD_SIZE, V_HEAD_SIZE, BLOCK_N, BLOCK_D, BLOCK_DV, MASKED=True,
    )  # fmt: skip

    out = acc / row_sum[:, None]
    _store_tile(out_ptr, H * V_HEAD_SIZE, first, T, out, BLOCK_M, V_HEAD_SIZE, BLOCK_DV)
    tl.store(lse_ptr + offs_m, row_max + tl.log2(row_sum), mask=offs_m < T)


@triton.jit
def _accumulate_dq(
    dq,  # (BLOCK_M, BLOCK_D) fp32
    q,  # (BLOCK_M, BLOCK_D)
    d_out,  # (BLOCK_M, BLOCK_DV)
    lse,  # (BLOCK_M,) fp32, base 2
    delta,  # (BLOCK_M,) fp32
    k_ptr,  # (T, HEAD_SIZE)
    v_ptr,  # (T, V_HEAD_SIZE)
    stride_kt,
    stride_vt,
    begin,
    end,
    hole_begin,
    hole_size,
    T,
    offs_m,  # (BLOCK_M,) int32
    document_start_ptr,  # (T,) int32
    document_end_ptr,  # (T,) int32
    scale_log2,
    CAUSAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    EVEN_T: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add to dq, but for the scale, what the keys [begin, end) without the hole give."""
    CLAMPED: tl.constexpr = MASKED and not EVEN_T
    if MASKED:
        key_begin, key_end = _key_bounds(
            offs_m, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
        )
    for position in range(begin, end - hole_size, BLOCK_N):
        start = position
        if MASKED:
            start += tl.where(position < hole_begin, 0, hole_size)
        k = _load_tile(k_ptr, stride_kt, start, T, BLOCK_N, HEAD_SIZE, BLOCK_D, CLAMPED)
        v = _load_tile(v_ptr, stride_vt, start, T, BLOCK_N, V_HEAD_SIZE, BLOCK_DV, CLAMPED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        if MASKED:
            offs_n = start + tl.arange(0, BLOCK_N)
            visible = (offs_n[None, :] >= key_begin[:, None]) & (offs_n[None, :] < key_end[:, None])
            p = tl.where(visible, p, 0.0)
        dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        d_scores = p * (dp - delta[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def flash_attention_dq_kernel(
    q_ptr,  # (B, T, H, HEAD_SIZE) input dtype
    k_ptr,  # (B, T, KV, HEAD_SIZE) input dtype
    v_ptr,  # (B, T, KV, V_HEAD_SIZE) input dtype
    out_ptr,  # (B, T, H, V_HEAD_SIZE) input dtype
    d_out_ptr,  # (B, T, H, V_HEAD_SIZE) input dtype
    lse_ptr,  # (B, H, T) fp32, base 2
    delta_ptr,  # (B, H, T) fp32, written here: sum over a row of out * d_out
    dq_ptr,  # (B, T, H, HEAD_SIZE) input dtype
    document_start_ptr,  # (B, T) int32, or None
    document_end_ptr,  # (B, T) int32, or None
    cos_ptr,  # (num_positions, HEAD_SIZE / 2), or None: q and k were not rotated
    sin_ptr,  # (num_positions, HEAD_SIZE / 2), or None
    positions_ptr,  # (B, T) int32, or None: the row
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    T,
    H,
    num_positions,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    EVEN_T: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    num_blocks = tl.cdiv(T, BLOCK_M)
    # Head by head, unlike the others: 2% faster here (profiles/LOG.md).
    pid = tl.program_id(0)
    block = num_blocks - 1 - pid % num_blocks
    head = (pid // num_blocks % H).to(tl.int64)
    batch = (pid // num_blocks // H).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // GROUP * stride_kh
    v_ptr += batch * stride_vb + head // GROUP * stride_vh
    out_ptr += (batch * T * H + head) * V_HEAD_SIZE
    d_out_ptr += batch * stride_dob + head * stride_doh
    dq_ptr += batch * stride_dqb + head * stride_dqh
    lse_ptr += (batch * H + head) * T
    delta_ptr += (batch * H + head) * T
    if HAS_DOCUMENTS:
        document_start_ptr += batch * T
        document_end_ptr += batch * T

    first = block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, T) - 1
    offs_m = first + tl.arange(0, BLOCK_M)
    first_begin, first_end = _key_bounds(
        first, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
    )
    last_begin, last_end = _key_bounds(
        last, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
    )
    begin, full_begin, full_end, end = _split_range(
        first_begin, first_end, last_begin, last_end, BLOCK_N
    )

    d_out = _load_tile(d_out_ptr, stride_dot, first, T, BLOCK_M, V_HEAD_SIZE, BLOCK_DV, not EVEN_T)
    out = _load_tile(out_ptr, H * V_HEAD_SIZE, first, T, BLOCK_M, V_HEAD_SIZE, BLOCK_DV, not EVEN_T)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + offs_m, delta, mask=offs_m < T)
    lse = tl.load(lse_ptr + tl.minimum(offs_m, T - 1))
    q = _load_tile(q_ptr, stride_qt, first, T, BLOCK_M, HEAD_SIZE, BLOCK_D, not EVEN_T)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _accumulate_dq(
        dq, q, d_out, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt,
        full_begin, full_end, 0, 0, T, offs_m, document_start_ptr, document_end_ptr, scale_log2,
        CAUSAL, HAS_DOCUMENTS, EVEN_T,
        HEAD_SIZE, V_HEAD_SIZE, BLOCK_N, BLOCK_D, BLOCK_DV, MASKED=False,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, d_out, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt,
        begin, end, full_begin, full_end - full_begin,
        T, offs_m, document_start_ptr, document_end_ptr, scale_log2,
        CAUSAL, HAS_DOCUMENTS, EVEN_T,
        HEAD_SIZE, V_HEAD_SIZE, BLOCK_N, BLOCK_D, BLOCK_DV, MASKED=True,
    )  # fmt: skip
    dq *= scale
    if cos_ptr is not None:
        if positions_ptr is not None:
            positions_ptr += batch * T
        dq = _rotate_back(
            dq, first, T, cos_ptr, sin_ptr, positions_ptr, num_positions, BLOCK_M, HEAD_SIZE
        )
    _store_tile(dq_ptr, stride_dqt, first, T, dq, BLOCK_M, HEAD_SIZE, BLOCK_D)


@triton.jit
def _accumulate_dk_dv(
    dk,  # (BLOCK_N, BLOCK_D) fp32
    dv,  # (BLOCK_N, BLOCK_DV) fp32
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_DV)
    q_ptr,  # (T, GROUP, HEAD_SIZE)
    d_out_ptr,  # (T, GROUP, V_HEAD_SIZE)
    lse_ptr,  # (GROUP, T) fp32, base 2
    delta_ptr,  # (GROUP, T) fp32
    stride_qt,
    stride_qh,
    stride_dot,
    stride_doh,
    begin,
    end,
    hole_begin,
    hole_size,
    T,
    offs_n,  # (BLOCK_N,) int32
    document_start_ptr,  # (T,) int32
    document_end_ptr,  # (T,) int32
    scale_log2,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    EVEN_T: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add to dv, and to dk but for the scale, what the queries [begin, end) without the hole give,
    over all heads of the group.

    Scores are built transposed, so that p and d_scores are left operands as they stand.
    """
    CLAMPED: tl.constexpr = MASKED and not EVEN_T
    if MASKED:
        query_begin, query_end = _query_bounds(
            offs_n, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
        )
    # One loop over heads and tiles together keeps the load pipeline full from head to head. Its
    # first loads are prepared even when there is no tile, hence the divisor of at least 1.
    num_tiles = tl.cdiv(end - begin - hole_size, BLOCK_M)
    # Hopper's matmuls run while the warps go on, but one whose result the next line needs is waited
    # for, with all before it. With dp in front of p, those of dv and dk run on into the next tile.
    # Wider heads have no registers for a dp that waits.
    DP_FIRST: tl.constexpr = BLOCK_D + BLOCK_DV <= 128
    for i in range(GROUP * num_tiles):
        head = i // tl.maximum(num_tiles, 1)
        start = begin + (i - head * num_tiles) * BLOCK_M
        if MASKED:
            start += tl.where(start < hole_begin, 0, hole_size)
        head = tl.cast(head, tl.int64)
        q = _load_tile(
            q_ptr + head * stride_qh, stride_qt, start, T, BLOCK_M, HEAD_SIZE, BLOCK_D, CLAMPED
        )
        d_out = _load_tile(
            d_out_ptr + head * stride_doh, stride_dot, start, T,
            BLOCK_M, V_HEAD_SIZE, BLOCK_DV, CLAMPED,
        )  # fmt: skip
        offs_m = start + tl.arange(0, BLOCK_M)
        offs_row = tl.minimum(offs_m, T - 1) if CLAMPED else offs_m
        lse = tl.load(lse_ptr + head * T + offs_row)
        delta = tl.load(delta_ptr + head * T + offs_row)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        if DP_FIRST:
            dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        p = tl.exp2(scores * scale_log2 - lse[None, :])
        if MASKED:
            visible = (offs_m[None, :] >= query_begin[:, None]) & (
                offs_m[None, :] < query_end[:, None]
            )
            p = tl.where(visible, p, 0.0)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
        if not DP_FIRST:
            dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
        d_scores = p * (dp - delta[None, :])
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def flash_attention_dk_dv_kernel(
    q_ptr,  # (B, T, H, HEAD_SIZE) input dtype
    k_ptr,  # (B, T, KV, HEAD_SIZE) input dtype
    v_ptr,  # (B, T, KV, V_HEAD_SIZE) input dtype
    d_out_ptr,  # (B, T, H, V_HEAD_SIZE) input dtype
    lse_ptr,  # (B, H, T) fp32, base 2
    delta_ptr,  # (B, H, T) fp32
    dk_ptr,  # (B, T, KV, HEAD_SIZE) input dtype
    dv_ptr,  # (B, T, KV, V_HEAD_SIZE) input dtype
    document_start_ptr,  # (B, T) int32, or None
    document_end_ptr,  # (B, T) int32, or None
    cos_ptr,  # (num_positions, HEAD_SIZE / 2), or None: q and k were not rotated
    sin_ptr,  # (num_positions, HEAD_SIZE / 2), or None
    positions_ptr,  # (B, T) int32, or None: the row
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_dvb,
    stride_dvt,
    stride_dvh,
    T,
    KV,
    num_positions,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    EVEN_T: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    V_HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    num_blocks = tl.cdiv(T, BLOCK_N)
    # Under a causal mask the first keys are seen by the most queries.
    block, any_head = _place_in_grid(num_blocks, tl.cdiv(HEADS_TOGETHER, GROUP))
    kv_head = (any_head % KV).to(tl.int64)
    batch = (any_head // KV).to(tl.int64)
    q_ptr += batch * stride_qb + kv_head * GROUP * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    d_out_ptr += batch * stride_dob + kv_head * GROUP * stride_doh
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh
    lse_ptr += (batch * KV + kv_head) * GROUP * T
    delta_ptr += (batch * KV + kv_head) * GROUP * T
    if HAS_DOCUMENTS:
        document_start_ptr += batch * T
        document_end_ptr += batch * T

    first = block * BLOCK_N
    last = tl.minimum(first + BLOCK_N, T) - 1
    offs_n = first + tl.arange(0, BLOCK_N)
    first_begin, first_end = _query_bounds(
        first, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
    )
    last_begin, last_end = _query_bounds(
        last, T, document_start_ptr, document_end_ptr, CAUSAL, HAS_DOCUMENTS
    )
    begin, full_begin, full_end, end = _split_range(
        first_begin, first_end, last_begin, last_end, BLOCK_M
    )

    k = _load_tile(k_ptr, stride_kt, first, T, BLOCK_N, HEAD_SIZE, BLOCK_D, not EVEN_T)
    v = _load_tile(v_ptr, stride_vt, first, T, BLOCK_N, V_HEAD_SIZE, BLOCK_DV, not EVEN_T)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dk, dv = _accumulate_dk_dv(
        dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr,
        stride_qt, stride_qh, stride_dot, stride_doh,
        begin, end, full_begin, full_end - full_begin,
        T, offs_n, document_start_ptr, document_end_ptr, scale_log2,
        GROUP, CAUSAL, HAS_DOCUMENTS, EVEN_T,
        HEAD_SIZE, V_HEAD_SIZE, BLOCK_M, BLOCK_D, BLOCK_DV, MASKED=True,
    )  # fmt: skip
    dk, dv = _accumulate_dk_dv(
        dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, delta_ptr,
        stride_qt, stride_qh, stride_dot, stride_doh,
        full_begin, full_end, 0, 0,
        T, offs_n, document_start_ptr, document_end_ptr, scale_log2,
        GROUP, CAUSAL, HAS_DOCUMENTS, EVEN_T,
        HEAD_SIZE, V_HEAD_SIZE, BLOCK_M, BLOCK_D, BLOCK_DV, MASKED=False,
    )  # fmt: skip
    # dv first: its registers are then free for the rotation of dk.
    _store_tile(dv_ptr, stride_dvt, first, T, dv, BLOCK_N, V_HEAD_SIZE, BLOCK_DV)
    dk *= scale
    if cos_ptr is not None:
        if positions_ptr is not None:
            positions_ptr += batch * T
        dk = _rotate_back(
            dk, first, T, cos_ptr, sin_ptr, positions_ptr, num_positions, BLOCK_N, HEAD_SIZE
        )
    _store_tile(dk_ptr, stride_dkt, first, T, dk, BLOCK_N, HEAD_SIZE, BLOCK_D)


INTERPRETED = not isinstance(flash_attention_forward_kernel, triton.JITFunction)


def select_config(
    device: torch.device, dtype: torch.dtype, head_size: int, v_head_size: int
) -> Config:
    """The launch configuration for these head sizes."""
    if dtype == torch.float32:
        return FLOAT32_CONFIG
    size = 64 if head_size <= 64 else 128
    v_size = 64 if size == 64 and v_head_size <= 64 else 128
    return CONFIGS[capability(device)][size, v_size]


def document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token's document begins and ends, without waiting for the GPU.

    Args:
        document_ids: (B, T) int32, non-decreasing along T.

    Returns:
        (starts, ends), both (B, T) int32: the token's document is [starts, ends) of its row.
    """
    document_ids = document_ids.contiguous()
    starts = torch.searchsorted(document_ids, document_ids, out_int32=True)
    ends = torch.searchsorted(document_ids, document_ids, right=True, out_int32=True)
    return starts, ends


def _padded(head_size: int) -> int:
    """Width of a tile that holds heads of this size."""
    return max(16, triton.next_power_of_2(head_size))


def _constexprs(
    q: Tensor, k: Tensor, v: Tensor, tile: Tile, *, documents: bool, causal: bool
) -> dict[str, object]:
    """What all three kernels are specialised on, and their launch options."""
    seq_len, num_heads, head_size = q.shape[1:]
    v_head_size = v.shape[-1]
    return {
        "GROUP": num_heads // k.shape[2],
        "CAUSAL": causal,
        "HAS_DOCUMENTS": documents,
        "EVEN_T": seq_len % tile.block_m == 0 and seq_len % tile.block_n == 0,
        "HEAD_SIZE": head_size,
        "V_HEAD_SIZE": v_head_size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": _padded(head_size),
        "BLOCK_DV": _padded(v_head_size),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q, k, v: (B, T, H, hd), (B, T, KV, hd), (B, T, KV, hd_v), any strides but the last.
        document_starts, document_ends: of `document_bounds`, or None.
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
            q, k, v, out, lse, document_starts, document_ends,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            seq_len, num_heads, scale * LOG2_E,
            **_constexprs(q, k, v, tile, documents=document_starts is not None, causal=causal),
        )  # fmt: skip
    return out, lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Differentiate, into dq, dk and dv: shaped as q, k and v, any strides but the last.

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
    cos, sin, positions = (x if x is None else x.contiguous() for x in (cos, sin, positions))
    num_positions = 0 if cos is None else cos.shape[0]
    masks = {"documents": document_starts is not None, "causal": causal}
    with torch.cuda.device_of(q):
        grid = (triton.cdiv(seq_len, config.dq.block_m) * num_heads * batch_size,)
        flash_attention_dq_kernel[grid](
            q, k, v, out.contiguous(), d_out, lse, delta, dq, document_starts, document_ends,
            cos, sin, positions,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *d_out.stride()[:3], *dq.stride()[:3],
            seq_len, num_heads, num_positions, scale, scale * LOG2_E,
            **_constexprs(q, k, v, config.dq, **masks),
        )  # fmt: skip
        grid = (triton.cdiv(seq_len, config.dk_dv.block_n) * num_kv_heads * batch_size,)
        flash_attention_dk_dv_kernel[grid](
            q, k, v, d_out, lse, delta, dk, dv, document_starts, document_ends,
            cos, sin, positions,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *d_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            seq_len, num_kv_heads, num_positions, scale, scale * LOG2_E,
            **_constexprs(q, k, v, config.dk_dv, **masks),
        )  # fmt: skip


_flash_attention_op = torch.library.custom_op(
    "hamner::flash_attention", launch_forward, mutates_args=()
)


@_flash_attention_op.register_fake
def _(q, k, v, document_starts, document_ends, causal, scale):
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
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    launch_backward(
        d_out, q, k, v, out=out, lse=lse, document_starts=document_starts,
        document_ends=document_ends, causal=causal, scale=scale, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return dq, dk, dv


@_flash_attention_backward_op.register_fake
def _(d_out, q, k, v, out, lse, document_starts, document_ends, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, document_starts, document_ends, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, document_starts, document_ends)


def _backward(ctx, d_out, _d_lse):
    q, k, v, out, lse, document_starts, document_ends = ctx.saved_tensors
    d_qkv = _flash_attention_backward_op(
        d_out, q, k, v, out=out, lse=lse, document_starts=document_starts,
        document_ends=document_ends, causal=ctx.causal, scale=ctx.scale,
    )  # fmt: skip
    return *d_qkv, None, None, None, None


_flash_attention_op.register_autograd(_backward, setup_context=_setup_context)


def split_qkv(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of packed (..., (H + 2 KV) hd) as q (..., H, hd), k and v (..., KV, hd)."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    return heads.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)


@torch.library.custom_op("hamner::flash_attention_qkv", mutates_args=())
def _flash_attention_qkv_op(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    out, lse = launch_forward(
        q, k, v, document_starts=document_starts, document_ends=document_ends,
        causal=causal, scale=scale,
    )  # fmt: skip
    return out.flatten(-2), lse


@_flash_attention_qkv_op.register_fake
def _(qkv, num_heads, num_kv_heads, document_starts, document_ends, causal, scale):
    batch_size, seq_len, width = qkv.shape
    head_size = width // (num_heads + 2 * num_kv_heads)
    out = qkv.new_empty(batch_size, seq_len, num_heads * head_size)
    return out, qkv.new_empty(batch_size, num_heads, seq_len, dtype=torch.float32)


@torch.library.custom_op("hamner::flash_attention_qkv_backward", mutates_args=())
def _flash_attention_qkv_backward_op(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    document_starts: Tensor | None,
    document_ends: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    causal: bool,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    d_qkv = qkv.new_empty(qkv.shape)
    head_size = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    # The halves of a padded head are not those of its tile: it is rotated back in a second pass.
    is_padded = head_size != _padded(head_size)
    rotation = {"cos": cos, "sin": sin, "positions": positions}
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    dq, dk, dv = split_qkv(d_qkv, num_heads, num_kv_heads)
    launch_backward(
        d_out.unflatten(-1, (num_heads, -1)), q, k, v,
        out=out.unflatten(-1, (num_heads, -1)), lse=lse,
        document_starts=document_starts, document_ends=document_ends, causal=causal, scale=scale,
        dq=dq, dk=dk, dv=dv, **({} if is_padded else rotation),
    )  # fmt: skip
    if is_padded and cos is not None:
        launch_packed_rotation(
            d_qkv, num_heads=num_heads, num_kv_heads=num_kv_heads, **rotation,
            inverse=True, in_place=True,
        )  # fmt: skip
    return d_qkv


@_flash_attention_qkv_backward_op.register_fake
def _(
    d_out, qkv, out, lse, starts, ends, num_heads, num_kv_heads, causal, scale, cos, sin, positions
):
    return qkv.new_empty(qkv.shape)


def _qkv_setup_context(ctx, inputs, output):
    qkv, num_heads, num_kv_heads, document_starts, document_ends, causal, scale = inputs
    out, lse = output
    ctx.arguments = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "causal": causal, "scale": scale
    }  # fmt: skip
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, document_starts, document_ends)


def _qkv_backward(ctx, d_out, _d_lse):
    qkv, out, lse, document_starts, document_ends = ctx.saved_tensors
    d_qkv = _flash_attention_qkv_backward_op(
        d_out, qkv, out, lse, document_starts=document_starts, document_ends=document_ends,
        **ctx.arguments, cos=None, sin=None, positions=None,
    )  # fmt: skip
    return d_qkv, None, None, None, None, None, None


_flash_attention_qkv_op.register_autograd(_qkv_backward, setup_context=_qkv_setup_context)


def _check_tensor(name: str, tensor: Tensor) -> None:
    check_dtype(name, tensor)
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} has strides {tensor.stride()}; its last must be 1")
    check_device(name, tensor)


def check_device(name: str, tensor: Tensor) -> None:
    """Check that the kernels can run where `tensor` is.

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
    """The head size of packed rows (H + 2 KV) hd, checked.

    Raises:
        ValueError: no such heads, or of a size that the kernels do not take.
    """
    _check_num_heads(num_heads, num_kv_heads)
    head_size, rest = divmod(width, num_heads + 2 * num_kv_heads)
    if rest:
        raise ValueError(
            f"qkv has width {width}; it must be a multiple of num_heads + 2 num_kv_heads "
            f"= {num_heads + 2 * num_kv_heads}"
        )
    _check_head_size("qkv", head_size)
    return head_size


def _scale(scale: float | None, head_size: int) -> float:
    if scale is None:
        return head_size**-0.5
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be positive and finite")
    return float(scale)


def optional_document_bounds(
    document_ids: Tensor | None, tokens: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`document_bounds` of ids that are checked against `tokens` (B, T, ...), if there are any.

    Raises:
        TypeError, ValueError: they do not fit.
    """
    if document_ids is None:
        return None, None
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
    starts, ends = optional_document_bounds(document_ids, q)
    out, _ = _flash_attention_op(
        q, k, v, document_starts=starts, document_ends=ends,
        causal=causal, scale=_scale(scale, q.shape[-1]),
    )  # fmt: skip
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
    """`flash_attention` on packed heads; backward writes one packed gradient, without a copy.

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
    starts, ends = optional_document_bounds(document_ids, qkv)
    out, _ = _flash_attention_qkv_op(
        qkv, num_heads, num_kv_heads, document_starts=starts, document_ends=ends,
        causal=causal, scale=_scale(scale, head_size),
    )  # fmt: skip
    return out


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`flash_attention` in plain torch, all scores in memory; softmax in float64 for float64."""
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
