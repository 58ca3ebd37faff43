import pytest
import torch
from torch import zeros

from hamner.kernels import qk_norm
from hamner.kernels.fused_linear import add_rms_norm_qkv_rope, add_rms_norm_qkv_rope_reference
from hamner.kernels.norm_attention import add_rms_norm_attention, add_rms_norm_attention_reference
from hamner.kernels.qk_norm import qk_norm_rope, qk_norm_rope_reference
from tests.kernels.accuracy import assert_as_accurate_as_torch
from tests.kernels.gradients import (
    DTYPES,
    assert_derivative,
    assert_matches_reference,
    assert_replays_as_a_cuda_graph,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)
from tests.kernels.test_flash_attention import documents
from tests.kernels.test_fused_linear import bytes_kept, make, norm_inputs
from tests.kernels.test_rope import make_tables

HEADS = (3, 2)
LENGTHS = [[4, 7], [2, 9]]
"""of the documents in each of two rows"""


def positions_of(lengths, device):
    rows = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    return torch.stack(rows).int().to(device)


def make_inputs(
    dtype, device, *, heads=HEADS, head_size=16, tokens=(2, 11), weights=torch.float32, lengths=None
):
    """Arguments of the op by name, for `on_heads`."""
    width = (heads[0] + 2 * heads[1]) * head_size
    cos, sin = make_tables(tokens[1], head_size, device)
    return {
        "qkv": make((*tokens, width), dtype, device, seed=1),
        "q_weight": make((head_size,), weights, device, seed=2),
        "k_weight": make((head_size,), weights, device, seed=3),
        # Scaled, as some ways of stretching RoPE have it: then back is not the inverse.
        "cos": 1.1 * cos,
        "sin": 1.1 * sin,
        "positions": None if lengths is None else positions_of(lengths, device),
    }


def on_heads(function, heads=HEADS, **options):
    def op(qkv, q_weight, k_weight, cos, sin, positions):
        return function(qkv, q_weight, k_weight, cos, sin, *heads, positions, **options)

    return op


def assert_accurate(inputs, heads=HEADS, **options):
    assert_matches_reference(
        on_heads(qk_norm_rope, heads, **options),
        on_heads(qk_norm_rope_reference, heads, **options),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_size", "tokens"),
    [
        ((1, 1), 2, (1, 1)),
        ((5, 2), 24, (2, 11)),
        ((4, 1), 64, (1, 9)),
        ((3, 3), 128, (2, 3)),
        # More heads than a program of 1,024 pairs takes, forward and backward.
        ((18, 3), 128, (1, 3)),
    ],
    ids=str,
)
def test_accuracy(heads, head_size, tokens, dtype, device):
    inputs = make_inputs(dtype, device, heads=heads, head_size=head_size, tokens=tokens)
    assert_accurate(inputs, heads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents(dtype, device):
    assert_accurate(make_inputs(dtype, device, lengths=LENGTHS))


def test_weights_in_half_precision_and_another_eps(device):
    inputs = make_inputs(torch.float16, device, weights=torch.float16)
    assert_accurate(inputs, eps=0.3)


# Rows and heads beyond the last are divided by zero; what that gives is not used.
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
def test_rows_beyond_the_last_do_not_count(device):
    inputs = make_inputs(torch.float32, device, heads=(1, 1), head_size=4, tokens=(1, 3))
    assert_accurate(inputs, (1, 1), eps=0.0)


def test_v_is_copied_and_heads_do_not_mix(device):
    inputs = make_inputs(torch.float32, device)
    out = on_heads(qk_norm_rope)(*inputs.values()).unflatten(-1, (7, 16))
    assert torch.equal(out[..., 5:, :], inputs["qkv"].unflatten(-1, (7, 16))[..., 5:, :])
    # RoPE keeps a head's length, sqrt(hd) with weights of one, but for the scale of the tables.
    ones = {"q_weight": torch.ones(16, device=device), "k_weight": torch.ones(16, device=device)}
    out = on_heads(qk_norm_rope)(*(inputs | ones).values()).unflatten(-1, (7, 16))
    lengths = out[..., :5, :].norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 1.1 * 4), rtol=1e-4, atol=0)


