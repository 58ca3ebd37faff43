"""The tests compare moe_mlp with a loop over experts and with Mixtral, every gradient too."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hamner.kernels.grouped_matmul import moe_mlp, moe_mlp_reference
from hamner.kernels.moe_routing import Routing, moe_route
from tests.kernels.accuracy import assert_as_accurate_as_torch
from tests.waiting import no_waiting

# Triton's interpreter, which runs the kernels where there is no GPU, gets bf16 wrong.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
NAMES = ("out", "d_x", "d_routing_weights", "d_gate_up_weight", "d_down_weight")
# N, E, K, D, I: one token, its hidden row in two blocks; odd widths; more rows than a tile; more
# experts than tokens; K = E.
SHAPES = [
    (1, 2, 1, 8, 520),
    (17, 4, 2, 33, 21),
    (257, 3, 2, 40, 72),
    (17, 64, 8, 16, 24),
    (40, 8, 8, 24, 16),
]


class Problem(NamedTuple):
    x: Tensor  # (N, D)
    routing: Routing
    gate_up_weight: Tensor  # (E, 2I, D)
    down_weight: Tensor  # (E, D, I)
    d_out: Tensor  # (N, D)


def random_problem(shape, dtype, device, *, favourite=None) -> Problem:
    """The inputs are random; with a `favourite` expert, every token has it as its best."""
    num_tokens, num_experts, top_k, width, intermediate = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator)

    logits = randn(num_tokens, num_experts)
    if favourite is not None:
        logits[:, favourite] += 100.0
    return Problem(
        x=randn(num_tokens, width).to(device, dtype),
        routing=moe_route(logits.to(device), top_k, renormalize=favourite is None),
        gate_up_weight=(randn(num_experts, 2 * intermediate, width) / width**0.5).to(device, dtype),
        down_weight=(randn(num_experts, width, intermediate) / intermediate**0.5).to(device, dtype),
        d_out=randn(num_tokens, width).to(device, dtype),
    )


def run(mlp, problem: Problem, dtype=None, **options) -> dict[str, Tensor]:
    """Output and gradients come by NAMES, in `dtype` (the routing weights in fp32 or fp64)."""
    dtype = dtype or problem.x.dtype
    weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [
        tensor.detach().clone().to(wanted).requires_grad_()
        for tensor, wanted in (
            (problem.x, dtype),
            (problem.routing.weights, weights_dtype),
            (problem.gate_up_weight, dtype),
            (problem.down_weight, dtype),
        )
    ]
    x, routing_weights, gate_up_weight, down_weight = inputs
    routing = problem.routing._replace(weights=routing_weights)
    out = mlp(x, routing, gate_up_weight, down_weight, **options)
    gradients = torch.autograd.grad(out, inputs, problem.d_out.to(dtype))
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def assert_matches_reference(problem: Problem, **options) -> dict[str, Tensor]:
    actual = run(moe_mlp, problem, **options)
    same_dtype = run(moe_mlp_reference, problem)
    exact = run(moe_mlp_reference, problem, torch.float64)
    for name in NAMES:
        assert_as_accurate_as_torch(name, actual[name], same_dtype[name], exact[name])
    return actual


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in NAMES:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    assert_matches_reference(random_problem(shape, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4099, 4, 2, 768, 1536), (3001, 64, 8, 200, 640)])
def test_matches_reference_at_size(shape, dtype, device):
    assert_matches_reference(random_problem(shape, dtype, device))


@pytest.mark.gpu
def test_matches_reference_at_option_c(device):
    assert_matches_reference(random_problem((24_576, 4, 2, 768, 1536), torch.bfloat16, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_takes_all_and_others_none(top_k, dtype, device):
    problem = random_problem((150, 5, top_k, 24, 16), dtype, device, favourite=3)
    actual = assert_matches_reference(problem)
    empty = problem.routing.offsets.diff() == 0
    assert empty.any() == (top_k == 1)
    assert (actual["d_gate_up_weight"][empty] == 0).all()
    assert (actual["d_down_weight"][empty] == 0).all()


@pytest.mark.parametrize("recompute", [True, False])
def test_no_tokens(recompute, device):
    problem = random_problem((0, 4, 2, 16, 24), torch.float32, device)
    actual = run(moe_mlp, problem, recompute=recompute)
    assert_same_bits(actual, run(moe_mlp_reference, problem))


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputing_gives_the_same_bits(dtype, device):
    problem = random_problem((140, 3, 2, 24, 40), dtype, device)
    assert_same_bits(run(moe_mlp, problem, recompute=True), run(moe_mlp, problem, recompute=False))


def test_recomputing_keeps_less(device):
    problem = random_problem((30, 3, 2, 16, 40), torch.float32, device)

    def kept(recompute):
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        x = problem.x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            moe_mlp(x, problem.routing, *problem[2:4], recompute=recompute)
        return sum(sizes.values())

    assert kept(recompute=False) - kept(recompute=True) == 30 * 2 * 40


def test_two_runs_give_the_same_bits(device):
    problem = random_problem((140, 3, 2, 24, 40), torch.float16, device)
    assert_same_bits(run(moe_mlp, problem), run(moe_mlp, problem))


def test_order_of_tokens_does_not_matter(device):
    problem = random_problem((90, 4, 2, 16, 24), torch.float32, device)
    logits = torch.randn(90, 4, generator=torch.Generator().manual_seed(5)).to(device)
    shuffle = torch.randperm(90, generator=torch.Generator().manual_seed(6)).to(device)
    weights = problem.gate_up_weight, problem.down_weight
    out = moe_mlp(problem.x, moe_route(logits, 2), *weights)
    shuffled = moe_mlp(problem.x[shuffle], moe_route(logits[shuffle], 2), *weights)
    if device.type == "cuda":
        assert torch.equal(shuffled, out[shuffle])
    else:  # NumPy's matmul, in the interpreter, may round a row by its position in the tile
        torch.testing.assert_close(shuffled, out[shuffle], rtol=1e-5, atol=1e-6)


def test_inputs_and_gradients_need_not_be_contiguous(device):
    problem = random_problem((50, 4, 2, 16, 24), torch.float32, device)
    expected = run(moe_mlp, problem)
    wide = torch.zeros(50, 40, device=device)
    wide[:, 8:24] = problem.x
    for x in (wide[:, 8:24], problem.x.t().contiguous().t()):
        x = x.detach().requires_grad_()
        out = moe_mlp(x, problem.routing, problem.gate_up_weight, problem.down_weight)
        d_out = problem.d_out.t().contiguous().t()
        assert torch.equal(out, expected["out"])
        assert torch.equal(torch.autograd.grad(out, x, d_out)[0], expected["d_x"])
    ones = run(moe_mlp, problem._replace(d_out=torch.ones_like(problem.d_out)))
    expanded = torch.ones((), device=device).expand(50, 16)
    assert_same_bits(run(moe_mlp, problem._replace(d_out=expanded)), ones)


def test_gradient_is_the_derivative(device):
    problem = random_problem((7, 3, 2, 6, 5), torch.float32, device)
    gradients = run(moe_mlp, problem)
    points = {
        "d_x": problem.x,
        "d_routing_weights": problem.routing.weights,
        "d_gate_up_weight": problem.gate_up_weight,
        "d_down_weight": problem.down_weight,
    }

    def objective(**moved):
        at = {**points, **moved}
        routing = problem.routing._replace(weights=at["d_routing_weights"])
        out = moe_mlp(at["d_x"], routing, at["d_gate_up_weight"], at["d_down_weight"])
        return (out * problem.d_out).sum().item()

    step = 1e-2
    for name, point in points.items():
        for seed in range(3):
            direction = torch.randn(point.shape, generator=torch.Generator().manual_seed(seed))
            direction = direction.to(device)
            ahead = objective(**{name: point + step * direction})
            behind = objective(**{name: point - step * direction})
            expected = (gradients[name] * direction).sum().item()
            assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_matches_mixtral(device):
    """The router, the experts and their gradients are as in transformers' MixtralSparseMoeBlock."""
    config = MixtralConfig(
        hidden_size=24, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config).to(device)
    parameters = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(3, 11, 24, device=device, requires_grad=True)
    d_out = torch.randn(3, 11, 24, device=device)

    expected = block(x)
    expected_gradients = torch.autograd.grad(expected, (x, *parameters), d_out)
    tokens = x.view(33, 24)
    routing = moe_route(tokens @ block.gate.weight.T, 2)
    out = moe_mlp(tokens, routing, block.experts.gate_up_proj, block.experts.down_proj).view_as(x)
    gradients = torch.autograd.grad(out, (x, *parameters), d_out)
    torch.testing.assert_close(out, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_compiles_without_graph_breaks(device):
    """Routing and experts are in one graph, as a layer calls them."""

    def layer(x, router_weight, gate_up_weight, down_weight):
        routing = moe_route((x @ router_weight.T).float(), 2)
        out = moe_mlp(x, routing, gate_up_weight, down_weight)
        return out, routing.load_balancing_loss

    problem = random_problem((65, 4, 2, 16, 24), torch.float16, device)
    router_weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    inputs = [
        tensor.detach().clone().requires_grad_()
        for tensor in (
            problem.x,
            router_weight.to(problem.x),
            problem.gate_up_weight,
            problem.down_weight,
        )
    ]
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for call in (layer, compiled):
        out, loss = call(*inputs)
        gradients = torch.autograd.grad((out, loss), inputs, (problem.d_out, torch.ones_like(loss)))
        results.append((out, loss, *gradients))
    for eager, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, eager)


