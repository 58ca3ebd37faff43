"""Int8 matmuls stand beside cuBLAS's bf16, torch._int_mm and fp8, at the linear layers of option a.

    pytest bench/test_int8_matmul.py --benchmark-only --benchmark-json=int8.json

A layer of `in` x `out` has three matmuls over N tokens. `test_matmul` times each on operands that
are quantised already; `test_with_quantisation` times it with the quantisation of activations and
their gradients (not of the weight, which has 1,024 to 5,632 rows beside 24,576); `test_quantise`
times that alone, in GB/s of what must move, and `test_norm_backward` that of a gradient by the norm
which writes it. "hamner" has one scale a row, "hamner grouped" one each
256 of the reduced axis. fp8 is e4m3 through torch._scaled_mm with fast accumulation, quantised by
torch.compile; `_int_mm` stops at int32 sums. `test_matmul_as_8_6` times the code of an RTX 3090,
executed on this GPU, ours and a plain bf16 matmul of the same instructions (bench/mma_matmul.py).

Before a row is timed, a matmul of ours must equal its integer reference to the bit, `_int_mm` the
integer sums, and every result the bf16 one as far as its format allows.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench import scale
from bench.as_capability import as_capability
from bench.mma_matmul import MatmulTile
from bench.mma_matmul import matmul as mma_matmul
from bench.record import record
from hamner.kernels.int8_matmul import int8_matmul, int8_matmul_reference
from hamner.kernels.int8_quantize import (
    Int8Matrix,
    empty_int8,
    quantize_int8,
    quantize_int8_reference,
)
from hamner.kernels.rms_norm import launch_rms_norm_backward
from hamner.plan import costs
from hamner.plan.costs import Cost

pytestmark = [pytest.mark.needs_gpu, pytest.mark.usefixtures("keep_graphs")]

N = scale.pick(24_576, 40)
LAYERS = scale.pick(
    {"qkv": (1024, 1536), "o": (1024, 1024), "gate_up": (1024, 5632), "down": (2816, 1024)},
    {"qkv": (64, 96), "o": (64, 64), "gate_up": (64, 352), "down": (176, 64)},
)
"""in, out"""
MATMULS = ("forward", "data gradient", "weight gradient")
WIDTHS = sorted({width for layer in LAYERS.values() for width in layer})
DEVICE, DTYPE = scale.device(), scale.dtype()
FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max
# Of norms, on normally distributed operands: rounding to int8 is off by about 0.008 of each
# operand's, to e4m3 by 0.026.
MAX_ERROR = {"int8": 0.02, "fp8": 0.05}


class Operand(NamedTuple):
    """An operand is (rows, K), perhaps the transpose of what is in memory."""

    stored: Tensor
    transposed: bool
    is_weight: bool = False

    @property
    def matrix(self) -> Tensor:
        return self.stored.T if self.transposed else self.stored


def operands_of(layer: str, matmul: str) -> tuple[Operand, Operand]:
    """The function gives A and B of A B^T: x or its gradient, and weight or x."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs, outputs = LAYERS[layer]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)

    x, weight, d_out = randn(N, inputs), randn(outputs, inputs), randn(N, outputs)
    return {
        "forward": (Operand(x, False), Operand(weight, False, is_weight=True)),
        "data gradient": (Operand(d_out, False), Operand(weight, True, is_weight=True)),
        "weight gradient": (Operand(d_out, True), Operand(x, True)),
    }[matmul]


def int8(operand: Operand, grouped: bool) -> Int8Matrix:
    return quantize_int8(operand.stored, transposed=operand.transposed, grouped=grouped)


def fp8_tensorwise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The function gives a matrix in fp8, its rows contiguous, and its one scale, (1, 1)."""
    step = matrix.abs().amax().float().reshape(1, 1) / LARGEST_FP8
    return (matrix.float() / step).to(FP8).contiguous(), step


def fp8_rowwise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The function gives a matrix in fp8, its rows contiguous, and a scale a row."""
    steps = matrix.abs().amax(dim=1, keepdim=True).float() / LARGEST_FP8
    return (matrix.float() / steps).to(FP8).contiguous(), steps


