"""FLOPs, bytes moved and bytes kept for backward of every op of a step are stated here, once.

A cost is what an op needs: every operand is read once, every result written once. The time of a
step, the memory account, the floors in profiles, the rates in bench/ and the table in
kernels/README.md all read these functions (tests compare the last); what a kernel moves beyond them
is said where that kernel is described.

In arguments, `elements` counts those of one tensor, `element_size` is bytes an element (bf16 unless
said otherwise), `tokens` are those of a micro-batch, and `backward` asks for the backward pass.
"""

import math
from collections import Counter
from dataclasses import dataclass

from hamner.config.model import ModelConfig
from hamner.hardware import GIB, Gpu

BF16, FP32 = 2, 4
"""bytes an element"""
MUON_STEPS, MUON_QUADRATICS = 2, 7
"""of Muon's iteration: `hamner.kernels.muon.STEPS` has so many, said again for want of torch; a
test keeps the two equal"""
ERROR_TILES, ERROR_ROWS, ERROR_COLUMNS, INT8_GROUP = 64, 4, 32, 256
"""of the sample of an int8 operand's error, as hamner.kernels.int8_error has them: tiles, lines of
a tile by the way they lie, and elements that share a scale where lines are grouped; likewise"""


@dataclass(frozen=True)
class Cost:
    """A cost is the arithmetic and the traffic that a piece of work cannot do without."""

    flops: float = 0
    bytes: float = 0
    int8_flops: float = 0
    """of the flops, those of int8 matmuls"""

    def floor_seconds(self, gpu: Gpu, precision: str) -> float:
        """The floor is the longer of arithmetic at peak and traffic at full bandwidth; int8 of a
        card whose peak is not known counts as traffic alone."""
        arithmetic = (self.flops - self.int8_flops) / (gpu.peak_tflops(precision) * 1e12)
        if gpu.int8_tops:
            arithmetic += self.int8_flops / (gpu.int8_tops * 1e12)
        return max(arithmetic, self.bytes / (gpu.bandwidth_gbs * 1e9))

    def __add__(self, other: "Cost") -> "Cost":
        int8_flops = self.int8_flops + other.int8_flops
        return Cost(self.flops + other.flops, self.bytes + other.bytes, int8_flops)

    def __mul__(self, times: float) -> "Cost":
        return Cost(times * self.flops, times * self.bytes, times * self.int8_flops)


def rms_norm(
    elements: int,
    element_size: int = BF16,
    *,
    adds_residual: bool = False,
    backward: bool = False,
    recompute: bool = False,
) -> Cost:
    """The norm reads its input and writes its result.

    Args:
        elements: of the input.
        element_size: of input and result; the weight is too small to count.
        adds_residual: a second input is read and their sum written; in backward the gradient that
            arrives at the sum is read.
        backward: the input and the result's gradient are read, the input's gradient written.
        recompute: backward also writes the result again.
    """
    tensors = (3 + adds_residual + recompute) if backward else (4 if adds_residual else 2)
    return Cost(bytes=tensors * elements * element_size)


def swiglu(
    elements: int, element_size: int = BF16, *, backward: bool = False, recompute: bool = False
) -> Cost:
    """SwiGLU reads gate and up and writes `elements`; with `recompute`, backward writes them too.

    Backward reads gate, up and the result's gradient and writes the gradients of gate and up.
    """
    tensors = (5 + recompute) if backward else 3
    return Cost(bytes=tensors * elements * element_size)


def rope(elements: int, element_size: int = BF16) -> Cost:
    """RoPE reads and writes the `elements` of q and k, in backward those of their gradients."""
    return Cost(bytes=2 * elements * element_size)


def qk_norm_rope(elements: int, element_size: int = BF16, *, backward: bool = False) -> Cost:
    """Norm and RoPE of the `elements` of q and k are a pass that reads and writes them.

    Backward reads them and the result's gradients and writes theirs.
    """
    return Cost(bytes=(3 if backward else 2) * elements * element_size)


def matmul(rows: int, k: int, n: int, element_size: int = BF16, *, experts: int = 1) -> Cost:
    """A matmul is (rows, k) x (k, n); its backward is two more of the same size.

    A grouped one shares its `rows` among experts, each with a (k, n) weight of its own.
    """
    moved = rows * (k + n) + experts * k * n
    return Cost(flops=2 * rows * k * n, bytes=moved * element_size)


def quantize_int8(elements: int, element_size: int = BF16) -> Cost:
    """Quantisation reads its input and writes a byte an element; scales are too few to count."""
    return Cost(bytes=elements * (element_size + 1))


