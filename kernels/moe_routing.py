"""Mixture-of-experts routing makes router logits assignments sorted by expert, on the device.

For each of N tokens a router gives E logits; the token goes to its K best experts.

    route     softmax, top-k, weights; per block of tokens: counts, and sums for the losses
    scan      per expert: prefix sum over the blocks' counts, total of the blocks' sums
    scatter   stable counting sort of the (token, slot) pairs by expert; offsets, losses, load

The assignments are M = N * K pairs of a token and one of its K slots; `Routing` has their arrays. A
pair's row is its expert's offset, plus the assignments to that expert in earlier blocks, plus
those earlier in its own block. Partial sums and a second pass, no atomics, nothing read back by the
host: two runs give the same bits.

Bytes that must move: forward reads N * E logits and writes weights, experts and order, 12 bytes a
pair; the sort reads experts once more, 4 bytes a pair. Backward reads the logits, 8 bytes a pair,
and writes N * E. A few tens of FLOPs a logit. For fp32, N 24,576, E 4, K 2 that is 1.2 MB each way,
under 2 microseconds at 850 GB/s: the launches (three, then one) are the cost.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hamner.kernels.checks import check_dtype, check_same_device, check_shape

MAX_EXPERTS = 64
MAX_EXPERTS_PER_TOKEN = 8


class Routing(NamedTuple):
    """A routing says where each token goes, and what the router is to be judged by.

    N tokens, K experts per token, E experts, M = N * K assignments. `weights` and the two losses
    carry gradients to the router logits; the rest does not.
    """

    weights: Tensor  # (N, K) fp32: weight of each expert's output
    experts: Tensor  # (N, K) int32: best first, distinct within a token
    order: Tensor  # (M,) int32: pair token * K + slot at each row, sorted by expert, stable
    offsets: Tensor  # (E + 1,) int32: expert e owns rows offsets[e] to offsets[e + 1] of order
    load_balancing_loss: Tensor  # () fp32: K when balanced
    z_loss: Tensor  # () fp32: mean of logsumexp(logits)^2
    entropy: Tensor  # () fp32: mean entropy of the router's softmax, in nats
    load: Tensor  # (E,) fp32: fraction of the assignments each expert got; sums to 1


# Logits a program holds at once, tokens it takes at most, and its warps; one row for every card.
# Chosen by reasoning, not yet measured: few tokens a program, so that a batch of 16K fills every
# multiprocessor, and few values a thread, because each top-k step keeps several tiles live.
TILE, MAX_TOKENS, NUM_WARPS = 2048, 64, 4
SCAN_BLOCK, SCAN_WARPS = 1024, 4


def block_shape(num_experts: int) -> dict[str, int]:
    """A program's tile has this many tokens and (padded) experts."""
    block_e = triton.next_power_of_2(num_experts)
    return {"BLOCK_N": min(MAX_TOKENS, TILE // block_e), "BLOCK_E": block_e}


@triton.jit
def _tile(num_tokens, NUM_EXPERTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """A program has a block of tokens and all experts; the masks are of those that there are."""
    block = tl.program_id(0).to(tl.int64)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_e = tl.arange(0, BLOCK_E)
    return block, offs_n, offs_e, offs_n < num_tokens, offs_e < NUM_EXPERTS


@triton.jit
def _load_logits(
    logits_ptr,  # (N, E)
    offs_n,  # (BLOCK_N,) int64
    offs_e,  # (BLOCK_E,)
    mask_n,
    mask_e,
    NUM_EXPERTS: tl.constexpr,
):
    """The logits come as fp32 (-inf beyond expert E), with log-softmax and each row's logsumexp."""
    mask = mask_n[:, None] & mask_e[None, :]
    ptrs = logits_ptr + offs_n[:, None] * NUM_EXPERTS + offs_e[None, :]
    logits = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    logits = tl.where(mask_e[None, :], logits, float("-inf"))
    row_max = tl.max(logits, axis=1)
    shifted = logits - row_max[:, None]
    log_sum = tl.log(tl.sum(tl.exp(shifted), axis=1))
    # Not logits - lse: large logits would leave few digits of a small difference.
    return logits, shifted - log_sum[:, None], row_max + log_sum


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits_ptr,  # (N, E)
    bias_ptr,  # (E,) fp32, or None
    weights_ptr,  # (N, K) fp32
    experts_ptr,  # (N, K) int32
    counts_ptr,  # (E, num_blocks) int32
    partials_ptr,  # (E + 2, num_blocks) fp32: sums of probabilities, of lse^2, of entropy
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, offs_n, offs_e, mask_n, mask_e = _tile(num_tokens, NUM_EXPERTS, BLOCK_N, BLOCK_E)
    num_blocks = tl.num_programs(0)
    offs_k = tl.arange(0, BLOCK_K)

    logits, log_probs, lse = _load_logits(logits_ptr, offs_n, offs_e, mask_n, mask_e, NUM_EXPERTS)
    probs = tl.exp(log_probs)

    if bias_ptr is not None:
        scores = probs + tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0)[None, :]
    else:
        # The softmax keeps the order, and ranking logits leaves no ties made by its rounding.
        scores = logits
    # Candidates rank above -inf, which marks the ones taken and the padding, even when a logit is
    # NaN or -inf: the experts chosen are always distinct and in range.
    scores = tl.where(scores >= -3.0e38, scores, -3.0e38)
    scores = tl.where(mask_e[None, :], scores, float("-inf"))

    chosen_log_probs = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    chosen_experts = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    chosen = tl.zeros((BLOCK_N, BLOCK_E), tl.int32)
    for k in tl.static_range(TOP_K):
        expert = tl.argmax(scores, axis=1, tie_break_left=True).to(tl.int32)
        is_expert = offs_e[None, :] == expert[:, None]
        log_prob = tl.sum(tl.where(is_expert, log_probs, 0.0), axis=1)
        chosen_log_probs = tl.where(offs_k[None, :] == k, log_prob[:, None], chosen_log_probs)
        chosen_experts = tl.where(offs_k[None, :] == k, expert[:, None], chosen_experts)
        chosen = tl.where(is_expert, 1, chosen)
        scores = tl.where(is_expert, float("-inf"), scores)

    if RENORMALIZE:
        # A softmax over the chosen is p_k / sum(p) without its underflow.
        weights = tl.exp(chosen_log_probs - tl.max(chosen_log_probs, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
    else:
        weights = tl.exp(chosen_log_probs)

    offs_pair = offs_n[:, None] * TOP_K + offs_k[None, :]
    mask_pair = mask_n[:, None] & (offs_k < TOP_K)[None, :]
    tl.store(weights_ptr + offs_pair, weights, mask=mask_pair)
    tl.store(experts_ptr + offs_pair, chosen_experts, mask=mask_pair)

    chosen = tl.where(mask_n[:, None], chosen, 0)
    offs_partial = offs_e.to(tl.int64) * num_blocks + block
    tl.store(counts_ptr + offs_partial, tl.sum(chosen, axis=0), mask=mask_e)
    prob_sums = tl.sum(tl.where(mask_n[:, None], probs, 0.0), axis=0)
    tl.store(partials_ptr + offs_partial, prob_sums, mask=mask_e)

    # p log p is 0 where p is; 0 * -inf is not.
    plogp = probs * tl.where(probs == 0.0, 0.0, log_probs)
    entropy = tl.sum(tl.where(mask_n, -tl.sum(plogp, axis=1), 0.0), axis=0)
    z = tl.sum(tl.where(mask_n, lse * lse, 0.0), axis=0)
    z_row = num_blocks.to(tl.int64) * NUM_EXPERTS + block
    tl.store(partials_ptr + z_row, z)
    tl.store(partials_ptr + z_row + num_blocks, entropy)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(
    counts_ptr,  # (E, num_blocks) int32, becomes the exclusive prefix sum of each row
    partials_ptr,  # (E + 2, num_blocks) fp32
    totals_ptr,  # (E,) int32
    sums_ptr,  # (E + 2,) fp32
    num_blocks,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)

    partial = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_blocks, BLOCK):
        mask = start + offs < num_blocks
        partial += tl.load(partials_ptr + row * num_blocks + start + offs, mask=mask, other=0.0)
    tl.store(sums_ptr + row, tl.sum(partial, axis=0))

    if row < NUM_EXPERTS:
        total = tl.full((), 0, tl.int32)
        for start in range(0, num_blocks, BLOCK):
            mask = start + offs < num_blocks
            ptrs = counts_ptr + row * num_blocks + start + offs
            counts = tl.load(ptrs, mask=mask, other=0)
            tl.store(ptrs, total + tl.cumsum(counts, axis=0) - counts, mask=mask)
            total += tl.sum(counts, axis=0)
        tl.store(totals_ptr + row, total)


@triton.jit(do_not_specialize=["num_tokens"])
def scatter_kernel(
    experts_ptr,  # (N, K) int32
    prefix_ptr,  # (E, num_blocks) int32: assignments to the expert in earlier blocks
    totals_ptr,  # (E,) int32
    sums_ptr,  # (E + 2,) fp32: of probabilities, of lse^2, of entropy
    order_ptr,  # (N * K,) int32
    offsets_ptr,  # (E + 1,) int32
    load_balancing_loss_ptr,  # () fp32
    z_loss_ptr,  # () fp32
    entropy_ptr,  # () fp32
    load_ptr,  # (E,) fp32
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block, offs_n, offs_e, mask_n, mask_e = _tile(num_tokens, NUM_EXPERTS, BLOCK_N, BLOCK_E)
    num_blocks = tl.num_programs(0)

    totals = tl.load(totals_ptr + offs_e, mask=mask_e, other=0)
    offsets = tl.cumsum(totals, axis=0) - totals
    offs_prefix = offs_e.to(tl.int64) * num_blocks + block
    first_row = offsets + tl.load(prefix_ptr + offs_prefix, mask=mask_e, other=0)

    chosen = tl.zeros((BLOCK_N, BLOCK_E), tl.int32)
    for k in tl.static_range(TOP_K):
        expert = tl.load(experts_ptr + offs_n * TOP_K + k, mask=mask_n, other=BLOCK_E)
        chosen = tl.where(offs_e[None, :] == expert[:, None], 1, chosen)
    # A token's experts are distinct, so a pair's rank is the earlier tokens with its expert.
    row_of = first_row[None, :] + tl.cumsum(chosen, axis=0) - chosen
    for k in tl.static_range(TOP_K):
        pair = offs_n * TOP_K + k
        expert = tl.load(experts_ptr + pair, mask=mask_n, other=BLOCK_E)
        row = tl.sum(tl.where(offs_e[None, :] == expert[:, None], row_of, 0), axis=1)
        tl.store(order_ptr + row, pair.to(tl.int32), mask=mask_n)

    if block == 0:
        tl.store(offsets_ptr + offs_e, offsets, mask=mask_e)
        tl.store(offsets_ptr + NUM_EXPERTS, num_tokens * TOP_K)
        n = num_tokens.to(tl.float32)
        fraction = totals.to(tl.float32) / n
        tl.store(load_ptr + offs_e, fraction / TOP_K, mask=mask_e)
        mean_probs = tl.load(sums_ptr + offs_e, mask=mask_e, other=0.0) / n
        balance = NUM_EXPERTS * tl.sum(fraction * mean_probs, axis=0)
        tl.store(load_balancing_loss_ptr, balance)
        tl.store(z_loss_ptr, tl.load(sums_ptr + NUM_EXPERTS) / n)
        tl.store(entropy_ptr, tl.load(sums_ptr + NUM_EXPERTS + 1) / n)


@triton.jit(do_not_specialize=["num_tokens"])
def route_backward_kernel(
    logits_ptr,  # (N, E)
    experts_ptr,  # (N, K) int32
    offsets_ptr,  # (E + 1,) int32
    d_weights_ptr,  # (N, K) fp32
    d_load_balancing_loss_ptr,  # () fp32
    d_z_loss_ptr,  # () fp32
    d_logits_ptr,  # (N, E)
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    _, offs_n, offs_e, mask_n, mask_e = _tile(num_tokens, NUM_EXPERTS, BLOCK_N, BLOCK_E)
    n = num_tokens.to(tl.float32)

    _, log_probs, lse = _load_logits(logits_ptr, offs_n, offs_e, mask_n, mask_e, NUM_EXPERTS)
    probs = tl.exp(log_probs)

    chosen = tl.zeros((BLOCK_N, BLOCK_E), tl.int32)
    d_chosen = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = offs_n * TOP_K + k
        expert = tl.load(experts_ptr + pair, mask=mask_n, other=0)
        d_weight = tl.load(d_weights_ptr + pair, mask=mask_n, other=0.0)
        is_expert = offs_e[None, :] == expert[:, None]
        chosen = tl.where(is_expert, 1, chosen)
        d_chosen = tl.where(is_expert, d_weight[:, None], d_chosen)

    # Of E * sum_e f_e P_e, where P_e is the mean of probs and f_e, a count, has no gradient.
    counts = tl.load(offsets_ptr + 1 + offs_e, mask=mask_e, other=0)
    counts -= tl.load(offsets_ptr + offs_e, mask=mask_e, other=0)
    scale = tl.load(d_load_balancing_loss_ptr) * (NUM_EXPERTS / (n * n))
    d_probs = (counts.to(tl.float32) * scale)[None, :]
    if not RENORMALIZE:
        d_probs = d_probs + d_chosen
    d_lse = tl.load(d_z_loss_ptr) * 2.0 * lse / n
    d_logits = probs * (d_probs - tl.sum(probs * d_probs, axis=1)[:, None] + d_lse[:, None])
    if RENORMALIZE:
        chosen_log_probs = tl.where(chosen == 1, log_probs, float("-inf"))
        weights = tl.exp(chosen_log_probs - tl.max(chosen_log_probs, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
        d_logits += weights * (d_chosen - tl.sum(weights * d_chosen, axis=1)[:, None])

    ptrs = d_logits_ptr + offs_n[:, None] * NUM_EXPERTS + offs_e[None, :]
    tl.store(
        ptrs, d_logits.to(d_logits_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_e[None, :]
    )


def _empty_routing(router_logits: Tensor, num_experts_per_token: int) -> Routing:
    num_tokens, num_experts = router_logits.shape
    floats = functools.partial(router_logits.new_empty, dtype=torch.float32)
    ints = functools.partial(router_logits.new_empty, dtype=torch.int32)
    return Routing(
        weights=floats((num_tokens, num_experts_per_token)),
        experts=ints((num_tokens, num_experts_per_token)),
        order=ints(num_tokens * num_experts_per_token),
        offsets=ints(num_experts + 1),
        load_balancing_loss=floats(()),
        z_loss=floats(()),
        entropy=floats(()),
        load=floats(num_experts),
    )


@torch.library.custom_op("hamner::moe_route", mutates_args=())
def _moe_route(
    router_logits: Tensor, bias: Tensor | None, num_experts_per_token: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = router_logits.shape
    routing = _empty_routing(router_logits, num_experts_per_token)
    if num_tokens == 0:
        return tuple(tensor.zero_() for tensor in routing)
    blocks = block_shape(num_experts)
    num_blocks = triton.cdiv(num_tokens, blocks["BLOCK_N"])
    counts = routing.experts.new_empty((num_experts, num_blocks))
    totals = routing.experts.new_empty(num_experts)
    partials = routing.weights.new_empty((num_experts + 2, num_blocks))
    sums = routing.weights.new_empty(num_experts + 2)
    shape = {"NUM_EXPERTS": num_experts, "TOP_K": num_experts_per_token, **blocks}
    with torch.cuda.device_of(router_logits):
        route_kernel[(num_blocks,)](
            router_logits, bias, routing.weights, routing.experts, counts, partials, num_tokens,
            RENORMALIZE=renormalize, BLOCK_K=triton.next_power_of_2(num_experts_per_token),
            **shape, num_warps=NUM_WARPS,
        )  # fmt: skip
        scan_kernel[(num_experts + 2,)](
            counts, partials, totals, sums, num_blocks,
            NUM_EXPERTS=num_experts, BLOCK=SCAN_BLOCK, num_warps=SCAN_WARPS,
        )  # fmt: skip
        scatter_kernel[(num_blocks,)](
            routing.experts, counts, totals, sums, *routing[2:], num_tokens,
            **shape, num_warps=NUM_WARPS,
        )  # fmt: skip
    return tuple(routing)


@_moe_route.register_fake
def _(router_logits, bias, num_experts_per_token, renormalize):
    return tuple(_empty_routing(router_logits, num_experts_per_token))


@torch.library.custom_op("hamner::moe_route_backward", mutates_args=())
def _moe_route_backward(
    router_logits: Tensor,
    experts: Tensor,
    offsets: Tensor,
    d_weights: Tensor,
    d_load_balancing_loss: Tensor,
    d_z_loss: Tensor,
    renormalize: bool,
) -> Tensor:
    num_tokens, num_experts = router_logits.shape
    d_logits = torch.empty_like(router_logits)
    blocks = block_shape(num_experts)
    with torch.cuda.device_of(router_logits):
        route_backward_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_N"]),)](
            router_logits, experts, offsets, d_weights.contiguous(),
            d_load_balancing_loss, d_z_loss, d_logits, num_tokens, NUM_EXPERTS=num_experts,
            TOP_K=experts.shape[1], RENORMALIZE=renormalize, **blocks, num_warps=NUM_WARPS,
        )  # fmt: skip
    return d_logits


@_moe_route_backward.register_fake
def _(router_logits, experts, offsets, d_weights, d_load_balancing_loss, d_z_loss, renormalize):
    return torch.empty_like(router_logits)


def _setup_context(ctx, inputs, output):
    router_logits, _, _, ctx.renormalize = inputs
    routing = Routing(*output)
    ctx.save_for_backward(router_logits, routing.experts, routing.offsets)
    ctx.mark_non_differentiable(
        routing.experts, routing.order, routing.offsets, routing.entropy, routing.load
    )
    ctx.set_materialize_grads(False)


def _backward(ctx, *d_routing):
    # Read once: where a block is recomputed, a second reading is an error.
    saved = ctx.saved_tensors
    _, experts, _ = saved
    d_routing = Routing(*d_routing)
    gradients = (
        experts.new_zeros(shape, dtype=torch.float32) if gradient is None else gradient
        for gradient, shape in (
            (d_routing.weights, experts.shape),
            (d_routing.load_balancing_loss, ()),
            (d_routing.z_loss, ()),
        )
    )
    d_logits = _moe_route_backward(*saved, *gradients, ctx.renormalize)
    return d_logits, None, None, None


_moe_route.register_autograd(_backward, setup_context=_setup_context)


def _check(router_logits: Tensor, num_experts_per_token: int, bias: Tensor | None) -> None:
    check_shape("router_logits", router_logits.shape, ("N", "E"))
    num_tokens, num_experts = router_logits.shape
    if not 2 <= num_experts <= MAX_EXPERTS:
        raise ValueError(
            f"router_logits must have 2 to {MAX_EXPERTS} experts in its last dimension, "
            f"got {num_experts}"
        )
    if not 1 <= num_experts_per_token <= min(num_experts, MAX_EXPERTS_PER_TOKEN):
        raise ValueError(
            f"num_experts_per_token must be 1 to {min(num_experts, MAX_EXPERTS_PER_TOKEN)} "
            f"for {num_experts} experts, got {num_experts_per_token}"
        )
    if num_tokens * num_experts_per_token >= 2**31:
        raise ValueError(
            f"router_logits has {num_tokens} tokens: tokens x experts per token must be below 2^31"
        )
    if bias is not None:
        check_shape("bias", bias.shape, (num_experts,))
        check_dtype("bias", bias, (torch.float32,))
        check_same_device("bias", bias, "router_logits", router_logits)


def moe_route(
    router_logits: Tensor,
    num_experts_per_token: int,
    *,
    renormalize: bool = True,
    bias: Tensor | None = None,
) -> Routing:
    """The op sends each token to its best experts, and sorts the assignments by expert.

    The load-balancing loss is `E * sum_e f_e P_e` for these tokens (Switch Transformer, Fedus et
    al. 2021, eq. 4-6, with Mixtral's top-k counts): `f_e` the tokens that chose expert e over N,
    `P_e` the mean of the whole softmax. `f_e` is a count and has no gradient. The z-loss is the
    mean of `logsumexp(logits)^2` (ST-MoE, Zoph et al. 2022, eq. 5). With no tokens both are 0.

    Of equal logits the lower expert index wins. A NaN logit ranks last: the losses and gradients it
    makes NaN show a bad batch, and no index is ever out of range.

    Args:
        router_logits: (N, E) fp32, bf16 or fp16; E 2 to 64. The softmax is fp32.
        num_experts_per_token: K, 1 to 8 and at most E.
        renormalize: divide a token's weights by their sum, so that they add up to 1.
        bias: (E,) fp32, added to the probabilities to choose the experts, never to weigh them
            (auxiliary-loss-free balancing, Wang et al. 2024, as in DeepSeek-V3). Has no gradient.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape, size or device that is not supported.
    """
    _check(router_logits, num_experts_per_token, bias)
    check_dtype("router_logits", router_logits)
    if bias is not None:
        bias = bias.detach().contiguous()
    return Routing(
        *_moe_route(router_logits.contiguous(), bias, num_experts_per_token, renormalize)
    )


def moe_route_reference(
    router_logits: Tensor,
    num_experts_per_token: int,
    *,
    renormalize: bool = True,
    bias: Tensor | None = None,
) -> Routing:
    """It is `moe_route` in plain torch, on any device; also fp64, which it computes in."""
    _check(router_logits, num_experts_per_token, bias)
    num_tokens, num_experts = router_logits.shape
    logits = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    log_probs = logits.log_softmax(dim=-1)
    probs = log_probs.exp()

    scores = logits.detach() if bias is None else probs.detach() + bias
    # A stable sort breaks ties by the lower expert index; topk promises nothing.
    ranked = scores.nan_to_num(nan=float("-inf")).sort(dim=-1, descending=True, stable=True)
    experts = ranked.indices[:, :num_experts_per_token]
    chosen = log_probs.gather(1, experts)
    weights = chosen.softmax(dim=-1) if renormalize else chosen.exp()

    order = experts.flatten().argsort(stable=True)
    counts = (experts.flatten()[:, None] == torch.arange(num_experts, device=logits.device)).sum(0)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    n = max(num_tokens, 1)
    fraction = counts.to(logits.dtype) / n
    return Routing(
        weights=weights,
        experts=experts.int(),
        order=order.int(),
        offsets=offsets.int(),
        load_balancing_loss=num_experts * (fraction * (probs.sum(0) / n)).sum(),
        z_loss=logits.logsumexp(-1).square().sum() / n,
        entropy=torch.special.entr(probs.detach()).sum() / n,
        load=fraction / num_experts_per_token,
    )
