"""The dense kernels stand beside plain torch, eager and compiled, and Liger, at option A's shapes.

"eager" is the op's reference (fp32 inside), "compiled" the same through torch.compile.

Every row is first compared with eager torch, and not timed if it disagrees. Times are medians of a
CUDA graph's replays (bench/timing.py; L2 cleared between them), or of launches where an op waits
for the GPU. `extra_info` says which, and holds them with their 10th and 90th percentiles, the GB/s
or TFLOP/s they mean for what the op must move or compute, and the peak memory of one call.
pytest-benchmark's own columns are wall time with a synchronisation.

    pytest bench/test_dense_kernels.py --benchmark-only --benchmark-json=dense.json
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch.optim import adamw as torch_adamw

from bench import scale
from bench.record import record
from hamner.kernels.adamw import adamw_, adamw_reference_, join_master, split_master
from hamner.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from hamner.kernels.embedding import tied_embedding, tied_embedding_reference
from hamner.kernels.fused_linear import (
    add_rms_norm_linear,
    add_rms_norm_linear_reference,
    swiglu_linear,
    swiglu_linear_reference,
)
from hamner.kernels.qk_norm import qk_norm_rope, qk_norm_rope_reference
from hamner.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from hamner.kernels.rope import rope_packed_, rope_reference
from hamner.kernels.swiglu import swiglu, swiglu_reference
from hamner.plan import costs
from hamner.plan.costs import Cost

pytestmark = [pytest.mark.needs_gpu, pytest.mark.usefixtures("keep_graphs")]

N, D, INTERMEDIATE, V, T = scale.pick((24_576, 1024, 2816, 49_152, 1024), (32, 64, 96, 128, 16))
HEADS, KV_HEADS, HEAD_DIM = scale.pick((16, 4, 64), (4, 2, 16))
LAYERS = scale.pick(24, 1)
DEVICE, DTYPE = scale.device(), scale.dtype()
ELEMENT = DTYPE.itemsize
TOKENS_COMPARED = scale.pick(1024, 32)
QUICK = {("hamner", way) for way in ("forward", "backward", "both")} | {("compiled", "forward")}


def randn(*shape: int, dtype: torch.dtype = DTYPE, std: float = 1.0) -> torch.Tensor:
    return (std * torch.randn(shape, device=DEVICE)).to(dtype)


def text_like(num_tokens: int) -> torch.Tensor:
    """The function gives tokens of which a few are very frequent and most are rare, always the
    same; on the CPU."""
    ranks = torch.rand(num_tokens, generator=torch.Generator().manual_seed(0))
    return (V**ranks).long() - 1


def liger_functional(name: str) -> Callable:
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def liger_rms_norm(x, weight):
    return liger_functional("liger_rms_norm")(x, weight, 1e-5, in_place=False)


def liger_add_rms_norm(x, residual, weight):
    return liger_functional("liger_fused_add_rms_norm")(x, residual, weight, 1e-5, in_place=False)


def liger_swiglu(gate, up):
    return liger_functional("liger_swiglu")(gate, up)


def liger_linear_cross_entropy(hidden, weight, targets):
    return liger_functional("liger_fused_linear_cross_entropy")(hidden, weight, targets)


@dataclass(frozen=True)
class Case:
    """A case is an op, its torch reference, Liger's version, and what each direction must move or
    compute.

    A direction is "forward", "backward" or, where gradients are formed in forward, "both".
    `liger_inputs` lays the inputs out as Liger's users have them, outside the timing.
    """

    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    op: Callable
    reference: Callable
    liger: Callable | None = None
    liger_inputs: Callable[..., tuple[torch.Tensor, ...]] = lambda *inputs: inputs
    costs: dict[str, Cost] = field(default_factory=dict)
    """of each direction; an op with matmuls is held to its FLOPs, another to its bytes"""
    constants: int = 0
    """of the inputs, so many last ones get no gradient"""


def both_ways(cost: Callable[..., Cost], elements: int, **how: bool) -> dict[str, Cost]:
    """The function gives the costs of an op whose backward its cost knows."""
    return {
        "forward": cost(elements, ELEMENT, **how),
        "backward": cost(elements, ELEMENT, backward=True, **how),
    }


def matmul_and_gradients(k: int, n: int) -> dict[str, Cost]:
    """The function gives the costs of N rows."""
    cost = costs.matmul(N, k, n, ELEMENT)
    return {"forward": cost, "backward": cost + cost}


def rotary_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """The function gives cos and sin of some angles, (T, HEAD_DIM / 2) fp32."""
    angles = torch.rand(T, HEAD_DIM // 2, device=DEVICE)
    return angles.cos(), angles.sin()


CASES = {
    "rms_norm": Case(
        inputs=lambda n: (randn(n, D), randn(D, dtype=torch.float32)),
        op=rms_norm,
        reference=rms_norm_reference,
        liger=liger_rms_norm,
        costs=both_ways(costs.rms_norm, N * D),
    ),
    "add_rms_norm": Case(
        inputs=lambda n: (randn(n, D), randn(n, D), randn(D, dtype=torch.float32)),
        op=add_rms_norm,
        reference=add_rms_norm_reference,
        liger=liger_add_rms_norm,
        costs=both_ways(costs.rms_norm, N * D, adds_residual=True),
    ),
    "swiglu": Case(
        inputs=lambda n: (randn(n, 2 * INTERMEDIATE),),
        op=swiglu,
        reference=swiglu_reference,
        liger=liger_swiglu,
        liger_inputs=lambda gate_up: tuple(x.contiguous() for x in gate_up.chunk(2, dim=-1)),
        costs=both_ways(costs.swiglu, N * INTERMEDIATE),
    ),
    "qk_norm_rope": Case(
        inputs=lambda n: (
            randn(n // T, T, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
            randn(HEAD_DIM, dtype=torch.float32),
            randn(HEAD_DIM, dtype=torch.float32),
            *rotary_tables(),
        ),
        constants=2,
        op=functools.partial(qk_norm_rope, num_heads=HEADS, num_kv_heads=KV_HEADS),
        reference=functools.partial(qk_norm_rope_reference, num_heads=HEADS, num_kv_heads=KV_HEADS),
        costs=both_ways(costs.qk_norm_rope, N * (HEADS + KV_HEADS) * HEAD_DIM),
    ),
    "add_rms_norm_linear": Case(
        inputs=lambda n: (
            randn(n, D),
            randn(n, D),
            randn(D, dtype=torch.float32),
            randn(2 * INTERMEDIATE, D, std=D**-0.5),
        ),
        op=add_rms_norm_linear,
        reference=add_rms_norm_linear_reference,
        costs=matmul_and_gradients(D, 2 * INTERMEDIATE),
    ),
    "swiglu_linear": Case(
        inputs=lambda n: (
            randn(n, 2 * INTERMEDIATE),
            randn(D, INTERMEDIATE, std=INTERMEDIATE**-0.5),
        ),
        op=swiglu_linear,
        reference=swiglu_linear_reference,
        costs=matmul_and_gradients(INTERMEDIATE, D),
    ),
    "tied_embedding": Case(
        inputs=lambda n: (text_like(n).to(DEVICE), randn(V, D)),
        op=tied_embedding,
        reference=tied_embedding_reference,
        costs={
            "backward": costs.tied_embedding_backward(N, len(text_like(N).unique()), D, ELEMENT)
        },
    ),
    "linear_cross_entropy": Case(
        inputs=lambda n: (
            randn(n, D),
            randn(V, D, std=D**-0.5),
            torch.randint(V, (n,), device=DEVICE),
        ),
        op=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        liger=liger_linear_cross_entropy,
        costs={"both": costs.linear_cross_entropy(N, D, V, ELEMENT)},
    ),
}
IMPLEMENTATIONS = ("hamner", "eager", "compiled", "liger")


def implementation_of(case: Case, name: str) -> Callable:
    """The function to time, or a skip that says why there is none."""
    if name == "liger":
        if case.liger is None:
            pytest.skip("Liger has no such op")
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
        if scale.SMOKE:
            pytest.skip("Liger's kernels need a GPU")
        return case.liger
    if name == "compiled":
        torch.compiler.reset()
        return scale.compiled(case.reference)
    return case.op if name == "hamner" else case.reference


class Call:
    """A function on inputs of its own, with fixed upstream gradients."""

    def __init__(self, case: Case, function: Callable, num_tokens: int):
        torch.manual_seed(0)
        self.function = function
        self.inputs = case.inputs(num_tokens)
        if function is case.liger:
            self.inputs = case.liger_inputs(*self.inputs)
        variables = self.inputs[: len(self.inputs) - case.constants]
        self.leaves = [x for x in variables if x.is_floating_point()]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.outputs = self.forward()
        self.gradients = [torch.randn_like(output) for output in self.outputs]

    def forward(self) -> tuple[torch.Tensor, ...]:
        outputs = self.function(*self.inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.outputs, self.leaves, self.gradients, retain_graph=True)

    def both(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.gradients)


def assert_agrees(case: Case, function: Callable) -> None:
    """What does not compute the same as eager torch, in bf16's precision, is not timed."""
    call, expected = (Call(case, f, TOKENS_COMPARED) for f in (function, case.reference))
    gradients = call.backward()
    if function is liger_swiglu:
        gradients = (torch.cat(gradients, dim=-1),)
    pairs = [*zip(call.outputs, expected.outputs, strict=True)]
    pairs += zip(gradients, expected.backward(), strict=True)
    for i, (result, wanted) in enumerate(pairs):
        error = (result.float() - wanted.float()).abs().max().item()
        assert error <= 0.02 * wanted.float().abs().max().item(), f"result {i} is off by {error}"


