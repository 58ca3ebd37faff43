import pytest
import torch

from hamner.kernels.swiglu import launch_swiglu_backward, swiglu, swiglu_reference
from tests.kernels.gradients import (
    DTYPES,
    assert_derivative,
    assert_matches_reference,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)


def make_inputs(shape, dtype, device):
    """Make gate_up of this shape; the spread reaches sigmoid's flat ends."""
    generator = torch.Generator().manual_seed(0)
    gate_up = 4.0 * torch.randn(shape, generator=generator)
    return {"gate_up": gate_up.to(device, dtype).requires_grad_()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (1, 66), (19, 74), (2, 5, 600), (3, 1408)])
def test_accuracy(shape, dtype, device):
    assert_matches_reference(swiglu, swiglu_reference, make_inputs(shape, dtype, device))


def test_gate_comes_first(device):
    gate, up = torch.tensor([1.0, -2.0], device=device), torch.tensor([3.0, 5.0], device=device)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(swiglu(torch.cat((gate, up))), expected)


@pytest.mark.parametrize("gate", [-100.0, 100.0])
def test_gate_beyond_the_range_of_exp(gate, device):
    gate_up = torch.tensor([gate, 2.0], device=device, requires_grad=True)
    h = swiglu(gate_up)
    h.backward(torch.ones_like(h))
    assert h.item() == pytest.approx(2.0 * max(gate, 0.0))
    assert gate_up.grad.tolist() == pytest.approx([2.0 if gate > 0 else 0.0, max(gate, 0.0)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_writes_h_over_its_gradient(dtype, device):
    gate_up = make_inputs((19, 74), dtype, device)["gate_up"].detach()
    d_h = torch.randn(19, 37).to(gate_up)
    expected = launch_swiglu_backward(d_h, gate_up)
    over_d_h = d_h.clone()
    assert torch.equal(launch_swiglu_backward(over_d_h, gate_up, h=over_d_h), expected)
    assert torch.equal(over_d_h, swiglu(gate_up))


def test_not_contiguous(device):
    inputs = make_inputs((33, 10), torch.float32, device)
    view = inputs["gate_up"].detach().t().contiguous().t().requires_grad_()
    assert not view.is_contiguous()
    expected = outputs_and_gradients(swiglu, inputs)
    for name, result in outputs_and_gradients(swiglu, {"gate_up": view}).items():
        assert torch.equal(result, expected[name]), name


def test_expanded_gradient(device):
    gate_up = make_inputs((5, 16), torch.float32, device)["gate_up"]
    (gradient,) = torch.autograd.grad(swiglu(gate_up).sum(), gate_up)
    (expected,) = torch.autograd.grad(swiglu_reference(gate_up).sum(), gate_up)
    torch.testing.assert_close(gradient, expected)


def test_empty(device):
    results = outputs_and_gradients(swiglu, make_inputs((0, 16), torch.float32, device))
    assert results["output 0"].shape == (0, 8)
    assert results["gradient of gate_up"].shape == (0, 16)


def test_two_runs_give_the_same_bits(device):
    assert_same_bits(swiglu, swiglu, make_inputs((9, 74), torch.float16, device))


def test_compiled_gives_the_same_bits(device):
    assert_same_bits(swiglu, compiled(swiglu), make_inputs((2, 3, 40), torch.float32, device))


def test_derivative(device):
    assert_derivative(swiglu, make_inputs((3, 20), torch.float32, device))


def test_opcheck(device):
    inputs = make_inputs((3, 20), torch.float32, device)
    torch.library.opcheck(torch.ops.hamner.swiglu, tuple(inputs.values()))


@pytest.mark.parametrize(
    ("error", "message", "gate_up"),
    [
        (TypeError, "gate_up is torch.float64", torch.zeros(2, 4, dtype=torch.float64)),
        (TypeError, "gate_up is torch.int64", torch.zeros(2, 4, dtype=torch.int64)),
        (ValueError, r"gate_up has shape \(2, 5\)", torch.zeros(2, 5)),
        (ValueError, r"gate_up has shape \(2, 0\)", torch.zeros(2, 0)),
        (ValueError, r"gate_up has shape \(\)", torch.zeros(())),
    ],
)
def test_wrong_arguments(error, message, gate_up):
    with pytest.raises(error, match=message):
        swiglu(gate_up)


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("intermediate", [2048, 2816])
    def test_training_shape(self, intermediate):
        inputs = make_inputs((8, 1024, 2 * intermediate), torch.bfloat16, "cuda")
        assert_matches_reference(swiglu, swiglu_reference, inputs)

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self):
        rows = 2**31 // 2048 + 3
        gate_up = torch.empty(rows, 2048, dtype=torch.bfloat16, device="cuda").normal_()
        h = swiglu(gate_up)
        torch.testing.assert_close(h[-5:], swiglu_reference(gate_up[-5:]))
        d_gate_up = launch_swiglu_backward(h, gate_up)
        assert torch.equal(d_gate_up[-5:], launch_swiglu_backward(h[-5:], gate_up[-5:]))
