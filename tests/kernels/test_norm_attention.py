import functools
import importlib

import pytest
import torch

from hamner.kernels.flash_attention import flash_attention_qkv
from hamner.kernels.fused_linear import add_rms_norm_qkv_rope
from hamner.kernels.norm_attention import add_rms_norm_attention, add_rms_norm_attention_reference
from tests.kernels.gradients import (
    DTYPES,
    assert_matches_reference,
    assert_replays_as_a_cuda_graph,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)
from tests.kernels.test_flash_attention import documents
from tests.kernels.test_fused_linear import bytes_kept, norm_inputs
from tests.kernels.test_rope import make_tables

HALF = DTYPES[-1]  # the trainer's dtype where there is a GPU, fp16 in the interpreter
HEADS = (4, 2)
FOLDED, PADDED = 16, 24  # head sizes


def make_inputs(
    dtype, device, *, heads=HEADS, head_size=FOLDED, shape=(2, 37, 48), residual=True, lengths=None
):
    """Arguments of the op by name; `lengths` of the documents in each row."""
    inputs = norm_inputs(
        shape, (heads[0] + 2 * heads[1]) * head_size, dtype, device, residual=residual
    )
    cos, sin = make_tables(shape[1], head_size, device)
    # Scaled, as some ways of stretching RoPE have it: then back is not the inverse.
    inputs |= {"cos": 1.1 * cos, "sin": 1.1 * sin, "positions": None, "document_ids": None}
    if lengths is not None:
        inputs["document_ids"] = documents(lengths, device)
        positions = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
        inputs["positions"] = torch.stack(positions).int().to(device)
    return inputs


def fused(heads=HEADS, recompute=True):
    def op(x, residual, norm_weight, weight, cos, sin, positions, document_ids):
        return add_rms_norm_attention(
            x, residual, norm_weight, weight, cos, sin, *heads, positions, document_ids,
            recompute=recompute,
        )  # fmt: skip

    return op


def in_two_ops(heads=HEADS, recompute=True):
    def op(x, residual, norm_weight, weight, cos, sin, positions, document_ids):
        qkv, new_residual = add_rms_norm_qkv_rope(
            x, residual, norm_weight, weight, cos, sin, *heads, positions, recompute=recompute
        )
        return flash_attention_qkv(qkv, *heads, document_ids=document_ids), new_residual

    return op


def reference(heads=HEADS):
    def op(x, residual, norm_weight, weight, cos, sin, positions, document_ids):
        return add_rms_norm_attention_reference(
            x, residual, norm_weight, weight, cos, sin, *heads, positions, document_ids
        )

    return op


# Documents of one token, at both ends and across tiles, and a row of one document.
LENGTHS = [[1, 9, 20, 6, 1], [37]]


@pytest.mark.parametrize("dtype", DTYPES)
class TestAccuracy:
    @pytest.mark.parametrize("recompute", [True, False])
    @pytest.mark.parametrize("residual", [True, False])
    @pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["causal", "documents"])
    def test_masks(self, lengths, residual, recompute, dtype, device):
        inputs = make_inputs(dtype, device, residual=residual, lengths=lengths)
        assert_matches_reference(fused(recompute=recompute), reference(), inputs)

    @pytest.mark.parametrize("heads", [(4, 1), (3, 3)], ids=str)
    @pytest.mark.parametrize("head_size", [64, 128, PADDED, 8])
    def test_heads(self, head_size, heads, dtype, device):
        lengths = [[30, 40]]
        # A width of 96: at 40 the largest error of an fp32 gradient is one row's cancellation, in
        # one of five draws 2.7 times plain torch's where the root mean squares are equal.
        inputs = make_inputs(
            dtype, device, heads=heads, head_size=head_size, shape=(1, 70, 96), lengths=lengths
        )
        assert_matches_reference(fused(heads), reference(heads), inputs)

    def test_several_tiles(self, dtype, device):
        inputs = make_inputs(dtype, device, heads=(2, 1), head_size=64, shape=(1, 150, 40))
        assert_matches_reference(fused((2, 1)), reference((2, 1)), inputs)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["causal", "documents"])
