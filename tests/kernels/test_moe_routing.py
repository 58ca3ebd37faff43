"""moe_route chooses and sorts exactly as its reference; the numbers meet the accuracy criterion."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hamner.kernels import moe_routing
from hamner.kernels.moe_routing import Routing, moe_route, moe_route_reference
from tests.kernels.accuracy import assert_as_accurate_as_torch
from tests.waiting import no_waiting

# Triton's interpreter, which runs the kernels where there is no GPU, gets bf16 wrong.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
INDICES = ("experts", "order", "offsets")
SHAPES = [(1, 2, 1), (17, 4, 2), (64, 8, 8), (257, 5, 3), (100, 64, 8)]


def random_logits(num_tokens, num_experts, dtype, device, *, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, num_experts, generator=generator) * scale
    return logits.to(device, dtype)


def route_and_differentiate(route, logits, num_experts_per_token, **options):
    """The function gives a routing, and the gradient of a sum of all differentiable in it."""
    logits = logits.detach().clone().requires_grad_()
    routing = route(logits, num_experts_per_token, **options)
    generator = torch.Generator().manual_seed(1)
    d_weights = torch.randn(routing.weights.shape, generator=generator).to(routing.weights)
    objective = (routing.weights * d_weights).sum()
    objective = objective + 0.7 * routing.load_balancing_loss + 0.3 * routing.z_loss
    objective.backward()
    return routing, logits.grad


def assert_matches_reference(logits, num_experts_per_token, **options):
    routing, d_logits = route_and_differentiate(moe_route, logits, num_experts_per_token, **options)
    same_dtype, d_logits_same = route_and_differentiate(
        moe_route_reference, logits, num_experts_per_token, **options
    )
    exact, d_logits_exact = route_and_differentiate(
        moe_route_reference, logits.double(), num_experts_per_token, **options
    )
    for name in INDICES:
        actual, expected = getattr(routing, name), getattr(exact, name)
        assert actual.dtype == torch.int32
        assert torch.equal(actual, expected), name
    for name in Routing._fields:
        if name not in INDICES:
            assert_as_accurate_as_torch(
                name, getattr(routing, name), getattr(same_dtype, name), getattr(exact, name)
            )
    assert_as_accurate_as_torch("d_logits", d_logits, d_logits_same, d_logits_exact)
    return routing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, renormalize, dtype, device):
    num_tokens, num_experts, top_k = shape
    logits = random_logits(num_tokens, num_experts, dtype, device)
    assert_matches_reference(logits, top_k, renormalize=renormalize)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24_576, 4, 2), (24_576, 64, 8), (1_000_003, 5, 3)])
def test_matches_reference_at_size(shape, dtype, device):
    num_tokens, num_experts, top_k = shape
    assert_matches_reference(random_logits(num_tokens, num_experts, dtype, device), top_k)


@pytest.mark.parametrize("scale", [30.0, 3000.0])
@pytest.mark.parametrize("renormalize", [True, False])
def test_confident_routers_stay_finite(scale, renormalize, device):
    logits = random_logits(33, 6, torch.float32, device, scale=scale)
    assert_matches_reference(logits, 3, renormalize=renormalize)


def test_scan_carries_over_many_blocks(device, monkeypatch):
    monkeypatch.setattr(moe_routing, "SCAN_BLOCK", 4)
    logits = random_logits(1000, 4, torch.float32, device)
    assert_matches_reference(logits, 2)


def test_order_is_a_stable_sort_by_expert(device):
    routing = moe_route(random_logits(300, 7, torch.float32, device), 3)
    experts_in_order = routing.experts.flatten()[routing.order.long()]
    assert torch.equal(routing.order.sort().values, torch.arange(900, device=device).int())
    same_expert = experts_in_order[1:] == experts_in_order[:-1]
    assert (experts_in_order[1:] >= experts_in_order[:-1]).all()
    assert (routing.order[1:] > routing.order[:-1])[same_expert].all()
    sizes = torch.bincount(routing.experts.flatten(), minlength=7)
    assert torch.equal(routing.offsets.diff().long(), sizes)
    torch.testing.assert_close(routing.load, sizes / 900)


def test_one_expert_takes_all_and_the_others_none(device):
    logits = random_logits(70, 5, torch.float32, device)
    logits[:, 3] += 100.0
    routing = assert_matches_reference(logits, 1)
    assert routing.offsets.tolist() == [0, 0, 0, 0, 70, 70]
    assert routing.load.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_ties_go_to_the_lower_expert(device):
    logits = torch.zeros(20, 6, device=device)
    logits[7:, 4] = 1.0
    routing = assert_matches_reference(logits, 3)
    assert routing.experts[0].tolist() == [0, 1, 2]
    assert routing.experts[7].tolist() == [4, 0, 1]


def test_no_tokens(device):
    logits = torch.empty(0, 4, device=device, requires_grad=True)
    routing = moe_route(logits, 2)
    expected = moe_route_reference(logits, 2)
    for name, actual, reference in zip(Routing._fields, routing, expected, strict=True):
        assert torch.equal(actual, reference), name
        assert actual.dtype == reference.dtype, name
    (routing.weights.sum() + routing.load_balancing_loss + routing.z_loss).backward()
    assert logits.grad.shape == (0, 4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter on NaN
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_bad_logits_never_give_bad_indices(bad, device):
    logits = random_logits(40, 6, torch.float32, device)
    logits[5] = bad
    logits[9, 2] = bad
    routing = moe_route(logits, 4)
    assert ((routing.experts >= 0) & (routing.experts < 6)).all()
    assert (routing.experts.sort(dim=1).values.diff(dim=1) > 0).all(), "not distinct"
    assert torch.equal(routing.order.sort().values, torch.arange(160, device=device).int())
    assert not torch.isfinite(routing.z_loss)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (8, 1), (5, 3)])
def test_load_balancing_loss_is_mixtrals(num_experts, top_k, device):
    logits = random_logits(129, num_experts, torch.float32, device)
    routing = moe_route(logits, top_k)
    expected = load_balancing_loss_func((logits,), num_experts, top_k)
    torch.testing.assert_close(routing.load_balancing_loss, expected)


def test_balanced_router_has_a_load_balancing_loss_of_k(device):
    routing = moe_route(torch.eye(6, device=device).repeat(10, 1), 1)
    torch.testing.assert_close(routing.load_balancing_loss, torch.tensor(1.0, device=device))
    torch.testing.assert_close(routing.load, torch.full((6,), 1 / 6, device=device))


def test_bias_chooses_but_does_not_weigh(device):
    logits = random_logits(50, 4, torch.float32, device)
    bias = torch.tensor([0.0, 0.0, 0.0, 2.0], device=device, requires_grad=True)
    routing = assert_matches_reference(logits, 2, bias=bias)
    assert (routing.experts[:, 0] == 3).all()
    plain = moe_route(logits, 2)
    assert not torch.equal(routing.experts, plain.experts)
    chosen = logits.gather(1, routing.experts.long()).softmax(dim=1)
    torch.testing.assert_close(routing.weights, chosen)
    assert bias.grad is None


def test_bias_decides_between_ties_and_ties_of_the_sums_go_to_the_lower_expert(device):
    logits = torch.zeros(20, 6, device=device)
    bias = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.5, 0.0], device=device)
    routing = assert_matches_reference(logits, 3, bias=bias)
    assert routing.experts[0].tolist() == [2, 4, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_with_a_bias(shape, dtype, device):
    num_tokens, num_experts, top_k = shape
    generator = torch.Generator().manual_seed(2)
    bias = (0.1 * torch.randn(num_experts, generator=generator)).to(device)
    logits = random_logits(num_tokens, num_experts, dtype, device)
    assert_matches_reference(logits, top_k, bias=bias)


def test_a_bias_of_zero_changes_nothing(device):
    logits = random_logits(257, 5, torch.float32, device)
    plain = moe_route(logits, 3)
    biased = moe_route(logits, 3, bias=torch.zeros(5, device=device))
    for name, expected, actual in zip(Routing._fields, plain, biased, strict=True):
        assert torch.equal(expected, actual), name


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_is_the_derivative(renormalize, device):
    logits = random_logits(6, 4, torch.float32, device, scale=2.0)
    _, d_logits = route_and_differentiate(moe_route, logits, 2, renormalize=renormalize)
    d_weights = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).to(device)

    def objective(at):
        routing = moe_route(at, 2, renormalize=renormalize)
        losses = 0.7 * routing.load_balancing_loss + 0.3 * routing.z_loss
        return ((routing.weights * d_weights).sum() + losses).item()

    step = 1e-2
    numeric = torch.zeros_like(logits)
    for index in range(logits.numel()):
        delta = torch.zeros_like(logits)
        delta.view(-1)[index] = step
        numeric.view(-1)[index] = (objective(logits + delta) - objective(logits - delta)) / 2 / step
    # The derivative exists where a step does not change who is chosen.
    gaps = logits.sort(dim=1).values.diff(dim=1)
    assert gaps.min() > 2 * step
    torch.testing.assert_close(d_logits, numeric, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("used", ["weights", "load_balancing_loss", "z_loss"])
def test_gradient_of_one_output_alone(used, device):
    logits = random_logits(30, 4, torch.float32, device).requires_grad_()
    reference = logits.detach().clone().requires_grad_()
    getattr(moe_route(logits, 2), used).square().sum().backward()
    getattr(moe_route_reference(reference, 2), used).square().sum().backward()
    torch.testing.assert_close(logits.grad, reference.grad)


def test_only_weights_and_losses_carry_gradients(device):
    routing = moe_route(random_logits(5, 4, torch.float32, device).requires_grad_(), 2)
    carrying = {name for name in Routing._fields if getattr(routing, name).requires_grad}
    assert carrying == {"weights", "load_balancing_loss", "z_loss"}


def test_logits_need_not_be_contiguous(device):
    wide = random_logits(8, 40, torch.float32, device)
    for logits in (wide.t(), wide[:, ::3]):
        assert_matches_reference(logits, 2)


def test_two_runs_give_the_same_bits(device):
    logits = random_logits(400, 8, torch.float32, device)
    first, d_first = route_and_differentiate(moe_route, logits, 2)
    second, d_second = route_and_differentiate(moe_route, logits, 2)
    for name, a, b in zip(Routing._fields, first, second, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(d_first, d_second)


def test_compiles_without_graph_breaks(device):
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(moe_route, fullgraph=True, backend=backend)
    logits = random_logits(65, 4, torch.float32, device)
    eager, d_eager = route_and_differentiate(moe_route, logits, 2)
    routing, d_logits = route_and_differentiate(compiled, logits, 2)
    for name, a, b in zip(Routing._fields, eager, routing, strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(d_eager, d_logits)


@pytest.mark.parametrize("num_tokens", [0, 33])
def test_opcheck(num_tokens, device):
    logits = random_logits(num_tokens, 4, torch.float32, device).requires_grad_()
    bias = torch.zeros(4, device=device)
    torch.library.opcheck(torch.ops.hamner.moe_route.default, (logits, None, 2, True))
    torch.library.opcheck(torch.ops.hamner.moe_route.default, (logits, bias, 2, False))
    routing = moe_route(logits.detach(), 2)
    one = torch.ones((), device=device)
    torch.library.opcheck(
        torch.ops.hamner.moe_route_backward.default,
        (logits.detach(), routing.experts, routing.offsets, routing.weights, one, one, True),
    )


@pytest.mark.gpu
def test_never_waits_for_the_device(device):
    logits = random_logits(1000, 4, torch.float32, device)
    route_and_differentiate(moe_route, logits, 2)
    logits.requires_grad_()
    d_weights = torch.ones(1000, 2, device=device)
    with no_waiting():
        routing = moe_route(logits, 2)
        torch.autograd.backward(routing.weights, d_weights)


@pytest.mark.parametrize(
    ("logits", "top_k", "bias", "error", "named"),
    [
        (torch.zeros(4), 2, None, ValueError, "router_logits"),
        (torch.zeros(4, 1), 1, None, ValueError, "router_logits"),
        (torch.zeros(4, 65), 2, None, ValueError, "router_logits"),
        (torch.zeros(4, 8, dtype=torch.float64), 2, None, TypeError, "router_logits"),
        (torch.zeros(4, 8, dtype=torch.int32), 2, None, TypeError, "router_logits"),
        (torch.zeros(4, 8), 0, None, ValueError, "num_experts_per_token"),
        (torch.zeros(4, 8), 9, None, ValueError, "num_experts_per_token"),
        (torch.zeros(4, 3), 4, None, ValueError, "num_experts_per_token"),
        (torch.zeros(4, 8), 2, torch.zeros(7), ValueError, "bias"),
        (torch.zeros(4, 8), 2, torch.zeros(8, dtype=torch.float16), TypeError, "bias"),
        (torch.zeros(4, 8), 2, torch.zeros(8, device="meta"), ValueError, "bias"),
    ],
)
def test_wrong_arguments_are_named(logits, top_k, bias, error, named):
    with pytest.raises(error, match=named):
        moe_route(logits, top_k, bias=bias)
