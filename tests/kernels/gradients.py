"""What the kernel tests do to every op: outputs and gradients against the reference at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.accuracy import assert_as_accurate_as_torch

# The interpreter's bf16 is wrong, so on the CPU fp16 stands for both half precisions.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if torch.cuda.is_available() else ())

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def outputs_and_gradients(op: Op, inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Run op on the inputs, in order, and differentiate a random projection of its outputs.

    The projection depends on the outputs' shapes and the seed alone, so that two implementations,
    and two dtypes, are asked for the same gradients. Inputs that require no gradient get none.
    """
    leaves = {
        name: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }
    outputs = op(*leaves.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    projections = [
        # Rounded to the shortest format, so that it is the same number in every dtype.
        torch.randn(output.shape, generator=generator).bfloat16().to(output)
        for output in outputs
    ]
    torch.autograd.backward(outputs, projections)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad is not None, f"{name} got no gradient"
            results[f"gradient of {name}"] = leaf.grad
    return results


def _to_double(x):
    is_float = isinstance(x, Tensor) and x.is_floating_point()
    return x.detach().double().requires_grad_(x.requires_grad) if is_float else x


def assert_matches_reference(
    op: Op, reference: Op, inputs: dict[str, Tensor], **criterion: float
) -> None:
    """Compare op with its reference: outputs and gradients, both against the reference in fp64.

    `criterion` goes to `assert_as_accurate_as_torch`.
    """
    actual = outputs_and_gradients(op, inputs)
    same_dtype = outputs_and_gradients(reference, inputs)
    exact = outputs_and_gradients(reference, {name: _to_double(x) for name, x in inputs.items()})
    assert actual.keys() == exact.keys()
    for name in exact:
        assert_as_accurate_as_torch(name, actual[name], same_dtype[name], exact[name], **criterion)


def assert_same_bits(op: Op, other: Op, inputs: dict[str, Tensor]) -> None:
    """Assert that two functions, or two runs of one, give the same outputs and gradients."""
    results, other_results = (outputs_and_gradients(f, inputs) for f in (op, other))
    for name, result in results.items():
        assert torch.equal(result, other_results[name]), f"{name} differs"


def assert_replays_as_a_cuda_graph(op: Op, inputs: dict[str, Tensor]) -> None:
    """Assert that a CUDA graph of op and its backward gives the gradients that launches give."""
    leaves = [x for x in inputs.values() if x is not None and x.requires_grad]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad([out.sum() for out in op(*inputs.values())], leaves)

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(map(torch.equal, captured, expected))


def compiled(op: Op) -> Op:
    """Compile op as one graph; on the CPU, whose Inductor needs a C++ compiler, by AOT alone."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(op, fullgraph=True, backend=backend)


def assert_derivative(op: Op, inputs: dict[str, Tensor], *, rtol: float = 1e-3) -> None:
    """Compare the fp32 gradients with a central difference along a random direction."""
    generator = torch.Generator().manual_seed(1)
    directions = {
        name: torch.randn(x.shape, generator=generator).to(x)
        for name, x in inputs.items()
        if isinstance(x, Tensor) and x.requires_grad
    }

    def moved(distance: float) -> Tensor:
        at = {
            name: x.detach() + distance * directions[name] if name in directions else x
            for name, x in inputs.items()
        }
        outputs = op(*at.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        projection = torch.Generator().manual_seed(0)
        return sum(
            (
                torch.randn(output.shape, generator=projection).bfloat16().to(output).double()
                * output.double()
            ).sum()
            for output in outputs
        )

    results = outputs_and_gradients(op, inputs)
    slope = sum(
        (results[f"gradient of {name}"].double() * direction.double()).sum()
        for name, direction in directions.items()
    )
    step = 1e-2
    difference = (moved(step) - moved(-step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=rtol, atol=rtol)
