"""The Triton kernels of flash_attention.py.

What a query sees is an interval of keys, and what sees a key is an interval of queries, whatever
mixture of causal and document masks is asked for. Neither end of an interval ever decreases from
one row to the next, so for a block of rows [begin(first), end(last)) is what any row sees and
[begin(last), end(first)) what all of them see. Tiles outside the first are skipped, tiles inside
the second ("full") need no mask; what is left, the causal diagonal, the edges of documents and the
end of the sequence, goes through the same code with MASKED set.

Offsets: the position of a tile is 64-bit, offsets inside a tile 32-bit.
"""

import triton
import triton.language as tl

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
    stride_ob,
    stride_ot,
    stride_oh,
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
    out_ptr += batch * stride_ob + head * stride_oh
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
    _store_tile(out_ptr, stride_ot, first, T, out, BLOCK_M, V_HEAD_SIZE, BLOCK_DV)
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
    stride_ob,
    stride_ot,
    stride_oh,
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
    out_ptr += batch * stride_ob + head * stride_oh
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
    out = _load_tile(out_ptr, stride_ot, first, T, BLOCK_M, V_HEAD_SIZE, BLOCK_DV, not EVEN_T)
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
