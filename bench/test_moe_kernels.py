"""Mixture-of-experts kernels stand beside torch._grouped_mm and plain torch, at option c's shape.

    pytest bench/test_moe_kernels.py --benchmark-only

Each row first compares its output with fp32 plain torch, and is not timed if they disagree. Medians
with 10th and 90th percentiles and TFLOP/s, or GB/s of what must move, are in the row's extra_info
(`--benchmark-json`); pytest-benchmark's own columns include the launch from Python and a wait for
the GPU.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from bench import scale
from bench.record import record
from hamner.kernels.grouped_matmul import (
    Pairs,
    launch_gate_up,
    launch_grouped_matmul,
    launch_swiglu_grad,
    launch_weight_grad,
    moe_mlp,
    moe_mlp_reference,
)
from hamner.kernels.moe_routing import Routing, moe_route, moe_route_reference
from hamner.kernels.router_linear import router_linear, router_linear_reference
from hamner.plan import costs
from hamner.plan.costs import Cost

pytestmark = [pytest.mark.needs_gpu, pytest.mark.usefixtures("keep_graphs")]

N, E, K, D, I = scale.pick((24_576, 4, 2, 768, 1536), (32, 4, 2, 64, 96))  # noqa: E741
M = N * K
DEVICE, DTYPE = scale.device(), scale.dtype()
MAX_RELATIVE_ERROR = 0.02  # of norms: bf16 keeps 8 bits, and backward rounds some steps in between


class Case(NamedTuple):
    """A case is what is timed, what it must agree with, and the work."""

    call: Callable[[], Tensor | tuple[Tensor, ...]]
    expected: Callable[[], Tensor | tuple[Tensor, ...]]
    cost: Cost = Cost()


class Problem(NamedTuple):
    logits: Tensor  # (N, E) fp32
    x: Tensor  # (N, D)
    router_weight: Tensor  # (E, D)
    gate_up_weight: Tensor  # (E, 2I, D)
    down_weight: Tensor  # (E, D, I)
    d_out: Tensor  # (N, D)

    def cast(self, dtype: torch.dtype) -> "Problem":
        """The method gives leaves that require gradients, in another dtype; the logits stay
        fp32."""
        return Problem(
            *(
                tensor.detach().to(torch.float32 if name == "logits" else dtype).requires_grad_()
                for name, tensor in self._asdict().items()
            )
        )


@pytest.fixture(scope="module")
def problem() -> Problem:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    return Problem(
        logits=randn(N, E),
        x=randn(N, D).to(DTYPE),
        router_weight=(randn(E, D) / D**0.5).to(DTYPE),
        gate_up_weight=(randn(E, 2 * I, D) / D**0.5).to(DTYPE),
        down_weight=(randn(E, D, I) / I**0.5).to(DTYPE),
        d_out=randn(N, D).to(DTYPE),
    )


def grouped_mm_mlp(x: Tensor, routing: Routing, gate_up_weight: Tensor, down_weight: Tensor):
    """The peer is torch._grouped_mm between a gather and a scatter, as in transformers' Mixtral."""
    order = routing.order.long()
    gathered = x[order // K]
    gate, up = torch._grouped_mm(gathered, gate_up_weight.mT, offs=routing.offsets[1:]).chunk(2, -1)
    rows = torch._grouped_mm(silu(gate) * up, down_weight.mT, offs=routing.offsets[1:])
    rows = rows * routing.weights.flatten()[order, None].to(rows.dtype)
    slots = torch.empty_like(rows).index_copy(0, order, rows)
    return slots.view(N, K, D).sum(dim=1)


MLPS = {"hamner": moe_mlp, "grouped_mm": grouped_mm_mlp, "loop": moe_mlp_reference}
PEERS = ("grouped_mm", "loop")
ROUTES = {
    "hamner": moe_route,
    "torch": moe_route_reference,
    "compiled": scale.compiled(moe_route_reference),
}

ROUTER_LINEARS = {
    "hamner": router_linear,
    "torch": router_linear_reference,
    "compiled": scale.compiled(router_linear_reference),
}


def route_case(implementation: str, direction: str, problem: Problem) -> Case:
    def run(route: Callable, problem: Problem) -> tuple[Tensor, ...]:
        routing = route(problem.logits, K)
        return routing.weights, routing.load_balancing_loss, routing.z_loss

    def call(route: Callable) -> Callable:
        cast = problem.cast(DTYPE)
        return in_direction(direction, lambda: run(route, cast), (cast.logits,))

    return Case(call(ROUTES[implementation]), call(moe_route_reference))


def router_linear_case(implementation: str, direction: str, problem: Problem) -> Case:
    def call(function: Callable, dtype: torch.dtype) -> Callable:
        cast = problem.cast(dtype)
        inputs = (cast.x, cast.router_weight)
        return in_direction(direction, lambda: (function(*inputs),), inputs)

    # Without its FLOPs, which are not of the tensor cores, whose ceiling they would be held to.
    cost = costs.router_linear(N, D, E, DTYPE.itemsize, backward=direction == "backward")
    return Case(
        call(ROUTER_LINEARS[implementation], DTYPE),
        call(router_linear_reference, torch.float32),
        Cost(bytes=cost.bytes),
    )


def mlp_case(implementation: str, direction: str, problem: Problem) -> Case:
    routing = moe_route(problem.logits, K)
    shape = {"width": D, "inner": I, "experts": E}
    cost = costs.moe_mlp(N * D, M, backward=direction == "backward", **shape)

    def call(mlp: Callable, dtype: torch.dtype) -> Callable:
        cast = problem.cast(dtype)
        weights = routing.weights.detach().clone().requires_grad_()
        inputs = (cast.x, weights, cast.gate_up_weight, cast.down_weight)
        own = routing._replace(weights=weights)
        return in_direction(
            direction, lambda: (mlp(cast.x, own, cast.gate_up_weight, cast.down_weight),), inputs
        )

    return Case(
        call(MLPS[implementation], DTYPE),
        call(moe_mlp_reference, torch.float32),
        cost,
    )


def in_direction(direction: str, forward: Callable, inputs: tuple[Tensor, ...]) -> Callable:
    """The function gives `forward` itself, or a call that differentiates what it returned."""
    if direction == "forward":
        return forward
    outputs = forward()
    generator = torch.Generator(DEVICE).manual_seed(1)
    gradients = [
        torch.randn(out.shape, generator=generator, device=DEVICE).to(out.dtype) for out in outputs
    ]
    return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def activations(problem: Problem, routing: Routing) -> tuple[Tensor, Tensor]:
    """The stages read beside the problem hidden (M, I) and d_gate_up (M, 2I)."""
    pairs = Pairs(routing.order, routing.offsets, K)
    gate_up, hidden = launch_gate_up(problem.x, routing.weights, pairs, problem.gate_up_weight)
    d_hidden = launch_grouped_matmul(
        problem.d_out, problem.down_weight, pairs, gather=True, transposed=False
    )
    d_gate_up, _ = launch_swiglu_grad(
        gate_up, d_hidden, routing.weights, routing.order, recompute=False
    )
    return hidden, d_gate_up


def loop_over_experts(routing: Routing, rows: Tensor, weight: Tensor) -> Tensor:
    """The rows (M, inner) are multiplied by weight (E, inner, columns), in fp32."""
    bounds = routing.offsets.tolist()
    pieces = [
        rows[start:end].float() @ weight[expert].float()
        for expert, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    return torch.cat(pieces)


def loop_over_weight_grads(routing: Routing, d_rows: Tensor, rows: Tensor) -> Tensor:
    """The gradient of each expert's weight is computed by itself, in fp32."""
    bounds = routing.offsets.tolist()
    return torch.stack(
        [
            d_rows[start:end].float().T @ rows[start:end].float()
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]
    )


def stages_of(problem: Problem) -> dict[str, tuple[Callable, Callable, Callable, Cost]]:
    """The grouped matmuls come by stage: ours, torch's, what both must agree with, and the work."""
    routing = moe_route(problem.logits, K)
    order = routing.order.long()
    tokens, ends = order // K, routing.offsets[1:]
    gate_up_weight, down_weight = problem.gate_up_weight, problem.down_weight
    x, d_out = problem.x, problem.d_out
    hidden, d_gate_up = activations(problem, routing)
    pairs = Pairs(routing.order, routing.offsets, K)
    gate_up = functools.partial(launch_gate_up, routing_weights=routing.weights, pairs=pairs)
    matmul = functools.partial(launch_grouped_matmul, pairs=pairs)
    weight_grad = functools.partial(launch_weight_grad, pairs=pairs)
    loop = functools.partial(loop_over_experts, routing)
    loop_weight_grad = functools.partial(loop_over_weight_grads, routing)

    def by_pair(rows: Tensor) -> Tensor:
        return torch.empty_like(rows).index_copy_(0, order, rows)

    gate_up_cost = costs.matmul(M, D, 2 * I, experts=E)
    down_cost = costs.matmul(M, I, D, experts=E)
    return {
        "gate_up": (
            lambda: gate_up(x, gate_up_weight=gate_up_weight)[0],
            lambda: torch._grouped_mm(x[tokens], gate_up_weight.mT, offs=ends),
            lambda: loop(x[tokens], gate_up_weight.mT),
            gate_up_cost,
        ),
        "down": (
            lambda: matmul(hidden, weight=down_weight, gather=False, transposed=True),
            lambda: by_pair(torch._grouped_mm(hidden, down_weight.mT, offs=ends)),
            lambda: by_pair(loop(hidden, down_weight.mT)),
            down_cost,
        ),
        "d_hidden": (
            lambda: matmul(d_out, weight=down_weight, gather=True, transposed=False),
            lambda: torch._grouped_mm(d_out[tokens], down_weight, offs=ends),
            lambda: loop(d_out[tokens], down_weight),
            down_cost,
        ),
        "d_x": (
            lambda: matmul(d_gate_up, weight=gate_up_weight, gather=False, transposed=False),
            lambda: by_pair(torch._grouped_mm(d_gate_up, gate_up_weight, offs=ends)),
            lambda: by_pair(loop(d_gate_up, gate_up_weight)),
            gate_up_cost,
        ),
        "d_down_weight": (
            lambda: weight_grad(d_out, inputs=hidden, gather_d_out=True),
            lambda: torch._grouped_mm(d_out[tokens].T, hidden, offs=ends),
            lambda: loop_weight_grad(d_out[tokens], hidden),
            down_cost,
        ),
        "d_gate_up_weight": (
            lambda: weight_grad(d_gate_up, inputs=x, gather_d_out=False),
            lambda: torch._grouped_mm(d_gate_up.T, x[tokens], offs=ends),
            lambda: loop_weight_grad(d_gate_up, x[tokens]),
            gate_up_cost,
        ),
    }


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def measure(benchmark, ceilings, case: Case, **names: str) -> None:
    """The function compares the outputs, then times."""
    for actual, expected in zip(_tensors(case.call()), _tensors(case.expected()), strict=True):
        error = (actual.float() - expected.float()).norm() / expected.float().norm()
        assert error <= MAX_RELATIVE_ERROR, f"not timed: the output is off by {error:.1%}"
    record(benchmark, case.call, ceilings, **names, cost=case.cost)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("implementation", ROUTER_LINEARS)
def test_router_linear(implementation, direction, problem, benchmark, ceilings):
    case = router_linear_case(implementation, direction, problem)
    op = f"router_linear {direction}"
    measure(benchmark, ceilings, case, op=op, implementation=implementation)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("implementation", ROUTES)
def test_route(implementation, direction, problem, benchmark, ceilings):
    case = route_case(implementation, direction, problem)
    op = f"moe_route {direction}"
    measure(benchmark, ceilings, case, op=op, implementation=implementation)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "implementation", [pytest.param("hamner", marks=pytest.mark.quick), *PEERS]
)
def test_mlp(implementation, direction, problem, benchmark, ceilings):
    case = mlp_case(implementation, direction, problem)
    op = f"moe_mlp {direction}"
    measure(benchmark, ceilings, case, op=op, implementation=implementation)


@pytest.mark.parametrize("implementation", ["hamner", "grouped_mm"])
@pytest.mark.parametrize(
    "stage", ["gate_up", "down", "d_hidden", "d_x", "d_down_weight", "d_gate_up_weight"]
)
def test_stage(stage, implementation, problem, benchmark, ceilings):
    ours, grouped_mm, expected, cost = stages_of(problem)[stage]
    case = Case(ours if implementation == "hamner" else grouped_mm, expected, cost)
    measure(benchmark, ceilings, case, op=f"moe {stage}", implementation=implementation)