def test_not_contiguous(device):
    inputs = make_inputs(torch.float32, device, lengths=LENGTHS)
    views = dict(inputs)
    for name in ("qkv", "cos", "sin", "positions"):
        view = inputs[name].detach().mT.contiguous().mT
        assert not view.is_contiguous()
        views[name] = view.requires_grad_(inputs[name].requires_grad)
    for name in ("q_weight", "k_weight"):
        views[name] = inputs[name].detach().repeat_interleave(2)[::2].requires_grad_()
    expected = outputs_and_gradients(on_heads(qk_norm_rope), inputs)
    for name, result in outputs_and_gradients(on_heads(qk_norm_rope), views).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("tokens", [(0, 5), (2, 0)])
def test_empty(tokens, device):
    inputs = make_inputs(torch.float32, device, tokens=tokens)
    results = outputs_and_gradients(on_heads(qk_norm_rope), inputs)
    assert results["output 0"].shape == (*tokens, 7 * 16)
    for name in ("q_weight", "k_weight"):
        assert torch.equal(results[f"gradient of {name}"], torch.zeros(16, device=device))


def test_positions_outside_the_table_take_its_nearest_row(device):
    inputs = make_inputs(torch.float32, device, tokens=(1, 3))
    inside, outside = (
        inputs | {"positions": torch.tensor([p], dtype=torch.int32, device=device)}
        for p in ([0, 1, 2], [-3, 1, 2**31 - 1])
    )
    assert_same_bits(
        lambda *args: on_heads(qk_norm_rope)(*args[:-1], inside["positions"]),
        on_heads(qk_norm_rope),
        outside,
    )


def test_programs_share_the_rows(device, monkeypatch):
    """As on a GPU: partial sums of several programs, the last of which has fewer rows."""
    inputs = make_inputs(torch.float32, device, tokens=(1, 13))
    one = outputs_and_gradients(on_heads(qk_norm_rope), inputs)
    several = qk_norm.CONFIGS["8.6"]._replace(backward_tile=64, backward_programs_per_sm=8)
    monkeypatch.setattr(qk_norm, "CONFIGS", dict.fromkeys(qk_norm.CONFIGS, several))
    launched = []
    sums = qk_norm.sum_partials
    monkeypatch.setattr(
        qk_norm, "sum_partials", lambda x, like: launched.append(len(x)) or sums(x, like)
    )
    assert_accurate(inputs)
    assert launched[0] > 1
    results = outputs_and_gradients(on_heads(qk_norm_rope), inputs)
    assert torch.equal(results["gradient of qkv"], one["gradient of qkv"])
    assert_same_bits(on_heads(qk_norm_rope), on_heads(qk_norm_rope), inputs)


def test_compiled_gives_the_same_bits(device):
    op = on_heads(qk_norm_rope)
    assert_same_bits(op, compiled(op), make_inputs(torch.float32, device, lengths=LENGTHS))


def test_derivative(device):
    assert_derivative(on_heads(qk_norm_rope), make_inputs(torch.float32, device, tokens=(1, 3)))


def test_opcheck(device):
    inputs = list(make_inputs(torch.float32, device, tokens=(1, 3)).values())
    ops, settings = torch.ops.hamner, (*HEADS, 1e-5)
    torch.library.opcheck(ops.qk_norm_rope, (*inputs, *settings, True))
    inputs = [x.detach() if x is not None else None for x in inputs]
    gradient = torch.ones_like(inputs[0])
    for op in (ops.qk_norm_rope_backward, ops.qk_norm_rope_backward_):
        torch.library.opcheck(op, (gradient, *inputs, *settings))