ROWS = [
    pytest.param(
        name,
        direction,
        implementation,
        marks=[pytest.mark.quick] if (implementation, direction) in QUICK else [],
    )
    for name, case in CASES.items()
    for direction in case.costs
    for implementation in IMPLEMENTATIONS
]


@pytest.mark.parametrize(("name", "direction", "implementation"), ROWS)
def test_op(benchmark, ceilings, name, direction, implementation):
    case = CASES[name]
    function = implementation_of(case, implementation)
    assert_agrees(case, function)
    try:
        call = Call(case, function, N)
        record(
            benchmark,
            getattr(call, direction),
            ceilings,
            op=f"{name} {direction}",
            implementation=implementation,
            cost=case.costs[direction],
        )
    except torch.OutOfMemoryError:
        pytest.skip("does not fit into this GPU's memory")


def rotation(direction: str, implementation: str, num_tokens: int) -> Callable:
    """The function gives a call that rotates q and k of one batch, or their gradients back.

    It returns both, (B, T, heads, hd) each. Ours and Liger's are in place.
    """
    torch.manual_seed(0)
    packed = randn(num_tokens // T, T, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    cos, sin = rotary_tables()
    heads = packed.unflatten(-1, (-1, HEAD_DIM))
    q, k, _ = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
    is_backward = direction == "backward"

    def ours():
        rope_packed_(
            packed, cos=cos, sin=sin, num_heads=HEADS, num_kv_heads=KV_HEADS, inverse=is_backward
        )
        return q, k

    def ligers(q, k):
        rotate = liger_functional("liger_rope")
        rotated = rotate(q.transpose(1, 2), k.transpose(1, 2), *tables)
        return tuple(x.transpose(1, 2) for x in rotated)

    if implementation == "hamner":
        return ours
    gradients = q.contiguous(), k.contiguous()
    if implementation == "liger":
        # As its users have them: contiguous, and cos and sin for both halves.
        q, k = (x.clone() for x in gradients)
        tables = [torch.cat((table, table), dim=-1)[None] for table in (cos, sin)]
        rotate = ligers
    else:
        reference = rope_reference
        if implementation == "compiled":
            reference = scale.compiled(reference)
        rotate = functools.partial(reference, cos=cos, sin=sin)
    if not is_backward:
        return lambda: rotate(q, k)
    leaves = [x.requires_grad_() for x in (q.detach(), k.detach())]
    outputs = rotate(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_rope(benchmark, ceilings, direction, implementation):
    """By itself; in training option a's backward rotates inside attention's kernels."""
    if implementation == "liger":
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
        if scale.SMOKE:
            pytest.skip("Liger's kernels need a GPU")
    once = rotation(direction, implementation, TOKENS_COMPARED)
    torch.testing.assert_close(once(), rotation(direction, "eager", TOKENS_COMPARED)())
    record(
        benchmark,
        rotation(direction, implementation, N),
        ceilings,
        op=f"rope {direction}",
        implementation=implementation,
        cost=costs.rope(N * (HEADS + KV_HEADS) * HEAD_DIM, ELEMENT),
    )


@pytest.mark.parametrize("implementation", ("hamner", "eager", "compiled", "torch fused"))
def test_adamw(benchmark, ceilings, implementation):
    """Over the matrices of option a.

    Ours on split masters, as the trainer runs it; torch on whole ones, its faster form. Its own
    fused AdamW has the casts around it.
    """
    function = {
        "hamner": adamw_,
        "eager": adamw_reference_,
        "compiled": functools.partial(_one_by_one, scale.compiled(adamw_reference_)),
        "torch fused": _torch_fused_adamw_,
    }[implementation]
    is_split = implementation == "hamner"

    def states(shapes, is_split):
        torch.manual_seed(0)
        columns = [[] for _ in range(5)]
        for shape in shapes:
            master, exp_avg = (randn(*shape, dtype=torch.float32) for _ in range(2))
            weights = split_master(master) if is_split else (master.to(torch.bfloat16), master)
            state = (*weights, randn(*shape), exp_avg, exp_avg.square())
            for column, tensor in zip(columns, state, strict=True):
                column.append(tensor)
        return columns

    scalars = {
        "lr": torch.tensor(1e-3, device=DEVICE),
        "step": torch.tensor(10, device=DEVICE),
        "clip_coef": torch.ones((), device=DEVICE),
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    few = [(TOKENS_COMPARED, D), (D,)]
    compared, expected = states(few, is_split), states(few, False)
    function(*compared, **scalars)
    adamw_reference_(*expected, **scalars)
    params, masters, *rest = compared
    if is_split:
        masters = [join_master(*pair) for pair in zip(params, masters, strict=True)]
    torch.testing.assert_close([params, masters, *rest], expected)

    layer = [((HEADS + 2 * KV_HEADS) * HEAD_DIM, D), (D, D), (2 * INTERMEDIATE, D)]
    shapes = [*([*layer, (D, INTERMEDIATE)] * LAYERS), (V, D)]
    full = states(shapes, is_split)
    parameters = sum(math.prod(shape) for shape in shapes)
    record(
        benchmark,
        lambda: function(*full, **scalars),
        ceilings,
        op="adamw",
        implementation=implementation,
        cost=costs.adamw(parameters, split_master=is_split, gradient_size=ELEMENT),
    )


def _one_by_one(function, *columns, **scalars):
    for state in zip(*columns, strict=True):
        function(*state, **scalars)


def _torch_fused_adamw_(params, masters, grads, exp_avgs, exp_avg_sqs, *, step, clip_coef, **rest):
    """The function is PyTorch's, with the casts that mixed precision needs around it."""
    beta1, beta2 = rest.pop("betas")
    torch_adamw.adamw(
        masters,
        [grad.float() for grad in grads],
        exp_avgs,
        exp_avg_sqs,
        [],
        [step.float() - 1 for _ in masters],
        fused=True,
        grad_scale=clip_coef.reciprocal(),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        maximize=False,
        **rest,
    )
    torch._foreach_copy_(params, masters)
