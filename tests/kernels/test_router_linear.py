"""The tests compare router logits and their gradients with fp64 and plain torch."""

import pytest
import torch

from hamner.kernels.rms_norm import MAX_WIDTH
from hamner.kernels.router_linear import router_linear, router_linear_reference
from tests.kernels.gradients import (
    DTYPES,
    assert_derivative,
    assert_matches_reference,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)

# (tokens, experts, width): one token, odd numbers, whole tiles, a row of several warps.
SHAPES = [
    *((1, 2, 1), (17, 4, 33), (129, 5, 65), (256, 4, 64), (130, 4, 768), (3, 2, 8192)),
    *((5, 1, 48), (40, 3, 100), (40, 8, 100), (257, 64, 96)),
]


def make_inputs(shape, dtype, device):
    num_tokens, num_experts, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(num_experts, width, generator=generator) * width**-0.5
    return {
        "x": x.to(device, dtype).requires_grad_(),
        "weight": weight.to(device, dtype).requires_grad_(),
    }


# The widest row takes the interpreter four seconds, and has the same code in any dtype.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, d) for s in SHAPES for d in DTYPES if s[2] < MAX_WIDTH or d != torch.float32],
)
def test_matches_reference(shape, dtype, device):
    inputs = make_inputs(shape, dtype, device)
    assert_matches_reference(router_linear, router_linear_reference, inputs)
    assert router_linear(**inputs).dtype == torch.float32


def test_logits_differ_where_half_precision_would_tie(device):
    x = torch.tensor([[1.0, 2.0**-13]], dtype=torch.float16, device=device)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float16, device=device)
    assert router_linear(x, weight).tolist() == [[1.0, 1.0 + 2.0**-13]]


def test_not_contiguous(device):
    inputs = make_inputs((40, 4, 32), torch.float32, device)
    views = {
        "x": torch.stack((inputs["x"].detach(),) * 2, dim=-1)[..., 0].requires_grad_(),
        "weight": inputs["weight"].detach().t().contiguous().t().requires_grad_(),
    }
    assert not any(view.is_contiguous() for view in views.values())
    expected = outputs_and_gradients(router_linear, inputs)
    for name, result in outputs_and_gradients(router_linear, views).items():
        assert torch.equal(result, expected[name]), name


def test_expanded_gradient(device):
    inputs = make_inputs((40, 4, 32), torch.float32, device)
    router_linear(**inputs).sum().backward()
    expected = torch.autograd.grad(router_linear_reference(**inputs).sum(), list(inputs.values()))
    torch.testing.assert_close([leaf.grad for leaf in inputs.values()], list(expected))


def test_a_token_that_is_not_finite_spoils_no_other(device):
    inputs = make_inputs((40, 4, 32), torch.float32, device)
    clean = router_linear(**inputs)
    (clean_d_x,) = torch.autograd.grad(clean.sum(), inputs["x"])
    with torch.no_grad():
        inputs["x"][7] = float("inf")
    logits = router_linear(**inputs)
    (d_x,) = torch.autograd.grad(logits.sum(), inputs["x"])
    others = torch.arange(40, device=device) != 7
    assert torch.equal(logits[others], clean[others])
    assert torch.equal(d_x, clean_d_x)


def test_empty(device):
    results = outputs_and_gradients(router_linear, make_inputs((0, 4, 32), torch.float32, device))
    assert results["output 0"].shape == (0, 4)
    assert results["gradient of x"].shape == (0, 32)
    assert torch.equal(results["gradient of weight"], torch.zeros(4, 32, device=device))


def test_two_runs_give_the_same_bits(device):
    assert_same_bits(router_linear, router_linear, make_inputs((301, 5, 33), torch.float16, device))


def test_compiled_gives_the_same_bits(device):
    inputs = make_inputs((150, 4, 40), torch.float32, device)
    assert_same_bits(router_linear, compiled(router_linear), inputs)


def test_derivative(device):
    assert_derivative(router_linear, make_inputs((150, 3, 20), torch.float32, device))


def test_opcheck(device):
    inputs = make_inputs((3, 4, 20), torch.float32, device)
    torch.library.opcheck(torch.ops.hamner.router_linear, tuple(inputs.values()))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x is torch.int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
        (TypeError, "weight is torch.float16", {"weight": torch.ones(4, 3).half()}),
        (ValueError, r"weight has shape \(4, 5\)", {"weight": torch.ones(4, 5)}),
        (ValueError, r"x has shape \(2, 3, 1\)", {"x": torch.ones(2, 3, 1)}),
        (ValueError, "at least one expert", {"weight": torch.ones(0, 3)}),
        (ValueError, "1 to 8192", {"x": torch.ones(2, 0), "weight": torch.ones(4, 0)}),
        (ValueError, "1 to 8192", {"x": torch.ones(2, 8193), "weight": torch.ones(4, 8193)}),
        (ValueError, "weight is on meta", {"weight": torch.ones(4, 3, device="meta")}),
    ],
)
def test_rejects(error, message, change):
    with pytest.raises(error, match=message):
        router_linear(**{"x": torch.ones(2, 3), "weight": torch.ones(4, 3), **change})


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(24_576, 4, 768), (4099, 64, 1024), (1031, 2, MAX_WIDTH)])
    def test_training_shape(self, shape, dtype):
        inputs = make_inputs(shape, dtype, "cuda")
        assert_matches_reference(router_linear, router_linear_reference, inputs)
        assert_same_bits(router_linear, router_linear, inputs)

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self):
        rows = 2**31 // 1024 + 3
        x = torch.empty(rows, 1024, dtype=torch.bfloat16, device="cuda").normal_()
        weight = torch.randn(2, 1024, device="cuda").bfloat16()
        logits = router_linear(x.requires_grad_(), weight)
        torch.testing.assert_close(logits[-5:], router_linear_reference(x[-5:], weight))
        (d_x,) = torch.autograd.grad(logits, x, logits.detach())
        last = x.detach()[-5:].requires_grad_()
        (d_last,) = torch.autograd.grad(router_linear(last, weight), last, logits.detach()[-5:])
        assert torch.equal(d_x[-5:], d_last)