GOOD = {
    "qkv": zeros(2, 5, 64),
    "q_weight": zeros(8),
    "k_weight": zeros(8),
    "cos": zeros(5, 4),
    "sin": zeros(5, 4),
    "num_heads": 4,
    "num_kv_heads": 2,
}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "qkv is torch.float64", {"qkv": zeros(2, 5, 64, dtype=torch.float64)}),
        (ValueError, r"qkv has shape \(5, 64\)", {"qkv": zeros(5, 64)}),
        (ValueError, "qkv rows have 60 elements", {"qkv": zeros(2, 5, 60)}),
        (ValueError, r"q_weight has shape \(4,\)", {"q_weight": zeros(4)}),
        (ValueError, r"k_weight has shape \(2, 8\)", {"k_weight": zeros(2, 8)}),
        (TypeError, "q_weight is torch.float16", {"q_weight": zeros(8, dtype=torch.float16)}),
        (ValueError, "k_weight is on meta", {"k_weight": zeros(8).to("meta")}),
        (
            TypeError,
            "k_weight is torch.float32, q_weight torch.float16",
            {"qkv": zeros(2, 5, 64).half(), "q_weight": zeros(8).half()},
        ),
        (ValueError, r"cos has shape \(4, 4\)", {"cos": zeros(4, 4)}),
        (TypeError, "positions is torch.int64", {"positions": zeros(2, 5, dtype=torch.int64)}),
    ],
)
def test_wrong_arguments(error, message, change):
    with pytest.raises(error, match=message):
        qk_norm_rope(**{**GOOD, **change})


WIDTH, HEAD_SIZE = 48, 16


def layer_inputs(
    dtype, device, *, heads=(4, 2), head_size=HEAD_SIZE, tokens=(2, 11), width=WIDTH, lengths=None
):
    """Arguments of `fused` and `in_plain_torch` by name."""
    outputs = (heads[0] + 2 * heads[1]) * head_size
    norms = make_inputs(
        dtype, device, heads=heads, head_size=head_size, tokens=tokens, lengths=lengths
    )
    ids = None if lengths is None else documents(lengths, device)
    del norms["qkv"]
    return norm_inputs((*tokens, width), outputs, dtype, device) | norms | {"document_ids": ids}


def with_attention(function, heads=(4, 2), **options):
    def op(x, residual, norm_weight, weight, q_weight, k_weight, cos, sin, positions, ids):
        return function(
            x, residual, norm_weight, weight, cos, sin, *heads, positions, ids,
            qk_norm=(q_weight, k_weight), **options,
        )  # fmt: skip

    return op


def without_attention(function, **options):
    def op(x, residual, norm_weight, weight, q_weight, k_weight, cos, sin, positions, _):
        return function(
            x, residual, norm_weight, weight, cos, sin, 4, 2, positions,
            qk_norm=(q_weight, k_weight), **options,
        )  # fmt: skip

    return op


@pytest.mark.parametrize("dtype", DTYPES)
class TestInALayer:
    @pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["causal", "documents"])
    def test_norm_attention(self, lengths, dtype, device):
        assert_matches_reference(
            with_attention(add_rms_norm_attention),
            with_attention(add_rms_norm_attention_reference),
            layer_inputs(dtype, device, lengths=lengths),
        )

    def test_norm_qkv_rope(self, dtype, device):
        assert_matches_reference(
            without_attention(add_rms_norm_qkv_rope),
            without_attention(add_rms_norm_qkv_rope_reference),
            layer_inputs(dtype, device, lengths=LENGTHS),
        )


def test_heads_that_attention_pads(device):
    inputs = layer_inputs(torch.float32, device, heads=(2, 1), head_size=24)
    assert_matches_reference(
        with_attention(add_rms_norm_attention, (2, 1)),
        with_attention(add_rms_norm_attention_reference, (2, 1)),
        inputs,
    )


def test_recomputing_gives_the_bits_of_keeping_and_keeps_less(device):
    inputs = layer_inputs(torch.float16, device, lengths=LENGTHS)
    recomputed, kept = (
        with_attention(add_rms_norm_attention, recompute=recompute) for recompute in (True, False)
    )
    assert_same_bits(recomputed, kept, inputs)
    # In half precision the residual stream, qkv and the output; the normed input, q and k. In four
    # bytes rstd, lse and the bounds of documents.
    numbers, extra = WIDTH + 8 * HEAD_SIZE + 4 * HEAD_SIZE, WIDTH + 6 * HEAD_SIZE
    assert bytes_kept(recomputed, inputs) == 2 * 11 * (2 * numbers + 4 * 7)
    assert bytes_kept(kept, inputs) == 2 * 11 * (2 * (numbers + extra) + 4 * 7)