def test_agrees_with_the_two_ops_apart(lengths, device):
    """The same bits forward; in backward the rotation takes what is not rounded yet."""
    inputs = make_inputs(torch.float32, device, lengths=lengths)
    together, apart = (outputs_and_gradients(op(), inputs) for op in (fused, in_two_ops))
    for name, result in together.items():
        if name.startswith("output"):
            assert torch.equal(result, apart[name]), name
        torch.testing.assert_close(result, apart[name], rtol=1e-5, atol=1e-5, msg=name)


def test_padded_heads_have_the_bits_of_the_two_ops_apart(device):
    inputs = make_inputs(HALF, device, head_size=PADDED, lengths=LENGTHS)
    assert_same_bits(fused(), in_two_ops(), inputs)


@pytest.mark.parametrize(("head_size", "rotations"), [(FOLDED, 0), (PADDED, 1)])
def test_no_rotation_of_its_own_in_backward(head_size, rotations, device, monkeypatch):
    """What a layer's backward launches of rope.py's kernel."""
    launched = []

    def launch(*args, inverse=False, **options):
        launched.append(inverse)
        return rotate(*args, inverse=inverse, **options)

    # By their full names: the package has functions of the same.
    modules = [
        importlib.import_module(f"hamner.kernels.{name}")
        for name in ("fused_linear", "flash_attention")
    ]
    rotate = modules[0].launch_packed_rotation
    for module in modules:
        monkeypatch.setattr(module, "launch_packed_rotation", launch)
    outputs_and_gradients(fused(), make_inputs(torch.float32, device, head_size=head_size))
    assert launched == [False] + [True] * rotations


@pytest.mark.parametrize("recompute", [True, False])
def test_keeps_for_backward_what_the_two_ops_keep(recompute, device):
    inputs = make_inputs(torch.float32, device, lengths=LENGTHS)
    together, apart = (bytes_kept(op(recompute=recompute), inputs) for op in (fused, in_two_ops))
    assert together == apart
    # The residual stream, its rstd, qkv, the output, lse, the bounds of documents.
    numbers = 48 + 1 + 8 * FOLDED + 4 * FOLDED + 4 + 2 + (0 if recompute else 48)
    assert together == 2 * 37 * 4 * numbers


def test_two_runs_same_bits(device):
    inputs = make_inputs(HALF, device, head_size=64, lengths=LENGTHS)
    assert_same_bits(fused(), fused(), inputs)


# Any two of the three meet in every way; each compilation takes two seconds.
@pytest.mark.parametrize(
    ("recompute", "residual", "lengths"),
    [(True, True, None), (True, False, LENGTHS), (False, True, LENGTHS), (False, False, None)],
)
def test_compiled_gives_the_same_bits(recompute, residual, lengths, device):
    op = fused(recompute=recompute)
    inputs = make_inputs(torch.float32, device, residual=residual, lengths=lengths)
    assert_same_bits(op, compiled(op), inputs)


def test_checkpointed_gives_the_same_bits(device):
    checkpointed = functools.partial(
        torch.utils.checkpoint.checkpoint, fused(), use_reentrant=False
    )
    assert_same_bits(fused(), checkpointed, make_inputs(HALF, device, lengths=LENGTHS))


def test_not_contiguous(device):
    inputs = make_inputs(torch.float32, device, shape=(2, 37, 12), lengths=LENGTHS)
    views = dict(inputs)
    view = inputs["x"].detach().mT.contiguous().mT
    views["x"] = view.requires_grad_()
    for name in ("cos", "sin", "positions"):
        views[name] = inputs[name].t().contiguous().t()
    assert not any(views[name].is_contiguous() for name in ("x", "cos", "sin", "positions"))
    expected = outputs_and_gradients(fused(), inputs)
    for name, result in outputs_and_gradients(fused(), views).items():
        assert torch.equal(result, expected[name]), name


