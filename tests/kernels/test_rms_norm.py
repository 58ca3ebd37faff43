import pytest
import torch
from torch import zeros

from hamner.kernels.rms_norm import (
    MAX_WIDTH,
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from tests.kernels.gradients import (
    DTYPES,
    assert_derivative,
    assert_matches_reference,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)

# One row, odd widths, several programs with a ragged last one, the widest row. A row of a few
# elements has a gradient that is mostly cancellation: nothing there to compare rounding with.
SHAPES = [(1, 33), (131, 33), (5, 3, 100), (2, 5, 256), (1, 1024), (3, 8192)]


def make_inputs(shape, dtype, device, *, residual=True, weight_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(shape, generator=generator).to(device, dtype)}
    if residual:
        inputs["residual"] = torch.randn(shape, generator=generator).to(device, dtype)
    weight = 1.0 + 0.1 * torch.randn(shape[-1], generator=generator)
    inputs["weight"] = weight.to(device, weight_dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestAccuracy:
    def test_rms_norm(self, shape, dtype, device):
        inputs = make_inputs(shape, dtype, device, residual=False)
        assert_matches_reference(rms_norm, rms_norm_reference, inputs)

    def test_add_rms_norm(self, shape, dtype, device):
        inputs = make_inputs(shape, dtype, device)
        assert_matches_reference(add_rms_norm, add_rms_norm_reference, inputs)


def test_weight_in_the_dtype_of_x(device):
    inputs = make_inputs((7, 64), torch.float16, device, weight_dtype=torch.float16)
    assert_matches_reference(add_rms_norm, add_rms_norm_reference, inputs)


def test_eps_is_used(device):
    inputs = make_inputs((7, 64), torch.float32, device, residual=False)
    inputs["x"] = (1e-3 * inputs["x"].detach()).requires_grad_()
    assert_matches_reference(
        lambda x, weight: rms_norm(x, weight, eps=1e-2),
        lambda x, weight: rms_norm_reference(x, weight, eps=1e-2),
        inputs,
    )


def test_new_residual_is_the_rounded_sum_and_y_its_norm(device):
    inputs = make_inputs((9, 100), torch.float16, device)
    y, new_residual = add_rms_norm(*inputs.values())
    assert torch.equal(new_residual, inputs["x"] + inputs["residual"])
    assert torch.equal(y, rms_norm(new_residual, inputs["weight"]))


def test_gradient_of_the_residual_stream_alone(device):
    inputs = make_inputs((4, 48), torch.float32, device)
    _, new_residual = add_rms_norm(*inputs.values())
    (2.0 * new_residual).sum().backward()
    for name in ("x", "residual"):
        assert torch.equal(inputs[name].grad, torch.full_like(inputs[name], 2.0))
    assert inputs["weight"].grad is None


def test_not_contiguous(device):
    inputs = make_inputs((33, 10), torch.float32, device)
    views = {
        name: inputs[name].detach().t().contiguous().t().requires_grad_()
        for name in ("x", "residual")
    }
    views["weight"] = inputs["weight"].detach().repeat_interleave(2)[::2].requires_grad_()
    assert not any(view.is_contiguous() for view in views.values())
    expected = outputs_and_gradients(add_rms_norm, inputs)
    for name, result in outputs_and_gradients(add_rms_norm, views).items():
        assert torch.equal(result, expected[name]), name


def test_expanded_gradient(device):
    inputs = make_inputs((5, 16), torch.float32, device, residual=False)
    rms_norm(*inputs.values()).sum().backward()
    expected = torch.autograd.grad(
        rms_norm_reference(*inputs.values()).sum(), list(inputs.values())
    )
    torch.testing.assert_close([x.grad for x in inputs.values()], list(expected))


def test_empty(device):
    inputs = make_inputs((0, 16), torch.float32, device)
    results = outputs_and_gradients(add_rms_norm, inputs)
    assert results["output 0"].shape == results["gradient of x"].shape == (0, 16)
    assert torch.equal(results["gradient of weight"], torch.zeros(16, device=device))


def test_two_runs_give_the_same_bits(device):
    assert_same_bits(add_rms_norm, add_rms_norm, make_inputs((301, 33), torch.float16, device))


def test_compiled_gives_the_same_bits(device):
    inputs = make_inputs((4, 3, 40), torch.float32, device)
    assert_same_bits(add_rms_norm, compiled(add_rms_norm), inputs)
    del inputs["residual"]
    assert_same_bits(rms_norm, compiled(rms_norm), inputs)


def test_derivative(device):
    assert_derivative(add_rms_norm, make_inputs((3, 20), torch.float32, device))


def test_opcheck(device):
    inputs = make_inputs((3, 20), torch.float32, device)
    for residual in (inputs["residual"], None):
        arguments = inputs["x"], residual, inputs["weight"], 1e-5
        torch.library.opcheck(torch.ops.hamner.rms_norm, arguments)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x is torch.float64", (zeros(2, 4, dtype=torch.float64), None, zeros(4))),
        (ValueError, r"x has shape \(2, 8193\)", (zeros(2, 8193), None, zeros(8193))),
        (ValueError, r"x has shape \(2, 0\)", (zeros(2, 0), None, zeros(0))),
        (TypeError, "weight is torch.float16", (zeros(2, 4), None, zeros(4, dtype=torch.float16))),
        (ValueError, r"weight has shape \(5,\)", (zeros(2, 4), None, zeros(5))),
        (ValueError, "weight is on meta", (zeros(2, 4), None, zeros(4).to("meta"))),
        (TypeError, "residual is", (zeros(2, 4), zeros(2, 4, dtype=torch.float16), zeros(4))),
        (ValueError, r"residual has shape \(4,\)", (zeros(2, 4), zeros(4), zeros(4))),
        (ValueError, "residual is on meta", (zeros(2, 4), zeros(2, 4).to("meta"), zeros(4))),
    ],
)
def test_wrong_arguments(error, message, arguments):
    x, residual, weight = arguments
    with pytest.raises(error, match=message):
        if residual is None:
            rms_norm(x, weight)
        else:
            add_rms_norm(x, residual, weight)


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize(
        "shape", [(24, 1024, 256), (24, 1024, 768), (24, 1024, 1024), (1031, MAX_WIDTH)], ids=str
    )
    def test_training_shape(self, shape):
        inputs = make_inputs(shape, torch.bfloat16, "cuda")
        assert_matches_reference(add_rms_norm, add_rms_norm_reference, inputs)
        assert_same_bits(add_rms_norm, add_rms_norm, inputs)

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self):
        rows = 2**31 // 1024 + 3
        x = torch.empty(rows, 1024, dtype=torch.bfloat16, device="cuda").normal_()
        weight = torch.ones(1024, device="cuda")
        x.requires_grad_()
        y = rms_norm(x, weight)
        torch.testing.assert_close(y[-5:], rms_norm_reference(x[-5:], weight))
        y.backward(x.detach())
        last = x.detach()[-5:].requires_grad_()
        rms_norm(last, weight).backward(last.detach())
        assert torch.equal(x.grad[-5:], last.grad)

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32_with_a_residual(self):
        rows = 2**31 // 1024 + 3
        x, residual, d_y, d_stream = (
            torch.empty(rows, 1024, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(4)
        )
        weight = torch.ones(1024, device="cuda")
        outputs = add_rms_norm(x.requires_grad_(), residual, weight)
        torch.autograd.backward(outputs, (d_y, d_stream))
        last = x.detach()[-5:].requires_grad_()
        alone = add_rms_norm(last, residual[-5:], weight)
        torch.autograd.backward(alone, (d_y[-5:], d_stream[-5:]))
        for output, expected in zip(outputs, alone, strict=True):
            assert torch.equal(output[-5:], expected)
        assert torch.equal(x.grad[-5:], last.grad)