def int8_error(
    lines: int,
    length: int,
    element_size: int = BF16,
    *,
    is_transposed: bool = False,
    is_grouped: bool = False,
) -> Cost:
    """The error of an int8 operand is measured on tiles of its lines, which are read twice.

    Args:
        lines: of the operand, each of `length` elements with a scale of their own.
        is_transposed: lines are columns of what is read.
        is_grouped: `INT8_GROUP` elements of a line share a scale, and a tile has no more of it.
    """
    if is_grouped:
        lines, length = lines * -(-length // INT8_GROUP), INT8_GROUP
    sampled = min(lines, ERROR_TILES * (ERROR_COLUMNS if is_transposed else ERROR_ROWS))
    return Cost(bytes=2 * sampled * length * element_size)


def int8_matmul(rows: int, k: int, n: int, element_size: int = BF16) -> Cost:
    """An int8 matmul reads a byte an element of both operands and writes a wider result."""
    flops = 2 * rows * k * n
    return Cost(flops, rows * k + k * n + rows * n * element_size, int8_flops=flops)


def moe_mlp(
    elements: int,
    routed_rows: int,
    *,
    width: int,
    inner: int,
    experts: int,
    element_size: int = BF16,
    backward: bool = False,
) -> Cost:
    """The experts' SwiGLU MLPs take `elements` of x to as many, through `routed_rows` rows.

    A row goes through three matrices of width x inner. Backward twice as much is computed, and each
    matrix is read and its gradient written.
    """
    passes = 2 if backward else 1
    weights = 3 * experts * width * inner
    return Cost(
        flops=passes * 6 * routed_rows * width * inner,
        bytes=(2 * elements + passes * weights) * element_size,
    )


def moe_rows(tokens: int, routed_rows: int, width: int, element_size: int = BF16) -> Cost:
    """Rows are gathered by expert and summed back, with the same traffic in both directions."""
    return Cost(bytes=(3 * routed_rows + tokens) * width * element_size)


def router_linear(
    tokens: int, width: int, experts: int, element_size: int = BF16, *, backward: bool = False
) -> Cost:
    """The router reads x and writes fp32 logits.

    Backward reads x and the logits' fp32 gradient and writes the gradient of x.
    """
    passes = 2 if backward else 1
    return Cost(
        flops=passes * 2 * tokens * width * experts,
        bytes=passes * tokens * width * element_size + FP32 * tokens * experts,
    )


def attention(
    pairs: float,
    query_elements: int,
    key_elements: int,
    *,
    width: int,
    element_size: int = BF16,
    value_widths: int = 1,
    backward: bool = False,
) -> Cost:
    """Attention without its scores in memory reads q, k and v and writes a result as large as q.

    Forward has q k^T and p v; backward has the gradients of q, k, v and p, and q k^T again, and
    moves each tensor and its gradient.

    Args:
        pairs: of a query and a key that it sees, over the batch: half of the square under a causal
            mask.
        query_elements: of q.
        key_elements: of k.
        width: query heads x head size.
        element_size: of every tensor.
        value_widths: size of a head's values over that of its keys; 2 for differential attention.
        backward: the backward pass.
    """
    products = (3 + 2 * value_widths) if backward else (1 + value_widths)
    moved = 2 * (query_elements + key_elements) * (2 if backward else 1)
    return Cost(flops=2 * products * pairs * width, bytes=moved * element_size)


def differential_combination(elements: int, *, backward: bool = False) -> Cost:
    """The outputs of two attention maps are subtracted and normalised a head, in bf16."""
    return Cost(bytes=BF16 * elements * (5 if backward else 3))


def linear_cross_entropy(
    tokens: int, width: int, vocab_size: int, element_size: int = BF16, *, logit_passes: int = 2
) -> Cost:
    """The loss and all its gradients take three matmuls, and passes over the logits between them.

    The bytes are the logits' alone, read and written at least once; `matmul` has those of each
    product.
    """
    head = matmul(tokens, width, vocab_size)
    return Cost(3 * head.flops, logit_passes * tokens * vocab_size * element_size)


def scale_loss_gradients(hidden_elements: int, weight_elements: int, element_size: int) -> Cost:
    """Backward multiplies the loss's gradients, formed in forward, by what arrives.

    The hidden states' are read and written, the weight's read in fp32 and written.
    """
    written = hidden_elements + weight_elements
    return Cost(
        bytes=hidden_elements * element_size + weight_elements * FP32 + written * element_size
    )


def tied_embedding_backward(
    tokens: int, distinct_tokens: int, width: int, element_size: int = BF16
) -> Cost:
    """The gradient of each token is read and added to the row of each token that occurred."""
    return Cost(bytes=(tokens + 2 * distinct_tokens) * width * element_size)


def adamw(
    parameters: int,
    *,
    split_master: bool,
    gradient_size: int = BF16,
    has_copy: bool = True,
) -> Cost:
    """AdamW reads the gradient, and reads and writes two fp32 moments and the master.

    Args:
        parameters: how many.
        split_master: the master is a bf16 weight and the int16 that it lacks, both read and
            written; else it is fp32.
        gradient_size: bytes of a gradient.
        has_copy: a bf16 copy of a whole master is written beside it.
    """
    weight = 2 * (BF16 + 2) if split_master else 2 * FP32 + (BF16 if has_copy else 0)
    return Cost(bytes=parameters * (gradient_size + 2 * 2 * FP32 + weight))


def muon_momentum(parameters: int, *, gradient_size: int = BF16, update_size: int = BF16) -> Cost:
    """Muon takes the gradient into the fp32 momentum and writes the update."""
    return Cost(bytes=parameters * (gradient_size + 2 * FP32 + update_size))


def muon_apply(
    parameters: int, *, split_master: bool, update_size: int = BF16, has_copy: bool = True
) -> Cost:
    """Muon takes the orthogonal update into the master; see `adamw` for the arguments."""
    weight = 2 * (BF16 + 2) if split_master else 2 * FP32 + (BF16 if has_copy else 0)
    return Cost(bytes=parameters * (update_size + weight))


def symmetric_product(
    batch: int, rows: int, k: int, element_size: int = BF16, *, has_addend: bool = False
) -> Cost:
    """The products of (rows, k) matrices with their own transposes need half of the arithmetic.

    The whole results are written; of an addend, being symmetric, half is read.
    """
    square = rows * rows
    moved = rows * k + square + (square // 2 if has_addend else 0)
    return Cost(flops=batch * square * k, bytes=batch * moved * element_size)


def orthogonalize(rows: int, columns: int, element_size: int = BF16) -> Cost:
    """Muon's iteration takes in each step the product of a matrix's shorter side with itself,
    quadratics of it, one after the other, and the matrix by the last of them."""
    m, n = min(rows, columns), max(rows, columns)
    gram = symmetric_product(1, m, n, element_size)
    quadratic = symmetric_product(1, m, m, element_size, has_addend=True)
    parts = (
        (MUON_STEPS, gram),
        (MUON_QUADRATICS, quadratic),
        (MUON_STEPS, matmul(m, m, n, element_size)),
    )
    return Cost(sum(n * part.flops for n, part in parts), sum(n * part.bytes for n, part in parts))


def hidden_matrices(model: ModelConfig) -> dict[tuple[int, int], int]:
    """The logical matrices that Muon updates, by rows and columns: how many a block has."""
    d, kv = model.hidden_size, model.num_kv_heads * model.head_size
    counts: Counter[tuple[int, int]] = Counter()
    counts[d, d] += 2
    counts[kv, d] += 2
    dense, inner = dense_width(model), model.expert_intermediate_size
    for width, number in ((dense, 1 if dense else 0), (inner, model.num_experts)):
        counts[width, d] += 2 * number
        counts[d, width] += number
    return {shape: count for shape, count in counts.items() if count}


def hidden_parameters(model: ModelConfig) -> int:
    """Muon updates this many parameters of a model."""
    shapes = hidden_matrices(model).items()
    return model.num_layers * sum(rows * columns * count for (rows, columns), count in shapes)


def muon_held(model: ModelConfig, element_size: int) -> int:
    """Muon's update holds so many bytes beside its state.

    They are the updates of one kind of packed parameter, of all layers, the largest being gate and
    up, and of each of its logical matrices a copy and three squares; or of as many other kinds as
    are no larger together, for down with q and o more squares.
    """
    d = model.hidden_size
    kinds = (dense_width(model), 1), (model.expert_intermediate_size, model.num_experts)
    elements = (
        4 * number * width * d + 3 * max(2 * number, number + 2) * min(width, d) ** 2
        for width, number in kinds
    )
    return model.num_layers * max(elements) * element_size


def gradient_norm(parameters: int, gradient_size: int = BF16) -> Cost:
    """The norm to clip by reads every gradient."""
    return Cost(bytes=parameters * gradient_size)


def gradient_sums(parameters: int, micro_batches: int) -> Cost:
    """Each micro-batch adds bf16 gradients to fp32 sums, which norm and update read instead."""
    return Cost(bytes=parameters * ((BF16 + 2 * FP32) * micro_batches + 2 * (FP32 - BF16)))


def flops_per_token(model: ModelConfig, seq_len: int, *, causal: bool = True) -> int:
    """The FLOPs to train on one token are those of forward three times, nothing recomputed.

    6 x (matmul parameters active per token, tied head counted once) + 6 x L x d x T: causal
    attention needs half of the square; `causal=False` gives the un-halved variant (12 L d T).
    Differential attention applies its scores to values twice as wide: 1.5 times as much.
    """
    d = model.hidden_size
    parameters = model.num_layers * model.matmul_parameters_per_layer(active=True)
    parameters += model.vocab_size * d
    square = attention(seq_len, d, 0, width=d, value_widths=value_widths(model))
    attended = 3 * model.num_layers * square.flops
    return 3 * 2 * parameters + (attended // 2 if causal else attended)


def value_widths(model: ModelConfig) -> int:
    """The size of a head's values is this many times that of its keys."""
    return 2 if model.use_differential_attention else 1


def dense_width(model: ModelConfig) -> int:
    """The MLP that every token goes through, dense or shared experts, has this inner width."""
    return model.expert_intermediate_size * (model.num_shared_experts if model.is_moe else 1)


def routed_width(model: ModelConfig) -> int:
    """A token's routed experts together have this inner width."""
    return model.expert_intermediate_size * model.num_experts_per_token


def norm_kept(width: int, element_size: int, *, fused: bool, recompute: bool) -> int:
    """A norm before a matmul keeps its input, and its result where backward does not recompute it.

    Bytes are of one token here and below. Without the fused kernels input and result are kept in
    fp32 instead of the result.
    """
    if recompute:
        return width * element_size
    return width * (element_size + (element_size if fused else 2 * FP32))


def attention_kept(model: ModelConfig, element_size: int, *, fused: bool, recompute: bool) -> int:
    """Attention keeps qkv, its output and its softmax statistics, and what is differential.

    With qk-norm qkv is that before the norms; what they make of q and k is kept where backward does
    not recompute it. Plain torch always keeps it, and in place of what was normed, where that is
    not recomputed from, two fp32 intermediates.
    """
    d, kv = model.hidden_size, model.num_kv_heads * model.head_size
    kept = ((d + 2 * kv) + d) * element_size + FP32 * model.num_attention_heads
    if model.qk_norm and fused and not recompute:
        kept += (d + kv) * element_size
    if model.qk_norm and not fused:
        kept += (d + 2 * kv) * element_size if recompute else 2 * (d + kv) * FP32
    if model.use_differential_attention:
        # Values of both halves side by side, the two maps' outputs, their difference; plain torch
        # keeps what the norm made of it in fp32 as well.
        kept += (kv + 3 * d) * element_size + (0 if fused else FP32 * d)
    return kept


def swiglu_kept(width: int, element_size: int, *, fused: bool, recompute: bool) -> int:
    """SwiGLU keeps gate and up, and the next matmul its result where it is not recomputed.

    Without the fused kernels gate, up and silu are then kept in fp32.
    """
    if recompute:
        return 2 * width * element_size
    return 3 * width * element_size if fused else width * (3 * FP32 + element_size)


def experts_kept(model: ModelConfig, element_size: int, *, fused: bool, recompute: bool) -> int:
    """Routed experts keep what a dense MLP of their width does; plain torch keeps more, or all."""
    d, width = model.hidden_size, routed_width(model)
    if fused:
        return swiglu_kept(width, element_size, fused=True, recompute=recompute)
    if recompute:
        # The plain experts recompute all. Before them a norm, which keeps the residual in fp32
        # instead, and the router, which keeps an fp32 copy of its input.
        return 3 * FP32 * d
    # Of each expert also the gathered rows and its output, in both dtypes.
    rows = model.num_experts_per_token * d * (FP32 + element_size)
    return 4 * FP32 * width + width * element_size + FP32 * d + rows


def loss_held(model: ModelConfig, tokens: int, element_size: int, *, fused: bool) -> int:
    """The loss holds this many bytes beside the activations."""
    if not fused:
        # In backward: the log-probabilities, their gradient and that of the logits, all in fp32.
        return tokens * model.vocab_size * 3 * FP32
    chunk = min(tokens, loss_chunk(model.vocab_size, tokens, element_size))
    d = model.hidden_size
    # Logits of a chunk, the fp32 gradient of the head, the gradient of the hidden states.
    head = FP32 * model.vocab_size * d
    return chunk * model.vocab_size * element_size + head + tokens * d * element_size


def loss_chunk(vocab_size: int, tokens: int, element_size: int = BF16) -> int:
    """The fused loss holds the logits of this many tokens: `cross_entropy.default_chunk_size`.

    It is said again here, because that module needs torch; a test keeps the two equal.
    """
    longest = int(0.35 * GIB) // (vocab_size * element_size) // 128 * 128
    chunks = max(1, math.ceil(tokens / max(128, longest)))
    return math.ceil(math.ceil(tokens / chunks) / 128) * 128
