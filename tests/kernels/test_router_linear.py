"""Router logits and their gradients against fp64 and plain torch."""

import pytest
import torch

from hamner.kernels.router_linear import router_linear, router_linear_reference
from tests.kernels.accuracy import assert_as_accurate_as_torch

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)
NAMES = ("logits", "d_x", "d_weight")


def inputs(shape, dtype, device):
    num_tokens, num_experts, width = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator)).to(device, dtype)

    d_logits = torch.randn(num_tokens, num_experts, generator=generator).to(device)
    return randn(num_tokens, width), randn(num_experts, width, scale=width**-0.5), d_logits


def run(function, x, weight, d_logits, dtype=None):
    dtype = dtype or x.dtype
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
    logits = function(*leaves)
    gradients = torch.autograd.grad(logits, leaves, d_logits.to(logits.dtype))
    return dict(zip(NAMES, (logits.detach(), *gradients), strict=True))


def assert_matches_reference(x, weight, d_logits):
    actual = run(router_linear, x, weight, d_logits)
    same_dtype = run(router_linear_reference, x, weight, d_logits)
    exact = run(router_linear_reference, x, weight, d_logits, torch.float64)
    assert actual["logits"].dtype == torch.float32
    for name in NAMES:
        assert_as_accurate_as_torch(name, actual[name], same_dtype[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1), (17, 4, 33), (257, 64, 96), (300, 3, 128)])
def test_matches_reference(shape, dtype, device):
    assert_matches_reference(*inputs(shape, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24_576, 4, 768), (4099, 64, 1024)])
def test_matches_reference_at_size(shape, dtype, device):
    assert_matches_reference(*inputs(shape, dtype, device))


def test_non_contiguous_and_empty(device):
    x, weight, d_logits = inputs((40, 4, 32), torch.float32, device)
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(router_linear(strided, weight), router_linear(x, weight))
    empty = run(router_linear, x[:0], weight, d_logits[:0])
    assert empty["logits"].shape == (0, 4)
    assert (empty["d_weight"] == 0).all()


def test_gradcheck(device):
    x, weight, _ = inputs((5, 3, 7), torch.float32, device)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(router_linear, leaves, eps=1e-2, atol=1e-2, rtol=1e-2)


def test_compiles_to_one_graph(device):
    x, weight, d_logits = inputs((24, 4, 32), torch.float32, device)
    compiled = torch.compile(router_linear, fullgraph=True, backend="aot_eager")
    expected = run(router_linear, x, weight, d_logits)
    for name, value in run(compiled, x, weight, d_logits).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"weight": torch.ones(4, 3, dtype=torch.float16)}, TypeError, "weight is torch.float16"),
        ({"weight": torch.ones(4, 5)}, ValueError, "they must be"),
        ({"x": torch.ones(2, 3, 1)}, ValueError, "they must be"),
    ],
)
def test_rejects(change, error, message):
    with pytest.raises(error, match=message):
        router_linear(**{"x": torch.ones(2, 3), "weight": torch.ones(4, 3), **change})