def test_positions_outside_the_table_take_its_nearest_row(device):
    inputs = make_inputs(torch.float32, device, shape=(1, 3, 12))
    inside, outside = (
        inputs | {"positions": torch.tensor([p], dtype=torch.int32, device=device)}
        for p in ([0, 1, 2], [-3, 1, 2**31 - 1])
    )
    results = outputs_and_gradients(fused(), inside)
    for name, result in outputs_and_gradients(fused(), outside).items():
        assert torch.equal(result, results[name]), name


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_empty(shape, device):
    results = outputs_and_gradients(fused(), make_inputs(torch.float32, device, shape=shape))
    assert results["output 0"].shape == (*shape[:2], HEADS[0] * FOLDED)
    weight_gradient = results["gradient of weight"]
    assert torch.equal(weight_gradient, torch.zeros_like(weight_gradient))


def test_gradient_of_the_residual_stream_alone(device):
    inputs = make_inputs(torch.float32, device)
    _, new_residual = fused()(*inputs.values())
    (2.0 * new_residual).sum().backward()
    for name in ("x", "residual"):
        assert torch.equal(inputs[name].grad, torch.full_like(inputs[name], 2.0))
    assert inputs["weight"].grad is None


def test_gradient_of_the_output_alone(device):
    """As in a layer whose residual stream has no other reader."""
    results = []
    for op in (fused(), reference()):
        inputs = make_inputs(torch.float32, device)
        op(*inputs.values())[0].square().sum().backward()
        results.append({name: inputs[name].grad for name in ("x", "residual", "weight")})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_without_a_residual_x_is_the_residual_stream(device):
    inputs = make_inputs(torch.float32, device, residual=False)
    x = inputs["x"].requires_grad_()
    stream = fused()(*inputs.values())[1]
    assert stream.data_ptr() == x.data_ptr() and stream.shape == x.shape
    (d_x,) = torch.autograd.grad(stream.sum(), x)
    assert torch.equal(d_x, torch.ones_like(x))


def test_without_gradients(device):
    inputs = make_inputs(torch.float32, device)
    expected = fused()(*inputs.values())[0]
    with torch.no_grad():
        out, _ = fused()(*inputs.values())
    assert torch.equal(out, expected)
    assert not out.requires_grad


def test_wrong_arguments(device):
    inputs = make_inputs(torch.float32, device, lengths=LENGTHS)
    for name, value, error, message in (
        ("cos", inputs["cos"][:, :4], ValueError, "cos has shape"),
        ("positions", inputs["positions"].long(), TypeError, "positions is torch.int64"),
        ("document_ids", inputs["document_ids"][:, :4], ValueError, "document_ids has shape"),
        ("weight", inputs["weight"].half(), TypeError, "weight is torch.float16"),
    ):
        with pytest.raises(error, match=message):
            fused()(*(inputs | {name: value}).values())
    with pytest.raises(ValueError, match="num_heads 3 must be a positive multiple"):
        fused((3, 2))(*make_inputs(torch.float32, device, heads=(3, 2)).values())
    with pytest.raises(ValueError, match="qkv has head size 130"):
        fused()(*make_inputs(torch.float32, device, head_size=130).values())


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("head_size", [64, 128])
    @pytest.mark.parametrize("with_documents", [False, True])
    @pytest.mark.parametrize("seq_len", [1000, 1024])
    def test_training_shape(self, seq_len, with_documents, head_size, device):
        heads = 1024 // head_size, 256 // head_size
        lengths = [[300, seq_len - 300], [seq_len]] if with_documents else None
        inputs = make_inputs(
            torch.bfloat16, device,
            heads=heads, head_size=head_size, shape=(2, seq_len, 1024), lengths=lengths,
        )  # fmt: skip
        assert_matches_reference(fused(heads), reference(heads), inputs)
        assert_same_bits(fused(heads), fused(heads), inputs)

    def test_replays_as_a_cuda_graph(self, device):
        inputs = make_inputs(torch.bfloat16, device, head_size=64, lengths=LENGTHS)
        assert_replays_as_a_cuda_graph(fused(), inputs)
