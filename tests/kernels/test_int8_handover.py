"""A gradient that the norm after a linear layer quantises is the one that the layer quantises."""

import pytest
import torch

from hamner.kernels import (
    Handover,
    add_rms_norm_attention,
    add_rms_norm_mlp,
    int8_linear,
    quantize_int8,
)
from hamner.kernels.int8_quantize import empty_int8, quantize_int8_reference
from hamner.kernels.rms_norm import launch_rms_norm_backward
from tests.kernels.gradients import DTYPES, assert_same_bits
from tests.kernels.passes import record_passes
from tests.kernels.test_int8_linear import make

D = 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 40), (131, 48), (5, 3, 256), (2, 1024), (0, 32)])
def test_a_norms_backward_quantises_what_it_writes(shape, dtype, device):
    how = {"dtype": dtype, "device": device}
    d_y, d_residual, x = (make(*shape, seed=seed, **how).detach() for seed in range(3))
    if x.numel():
        d_y.view(-1)[3] = torch.inf
    weight, rows = make(shape[-1], seed=3, device=device).detach(), x.numel() // shape[-1]
    rstd = torch.ones(rows, device=device)
    norm = {"x": x, "weight": weight, "rstd": rstd}
    expected = launch_rms_norm_backward(d_y, d_residual, **norm)
    found = empty_int8(x, x.shape, grouped=False)
    d_x, d_weight = launch_rms_norm_backward(d_y, d_residual, **norm, quantised=found)
    assert torch.equal(d_x.nan_to_num(1.0), expected[0].nan_to_num(1.0))
    assert torch.equal(d_weight.nan_to_num(1.0), expected[1].nan_to_num(1.0))
    wanted = quantize_int8(d_x.reshape(-1, shape[-1]))
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.scales.nan_to_num(-1.0), wanted.scales.nan_to_num(-1.0))


def chain(matmul: str, *, hands: bool, readers: int = 1, recompute: bool = True, heads=(2, 1)):
    """A linear layer, an MLP that begins with a norm, and attention that does so: what o is to the
    MLP, and the MLP's down to the next layer's attention."""

    def op(x, o_weight, residual, norm_weight, gate_up_weight, down_weight, qkv_weight, cos, sin):
        of_o, of_down = (Handover(), Handover()) if hands else (None, None)
        out = int8_linear(x, o_weight, matmul, takes_from=of_o)
        mlp, stream = add_rms_norm_mlp(
            out, residual, norm_weight, gate_up_weight, down_weight, recompute=recompute,
            gate_up_matmul=matmul, down_matmul=matmul,
            gate_up_hands_to=of_o, down_takes_from=of_down,
        )  # fmt: skip
        attention, stream = add_rms_norm_attention(
            mlp, stream, norm_weight, qkv_weight, cos, sin, *heads, recompute=recompute,
            matmul=matmul, hands_to=of_down,
        )  # fmt: skip
        if readers > 1:
            attention = attention + out + mlp
        return attention, stream

    return op


def chain_inputs(
    device, inner: int = 256, *, tokens=(2, 9), width: int = D, dtype=torch.float32
) -> dict[str, torch.Tensor]:
    """Half as many heads of keys as of queries, so that qkv is twice as wide as x."""
    how = {"device": device, "dtype": dtype}
    half_head = 32 if width > D else D // 4
    tables = (make(tokens[1], half_head, seed=seed, device=device).detach() for seed in (8, 9))
    return {
        "x": make(*tokens, width, **how),
        "o_weight": make(width, width, seed=1, **how),
        "residual": make(*tokens, width, seed=2, **how),
        "norm_weight": make(width, seed=3, device=device),
        "gate_up_weight": make(2 * inner, width, seed=4, **how),
        "down_weight": make(width, inner, seed=5, **how),
        "qkv_weight": make(2 * width, width, seed=6, **how),
        **dict(zip(("cos", "sin"), tables, strict=True)),
    }


def quantised(op, inputs, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of what takes a pass of its own in backward."""
    output, stream = op(**inputs)
    loss = (output * make(*output.shape, seed=7, device=output.device)).sum() + stream.sum()
    with monkeypatch.context() as patch:
        shapes = record_passes(patch)
        loss.backward()
    return shapes


@pytest.mark.parametrize(
    ("matmul", "inner", "recompute"),
    [
        ("int8", 256, True),
        ("int8-all", 256, False),
        ("int8-all", 40, True),
        ("data_gradient", 40, False),
    ],
)
def test_bits(matmul, inner, recompute, device):
    """Also where SwiGLU's backward cannot quantise."""
    ops = (chain(matmul, hands=hands, recompute=recompute) for hands in (True, False))
    assert_same_bits(*ops, chain_inputs(device, inner))


def test_neither_gradient_takes_a_pass_of_its_own(device, monkeypatch):
    """That of qkv does, which attention writes; the rest are weights."""
    found = [
        quantised(chain("int8", hands=hands), chain_inputs(device), monkeypatch)
        for hands in (True, False)
    ]
    weights = [(2 * D, D), (D, 256), (2 * 256, D), (D, D)]
    assert sorted(found[0]) == sorted([(18, 2 * D), *weights])
    assert sorted(found[1]) == sorted([*found[0], (18, D), (18, D)])


def test_a_gradient_of_two_readers_is_quantised_whole(device, monkeypatch):
    ops = [chain("int8", hands=hands, readers=2) for hands in (True, False)]
    assert_same_bits(*ops, chain_inputs(device))
    assert quantised(ops[0], chain_inputs(device), monkeypatch).count((18, D)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("width", [256, 768, 1024])
def test_bits_at_a_training_shape(width):
    heads = width // 64
    ops = (chain("int8-all", hands=hands, heads=(heads, heads // 2)) for hands in (True, False))
    how = {"tokens": (24, 1024), "width": width, "dtype": torch.bfloat16}
    assert_same_bits(*ops, chain_inputs("cuda", 1024, **how))


class TestHandover:
    def test_what_is_left_is_taken_once(self):
        gradient = torch.ones(3, 4)
        rows, handover = quantize_int8_reference(gradient), Handover()
        assert handover.take(gradient) is None
        handover.leave(gradient, rows)
        assert handover.take(gradient.view(3, 4)) is rows
        assert handover.take(gradient) is None

    @pytest.mark.parametrize(
        "other",
        [
            lambda gradient: gradient.clone(),
            lambda gradient: gradient.add_(1.0),
            lambda gradient: gradient[:2],
            lambda gradient: gradient.view(4, 3),
        ],
        ids=["another", "changed", "a part", "another shape"],
    )
    def test_another_gradient_takes_nothing(self, other):
        gradient, handover = torch.ones(3, 4), Handover()
        handover.leave(gradient, quantize_int8_reference(gradient))
        assert handover.take(other(gradient)) is None