@pytest.mark.parametrize("recompute", [True, False])
def test_opcheck(recompute, device):
    problem = random_problem((20, 4, 2, 16, 24), torch.float32, device)
    routing = problem.routing
    inputs = [
        tensor.requires_grad_()
        for tensor in (problem.x, routing.weights, problem.gate_up_weight, problem.down_weight)
    ]
    x, routing_weights, *weights = inputs
    arguments = (x, routing_weights, routing.order, routing.offsets, *weights, recompute)
    torch.library.opcheck(torch.ops.hamner.moe_mlp.default, arguments)
    with torch.no_grad():
        _, gate_up, hidden = torch.ops.hamner.moe_mlp(*arguments)
    arguments = (
        *(problem.d_out, x.detach(), routing_weights.detach(), routing.order, routing.offsets),
        *(gate_up, hidden, *(weight.detach() for weight in weights), recompute),
    )
    torch.library.opcheck(torch.ops.hamner.moe_mlp_backward.default, arguments)


@pytest.mark.gpu
def test_never_waits_for_the_device(device):
    problem = random_problem((1000, 4, 2, 128, 256), torch.bfloat16, device)
    run(moe_mlp, problem)
    with no_waiting():
        run(moe_mlp, problem)


@pytest.mark.gpu
@pytest.mark.xdist_group("most of the GPU's memory")
def test_more_than_2_to_the_31_elements(device):
    """gate_up has 2.5e9 elements; the last tokens come out as they do on their own."""
    problem = random_problem((400_000, 2, 2, 64, 1536), torch.bfloat16, device)
    last = slice(-300, None)
    actual = run(moe_mlp, problem)
    # K = E: every token goes to both experts, so that any part of the tokens routes itself.
    tail_logits = torch.zeros(300, 2, device=device)
    tail_routing = moe_route(tail_logits, 2)
    order = problem.routing.experts[last].long().argsort(dim=1)
    weights = problem.routing.weights[last].gather(1, order)
    tail = problem._replace(
        x=problem.x[last],
        routing=tail_routing._replace(weights=weights),
        d_out=problem.d_out[last],
    )
    expected = run(moe_mlp_reference, tail)
    exact = run(moe_mlp_reference, tail, torch.float64)
    for name in ("out", "d_x"):
        assert_as_accurate_as_torch(name, actual[name][last], expected[name], exact[name])


