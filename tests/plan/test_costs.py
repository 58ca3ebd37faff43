"""Costs of ops: against kernels/README.md's table, and what a model's add up to."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hamner.config.options import OPTIONS
from hamner.kernels.muon import STEPS
from hamner.plan import costs

README = Path(__file__).parents[2] / "kernels" / "README.md"
# Primes, so that no two different products are equal.
SYMBOLS = {"B": 2, "T": 97, "D": 61, "H": 12, "KV": 3, "hd": 17, "I": 71, "V": 101, "E": 5, "K": 3}
SYMBOLS |= {"e": 2, "N": SYMBOLS["B"] * SYMBOLS["T"], "U": 43}


def value(product: str) -> int:
    """Of a product as the table writes it: `2 N (H + KV) hd e`, `T^2`."""
    factors = product.replace("(H + KV)", "(H+KV)").replace("^", "**").split()
    return eval("*".join(factors), {"__builtins__": {}}, dict(SYMBOLS))


def products(text: str) -> list[str]:
    """The products in a cell: runs of numbers and symbols."""
    factor = rf"(?:\d+|(?:{'|'.join(SYMBOLS)})(?:\^[23])?|\(H \+ KV\))(?!\w)"
    return re.findall(rf"(?<!\w){factor}(?: {factor})*", text)


def table() -> dict[str, str]:
    """op: what the last column says of it."""
    rows = re.findall(r"^\| (`.*?) \|.*\| (.*?) \|$", README.read_text(), re.MULTILINE)
    return {re.search(r"\w+", op).group(): cost for op, cost in rows}


def expected() -> dict[str, list[tuple[str, float]]]:
    """op: the products of its row in order, each with what `hamner.plan.costs` says."""
    batch, t, d, heads, kv, hd, inner, vocabulary, experts, per_token, e, n, distinct = (
        SYMBOLS[name]
        for name in ("B", "T", "D", "H", "KV", "hd", "I", "V", "E", "K", "e", "N", "U")
    )
    norm, norm_back = costs.rms_norm(n * d), costs.rms_norm(n * d, backward=True)
    added = costs.rms_norm(n * d, adds_residual=True)
    added_back = costs.rms_norm(n * d, adds_residual=True, backward=True)
    recomputed = costs.rms_norm(n * d, adds_residual=True, backward=True, recompute=True)
    swiglu_back = costs.swiglu(n * inner, backward=True)
    swiglu_recomputed = costs.swiglu(n * inner, backward=True, recompute=True)
    loss = costs.linear_cross_entropy(n, d, vocabulary)
    router = costs.router_linear(n, d, experts)
    router_back = costs.router_linear(n, d, experts, backward=True)
    pairs = n * t / 2
    attention = costs.attention(pairs, n * heads * hd, n * kv * hd, width=heads * hd)
    attention_back = costs.attention(
        pairs, n * heads * hd, n * kv * hd, width=heads * hd, backward=True
    )
    shape = {"width": d, "inner": inner, "experts": experts}
    product, square = costs.symmetric_product(batch, d, inner), batch * d * d * e
    iteration = costs.orthogonalize(d, inner).flops
    on_matrix = 2 * costs.symmetric_product(1, d, inner).flops
    on_matrix += 2 * costs.matmul(d, d, inner).flops
    mlp = costs.moe_mlp(n * d, n * per_token, **shape)
    mlp_back = costs.moe_mlp(n * d, n * per_token, backward=True, **shape)
    return {
        "rms_norm": [("2 N D e", norm.bytes), ("3 N D e", norm_back.bytes)],
        "add_rms_norm": [("4 N D e", added.bytes), ("4 N D e", added_back.bytes)],
        "swiglu": [("3 N I e", costs.swiglu(n * inner).bytes), ("5 N I e", swiglu_back.bytes)],
        "rope": [("2 N (H + KV) hd e", costs.rope(n * (heads + kv) * hd).bytes)],
        "qk_norm_rope": [
            ("2 N (H + KV) hd e", costs.qk_norm_rope(n * (heads + kv) * hd).bytes),
            ("3 N (H + KV) hd e", costs.qk_norm_rope(n * (heads + kv) * hd, backward=True).bytes),
        ],
        "rms_norm_linear": [("4 N D e", added.bytes), ("5 N D e", recomputed.bytes)],
        "swiglu_linear": [
            ("3 N I e", costs.swiglu(n * inner).bytes),
            ("6 N I e", swiglu_recomputed.bytes),
        ],
        "tied_embedding": [
            ("N D e", costs.tied_embedding_backward(n, 0, d).bytes),
            ("2 U D e", costs.tied_embedding_backward(0, distinct, d).bytes),
            ("N", n),
        ],
        "linear_cross_entropy": [("6 N V D", loss.flops), ("4 N V", loss.bytes)],
        "adamw_": [
            ("28", costs.adamw(1, split_master=False).bytes),
            ("26", costs.adamw(1, split_master=True).bytes),
        ],
        "muon_momentum_": [("12", costs.muon_momentum(1).bytes)],
        "muon_apply_": [
            ("12", costs.muon_apply(1, split_master=False).bytes),
            ("10", costs.muon_apply(1, split_master=True).bytes),
        ],
        "symmetric_product": [
            ("B D^2 I", product.flops),
            ("B D I e", product.bytes - square),
            ("B D^2 e", square),
        ],
        "orthogonalize_": [("7 D^3", iteration - on_matrix), ("6 D^2 I", on_matrix)],
        "flash_attention": [
            ("2 B H T^2 hd", attention.flops),
            ("5 B H T^2 hd", attention_back.flops),
            ("2 N (H + KV) hd e", attention.bytes),
            ("4 N (H + KV) hd e", attention_back.bytes),
        ],
        "router_linear": [
            ("N D e", router.bytes - 4 * n * experts),
            ("2 N D e", router_back.bytes - 4 * n * experts),
            ("4 N E", router.bytes - n * d * e),
            ("2 N D E", router.flops),
            ("4 N D E", router_back.flops),
        ],
        "quantize_int8": [
            ("N D e", costs.quantize_int8(n * d).bytes - n * d),
            ("N D", costs.quantize_int8(n * d, element_size=0).bytes),
        ],
        "int8_matmul": [("2 N D I", costs.int8_matmul(n, d, inner).flops)],
        "moe_mlp": [
            ("6 N K D I", mlp.flops),
            ("12 N K D I", mlp_back.flops),
            ("2 N D e", 2 * mlp.bytes - mlp_back.bytes),
            ("3 E D I e", mlp_back.bytes - mlp.bytes),
        ],
    }


@pytest.mark.parametrize("op", expected())
def test_table_of_kernels(op):
    """A row has the products that are listed here, no others, and each is worth what it costs."""
    terms = expected()[op]
    assert products(table()[op]) == [term for term, _ in terms]
    for term, cost in terms:
        assert value(term) == cost, term


def test_every_row_with_a_product_is_checked():
    rows = {op for op, cost in table().items() if products(cost)}
    assert rows == set(expected())


def test_muons_iteration_on_option_a():
    """Two steps on q and o, k and v, and three matrices of the MLP: 2.5 TFLOP, half of a whole
    product's where the result is symmetric."""
    model = OPTIONS["a"].model
    assert [len(STEPS), sum(len(step.quadratics) for step in STEPS)] == [
        costs.MUON_STEPS,
        costs.MUON_QUADRATICS,
    ]
    matrices = costs.hidden_matrices(model)
    assert matrices == {(1024, 1024): 2, (256, 1024): 2, (2816, 1024): 2, (1024, 2816): 1}
    flops = 24 * sum(costs.orthogonalize(*shape).flops * n for shape, n in matrices.items())
    by_hand = 2 * (6 + 7) * 1024**3
    by_hand += 2 * (6 * 256**2 * 1024 + 7 * 256**3)
    by_hand += 3 * (6 * 1024**2 * 2816 + 7 * 1024**3)
    assert flops == 24 * by_hand == pytest.approx(2.51e12, rel=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
def test_muon_has_all_matrices_but_embedding_and_router(name):
    model = OPTIONS[name].model
    router = model.hidden_size * model.num_experts
    matrices = model.num_layers * (model.matmul_parameters_per_layer(active=False) - router)
    assert costs.hidden_parameters(model) == matrices


def test_flops_per_token_of_option_a():
    config = OPTIONS["a"].model
    matmul = 24 * (1024 * 1536 + 1024 * 1024 + 1024 * 5632 + 2816 * 1024) + 49_152 * 1024
    assert costs.flops_per_token(config, 1024) == 6 * matmul + 6 * 24 * 1024 * 1024
    whole_square = costs.flops_per_token(config, 1024, causal=False)
    assert whole_square == 6 * matmul + 12 * 24 * 1024 * 1024
    differential = replace(config, use_differential_attention=True)
    assert costs.flops_per_token(differential, 1024) == 6 * matmul + 9 * 24 * 1024 * 1024
    # Of a mixture those that a token goes through: all but the norms' of the 210,856,704.
    mixture = 6 * (210_856_704 - 41 * 768) + 6 * 20 * 768 * 1024
    assert costs.flops_per_token(OPTIONS["c"].model, 1024) == mixture


def test_a_models_matmuls_cost_its_parameters():
    """Forward and backward of the ops one by one: 6 FLOPs a token and active parameter."""
    model, tokens = OPTIONS["c-shared"].model, 1024
    d, inner = model.hidden_size, model.expert_intermediate_size
    rows = tokens * model.num_experts_per_token
    matmuls = (
        costs.matmul(tokens, d, model.qkv_size),
        costs.matmul(tokens, d, d),
        costs.matmul(tokens, d, 2 * costs.dense_width(model)),
        costs.matmul(tokens, costs.dense_width(model), d),
        costs.matmul(rows, d, 2 * inner, experts=model.num_experts),
        costs.matmul(rows, inner, d, experts=model.num_experts),
        costs.router_linear(tokens, d, model.num_experts),
    )
    flops = sum(cost.flops for cost in matmuls)
    assert flops == 2 * tokens * model.matmul_parameters_per_layer(active=True)
    shape = {"width": d, "inner": inner, "experts": model.num_experts}
    mlp = costs.moe_mlp(tokens * d, rows, **shape)
    assert mlp.flops == matmuls[4].flops + matmuls[5].flops