def test_a_layer_compiled_gives_the_same_bits(device):
    op = with_attention(add_rms_norm_attention)
    assert_same_bits(op, compiled(op), layer_inputs(torch.float32, device, lengths=LENGTHS))


def test_gradient_of_the_residual_stream_alone(device):
    inputs = layer_inputs(torch.float32, device)
    _, new_residual = with_attention(add_rms_norm_attention)(*inputs.values())
    new_residual.sum().backward()
    assert torch.equal(inputs["x"].grad, torch.ones_like(inputs["x"]))
    assert inputs["q_weight"].grad is None


@pytest.mark.parametrize("function", [add_rms_norm_attention, add_rms_norm_qkv_rope])
def test_a_layer_names_wrong_weights(function, device):
    inputs = layer_inputs(torch.float32, device)
    inputs["k_weight"] = inputs["k_weight"].detach()[:4]
    op = with_attention if function is add_rms_norm_attention else without_attention
    with pytest.raises(ValueError, match=r"k_weight has shape \(4,\)"):
        op(function)(*inputs.values())


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize("with_documents", [False, True])
    def test_training_shape(self, with_documents, head_size, device):
        heads = 1024 // head_size, 256 // head_size
        lengths = [[300, 724], [1024]] * 12 if with_documents else None
        inputs = make_inputs(
            torch.bfloat16, device,
            heads=heads, head_size=head_size, tokens=(24, 1024), lengths=lengths,
        )  # fmt: skip
        assert_accurate(inputs, heads)
        assert_same_bits(on_heads(qk_norm_rope, heads), on_heads(qk_norm_rope, heads), inputs)

    @pytest.mark.parametrize("recompute", [True, False])
    def test_layer_at_training_shape(self, recompute, device):
        inputs = layer_inputs(
            torch.bfloat16, device, heads=(16, 4), head_size=64, tokens=(2, 1024), width=1024
        )
        op = with_attention(add_rms_norm_attention, (16, 4), recompute=recompute)
        assert_matches_reference(
            op, with_attention(add_rms_norm_attention_reference, (16, 4)), inputs
        )
        assert_same_bits(op, op, inputs)

    def test_replays_as_a_cuda_graph(self, device):
        inputs = layer_inputs(torch.bfloat16, device, heads=(4, 2), head_size=64)
        assert_replays_as_a_cuda_graph(with_attention(add_rms_norm_attention), inputs)

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self):
        rows = 2**31 // 1536 + 3
        qkv = torch.empty(1, rows, 1536, dtype=torch.bfloat16, device="cuda").normal_()
        cos, sin = make_tables(8, 64, "cuda")
        positions = (torch.arange(rows, device="cuda") % 8).to(torch.int32)[None]
        weights = torch.ones(64, device="cuda"), torch.full((64,), 0.5, device="cuda")
        ops, settings = torch.ops.hamner, {"num_heads": 16, "num_kv_heads": 4, "eps": 1e-5}
        out = qk_norm_rope(qkv, *weights, cos, sin, 16, 4, positions)
        last = slice(-5, None)
        torch_results, exact = (
            self.reference_at(qkv[:, last].to(dtype), weights, cos, sin, positions[:, last])
            for dtype in (torch.bfloat16, torch.float64)
        )
        assert_as_accurate_as_torch("out", out[:, last], torch_results[0], exact[0])
        del out
        d_out = torch.ones_like(qkv)
        ops.qk_norm_rope_backward_(d_out, qkv, *weights, cos, sin, positions, **settings)
        assert_as_accurate_as_torch("d_qkv", d_out[:, last], torch_results[1], exact[1])

    def reference_at(self, qkv, weights, cos, sin, positions):
        """The reference's result, and the gradient of its sum, in the dtype of qkv."""
        qkv = qkv.clone().requires_grad_()
        if qkv.dtype == torch.float64:
            weights, cos, sin = [w.double() for w in weights], cos.double(), sin.double()
        out = qk_norm_rope_reference(qkv, *weights, cos, sin, 16, 4, positions)
        out.sum().backward()
        return out.detach(), qkv.grad