@pytest.mark.parametrize(
    ("argument", "change", "error", "named"),
    [
        ("x", lambda x: x[0], ValueError, "x"),
        ("x", lambda x: x.double(), TypeError, "gate_up_weight"),
        ("x", lambda x: x[:, :7], ValueError, "gate_up_weight"),
        ("x", lambda x: x[:5], ValueError, "routing.weights"),
        ("gate_up_weight", lambda weight: weight[:, :15], ValueError, "gate_up_weight"),
        ("gate_up_weight", lambda weight: weight[0], ValueError, "gate_up_weight"),
        ("gate_up_weight", lambda weight: weight.half(), TypeError, "gate_up_weight"),
        ("gate_up_weight", lambda w: w.mT.contiguous().mT, ValueError, "gate_up_weight"),
        ("down_weight", lambda weight: weight[:3], ValueError, "down_weight"),
        ("down_weight", lambda weight: weight.half(), TypeError, "down_weight"),
        ("down_weight", lambda w: w.mT.contiguous().mT, ValueError, "down_weight"),
        ("down_weight", lambda weight: weight.to("meta"), ValueError, "down_weight"),
        ("weights", lambda weights: weights.half(), TypeError, "routing.weights"),
        ("weights", lambda weights: weights[:, :1], ValueError, "routing.order"),
        ("order", lambda order: order.long(), TypeError, "routing.order"),
        ("order", lambda order: order[1:], ValueError, "routing.order"),
        ("offsets", lambda offsets: offsets[1:], ValueError, "routing.offsets"),
    ],
)
def test_wrong_arguments_are_named(argument, change, error, named, device):
    problem = random_problem((6, 4, 2, 8, 8), torch.float32, device)
    if argument in Routing._fields:
        changed = change(getattr(problem.routing, argument))
        problem = problem._replace(routing=problem.routing._replace(**{argument: changed}))
    else:
        problem = problem._replace(**{argument: change(getattr(problem, argument))})
    with pytest.raises(error, match=rf"^{named} (is|has) "):
        moe_mlp(problem.x, problem.routing, problem.gate_up_weight, problem.down_weight)


def test_unsupported_dtype_is_named(device):
    problem = random_problem((6, 4, 2, 8, 8), torch.float64, device)
    with pytest.raises(TypeError, match="x is torch.float64"):
        moe_mlp(problem.x, problem.routing, problem.gate_up_weight, problem.down_weight)