def fp8_matmul(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    return torch._scaled_mm(
        a[0], b[0].T, scale_a=a[1], scale_b=b[1].T, out_dtype=DTYPE, use_fast_accum=True
    )


def int_mm(a: Int8Matrix, b: Int8Matrix) -> Tensor:
    return torch._int_mm(a.values, b.values.T)


class Implementation(NamedTuple):
    """An implementation makes what it multiplies of an operand, and multiplies."""

    quantise: Callable[[Operand], tuple[Tensor, ...]]
    multiply: Callable[..., Tensor]
    reference: Callable[..., Tensor] | None = None
    """gives what `multiply` gives, to the bit"""
    accuracy: str = "int8"


def int_mm_reference(a: Int8Matrix, b: Int8Matrix) -> Tensor:
    return (a.values.double() @ b.values.double().T).to(torch.int32)


def fp8(quantise: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Implementation:
    compiled = scale.compiled(quantise)
    return Implementation(lambda operand: compiled(operand.matrix), fp8_matmul, accuracy="fp8")


def ours(grouped: bool) -> Implementation:
    return Implementation(
        partial(int8, grouped=grouped),
        partial(int8_matmul, dtype=DTYPE),
        partial(int8_matmul_reference, dtype=DTYPE),
    )


IMPLEMENTATIONS = {
    "hamner": ours(grouped=False),
    "hamner grouped": ours(grouped=True),
    "_int_mm": Implementation(partial(int8, grouped=False), int_mm, int_mm_reference),
    "fp8 tensorwise": fp8(fp8_tensorwise),
    "fp8 rowwise": fp8(fp8_rowwise),
    "cuBLAS bf16": Implementation(
        lambda operand: (operand.matrix,), lambda a, b: torch.mm(a[0], b[0].T)
    ),
}
BF16_TILE = MatmulTile(128, 128, 32, 4, 4)
AS_8_6 = {
    **{name: IMPLEMENTATIONS[name] for name in ("hamner", "hamner grouped")},
    "mma.sync bf16": Implementation(
        lambda operand: (operand.matrix.contiguous(), operand.matrix.T.contiguous()),
        lambda a, b: mma_matmul(a[0], b[1], BF16_TILE),
    ),
}
QUANTISED = ("hamner", "hamner grouped", "fp8 tensorwise", "fp8 rowwise")
QUICK = {("hamner", "gate_up", "forward")}
"""of `test_matmul`"""


def assert_agrees(name: str, operands: tuple[Operand, Operand]) -> None:
    """What does not compute the product of its operands is not timed."""
    implementation = (IMPLEMENTATIONS | AS_8_6)[name]
    a, b = (implementation.quantise(operand) for operand in operands)
    result = implementation.multiply(a, b)
    if implementation.reference is not None:
        assert torch.equal(result, implementation.reference(a, b)), "not timed: other bits"
    if name != "_int_mm":
        expected = (operands[0].matrix @ operands[1].matrix.T).float()
        error = (result.float() - expected).norm() / expected.norm()
        assert error <= MAX_ERROR[implementation.accuracy], f"not timed: off by {error:.1%}"


def skip_fp8_on_the_cpu(implementation: str) -> None:
    if scale.SMOKE and implementation.startswith("fp8"):
        pytest.skip("_scaled_mm needs a GPU")


def rows(implementations: Iterable[str], quick: Collection[tuple[str, str, str]] = ()) -> list:
    """The function gives the parameters of rows, those of --quick marked."""
    return [
        pytest.param(*row, marks=[pytest.mark.quick] if row in quick else [])
        for layer in LAYERS
        for matmul in MATMULS
        for row in ((name, layer, matmul) for name in implementations)
    ]


def measure(benchmark, ceilings, *, call: Callable[[], Tensor], layer: str, op: str, name: str):
    """The function times a matmul of a layer."""
    inputs, outputs = LAYERS[layer]
    record(
        benchmark,
        call,
        ceilings,
        op=op,
        implementation=name,
        cost=costs.matmul(N, inputs, outputs),
    )


def title(layer: str, matmul: str) -> str:
    inputs, outputs = LAYERS[layer]
    return f"{layer} {inputs}x{outputs} {matmul}"


def measure_matmul(benchmark, ceilings, row, suffix=""):
    """The row's matmul is checked, then measured on operands quantised before."""
    implementation, layer, matmul = row
    operands = operands_of(layer, matmul)
    assert_agrees(implementation, operands)
    quantise, multiply = (IMPLEMENTATIONS | AS_8_6)[implementation][:2]
    a, b = (quantise(operand) for operand in operands)
    measure(
        benchmark,
        ceilings,
        call=lambda: multiply(a, b),
        layer=layer,
        op=f"int8 {title(layer, matmul)}{suffix}",
        name=implementation,
    )


@pytest.mark.parametrize(("implementation", "layer", "matmul"), rows(IMPLEMENTATIONS, QUICK))
def test_matmul(benchmark, ceilings, implementation, layer, matmul):
    skip_fp8_on_the_cpu(implementation)
    measure_matmul(benchmark, ceilings, (implementation, layer, matmul))


@pytest.mark.parametrize(("implementation", "layer", "matmul"), rows(AS_8_6))
def test_matmul_as_8_6(benchmark, ceilings, implementation, layer, matmul):
    if scale.SMOKE:
        pytest.skip("executes a GPU's code")
    with as_capability("8.6"):
        measure_matmul(benchmark, ceilings, (implementation, layer, matmul), " as 8.6")


@pytest.mark.parametrize(("implementation", "layer", "matmul"), rows(QUANTISED))
def test_with_quantisation(benchmark, ceilings, implementation, layer, matmul):
    """Beside "cuBLAS bf16" of `test_matmul`, which quantises nothing."""
    skip_fp8_on_the_cpu(implementation)
    a, b = operands = operands_of(layer, matmul)
    assert_agrees(implementation, operands)
    quantise, multiply = IMPLEMENTATIONS[implementation][:2]
    weight = quantise(b) if b.is_weight else None
    measure(
        benchmark,
        ceilings,
        call=lambda: multiply(quantise(a), quantise(b) if weight is None else weight),
        layer=layer,
        op=f"int8 {title(layer, matmul)} with quantisation",
        name=implementation,
    )


@pytest.mark.parametrize("way", ("rows", "grouped", "transposed", "transposed grouped"))
@pytest.mark.parametrize("width", WIDTHS)
def test_quantise(benchmark, ceilings, width, way):
    options = {"transposed": "transposed" in way, "grouped": "grouped" in way}
    x = torch.randn(N, width, device=DEVICE).to(DTYPE)
    results = zip(quantize_int8(x, **options), quantize_int8_reference(x, **options), strict=True)
    assert all(torch.equal(*pair) for pair in results), "not timed: other bits"
    record(
        benchmark,
        lambda: quantize_int8(x, **options),
        ceilings,
        op=f"quantize_int8 {width} {way}",
        implementation="hamner",
        cost=costs.quantize_int8(N * width, DTYPE.itemsize),
    )


@pytest.mark.parametrize("implementation", ("hamner", "quantised apart"))
def test_norm_backward(benchmark, ceilings, implementation):
    """The gradient of o's or down's result, in the model's dtype and in int8."""
    width = LAYERS["o"][1]
    d_y, d_residual, x = (torch.randn(N, width, device=DEVICE).to(DTYPE) for _ in range(3))
    norm = {"x": x, "weight": torch.ones(width, device=DEVICE)}
    norm["rstd"] = torch.rsqrt(x.float().square().mean(dim=-1))
    rows = empty_int8(x, x.shape, grouped=False)

    def handed_over() -> Int8Matrix:
        launch_rms_norm_backward(d_y, d_residual, **norm, quantised=rows)
        return rows

    def apart() -> Int8Matrix:
        return quantize_int8(launch_rms_norm_backward(d_y, d_residual, **norm)[0])

    pairs = zip(handed_over(), apart(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs), "not timed: other bits"
    record(
        benchmark,
        handed_over if implementation == "hamner" else apart,
        ceilings,
        op="add_rms_norm backward with int8",
        implementation=implementation,
        cost=costs.rms_norm(x.numel(), DTYPE.itemsize, adds_residual=True, backward=True)
        + Cost(bytes=x.numel()),
    )
