"""The sampled errors of quantisation are those of the whole, and come as a gradient."""

from functools import partial

import pytest
import torch

from hamner.kernels import add_rms_norm_linear, int8_linear, swiglu, swiglu_linear
from hamner.kernels.int8_error import (
    BLOCK_COLUMNS,
    SPOTS,
    launch_quantization_error,
    quantization_error_reference,
)
from hamner.kernels.int8_linear import OPERANDS, join_products, products
from hamner.plan import costs
from tests.kernels.gradients import assert_same_bits, compiled

MODES = [(transposed, grouped) for transposed in (False, True) for grouped in (False, True)]


def normal(*shape: int, device="cpu", dtype=torch.float32, seed=0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype)


def sampled(x: torch.Tensor, **mode: bool) -> torch.Tensor:
    sums = torch.zeros(SPOTS, 2, device=x.device)
    launch_quantization_error(x, sums, **mode)
    return sums.sum(dim=0)


def errors_of(op, *inputs: torch.Tensor, matmul: str) -> torch.Tensor:
    """The relative errors by operand, NaN for what is not quantised."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    errors = torch.zeros(len(OPERANDS), SPOTS, 2, device=inputs[0].device, requires_grad=True)
    out = op(*leaves, matmul=matmul, errors=errors)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(normal(*out.shape, device=out.device, dtype=out.dtype, seed=7))
    lost, squares = errors.grad.sum(dim=1).unbind(dim=-1)
    return (lost / squares).sqrt()


@pytest.mark.parametrize(("transposed", "grouped"), MODES)
def test_of_a_small_matrix_the_whole_is_measured(transposed, grouped, device):
    x = normal(50, 70, device=device)
    x[3, 5] = 40.0
    mode = {"transposed": transposed, "grouped": grouped}
    torch.testing.assert_close(sampled(x, **mode), quantization_error_reference(x, **mode))


@pytest.mark.parametrize(("transposed", "grouped"), MODES)
@pytest.mark.parametrize("lines", [64, 4096])
def test_the_plan_counts_what_is_read(lines, transposed, grouped, device):
    length = 512
    x = torch.ones((length, lines) if transposed else (lines, length), device=device)
    squares = sampled(x, transposed=transposed, grouped=grouped)[1].item()
    how = {"is_transposed": transposed, "is_grouped": grouped}
    assert costs.int8_error(lines, length, costs.FP32, **how).bytes == 2 * costs.FP32 * squares


@pytest.mark.parametrize(("transposed", "grouped"), MODES)
def test_a_sample_of_a_large_one_has_its_error(transposed, grouped, device):
    """A tenth of all scales is far off, and so is the whole: the sample says so too."""
    shape = (300, 4000) if transposed else (4000, 300)
    x = normal(*shape, device=device)
    # The lines of the sample run along the second axis, or along the first one of the transpose.
    lines = x.T if transposed else x
    lines[::7, 10] = 60.0
    mode = {"transposed": transposed, "grouped": grouped}
    whole, sample = quantization_error_reference(x, **mode), sampled(x, **mode)
    assert sample[1] < 0.9 * whole[1]
    errors = [(sums[0] / sums[1]).sqrt().item() for sums in (whole, sample)]
    assert errors[1] == pytest.approx(errors[0], rel=0.2)


@pytest.mark.parametrize("tiles", [63, 64, 88, 192, 250])
def test_tiles_of_a_sample_are_spread_and_none_comes_twice(tiles, device):
    """88 are those of option a's down, transposed; 192 those of `current`'s o."""
    x = torch.arange(1.0, tiles + 1, device=device).repeat_interleave(BLOCK_COLUMNS)[None]
    sums = torch.zeros(SPOTS, 2, device=device)
    launch_quantization_error(x, sums, transposed=True)
    found = [round((squares / BLOCK_COLUMNS) ** 0.5) for squares in sums[:, 1].tolist() if squares]
    assert len(set(found)) == len(found) == min(SPOTS, tiles)
    # One of each stretch of them: the sample is of the whole.
    stretch = tiles / len(found)
    assert all(
        number * stretch < tile < (number + 1) * stretch + 1 for number, tile in enumerate(found)
    )


def test_operands_of_a_linear_layer(device):
    x, weight = normal(40, 48, device=device), normal(30, 48, device=device, seed=1)
    x[:, 3] *= 400.0  # scales by token suffer, those by channel do not
    errors = dict(zip(OPERANDS, errors_of(int8_linear, x, weight, matmul="int8-all"), strict=True))
    for name, value in errors.items():
        assert 0.001 < value < 0.02, name
    expected = quantization_error_reference(x)
    torch.testing.assert_close(errors["input"], (expected[0] / expected[1]).sqrt())
    few = errors_of(int8_linear, x, weight, matmul="data_gradient")
    assert few.isfinite().tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("recompute", [True, False])
def test_fused_ops_measure_their_parts(recompute, device):
    gate_up, weight = normal(20, 600, device=device), normal(16, 300, device=device, seed=1)
    op = partial(swiglu_linear, recompute=recompute)
    errors = errors_of(op, gate_up, weight, matmul="int8-all")
    parts = errors_of(int8_linear, swiglu(gate_up), weight, matmul="int8-all")
    torch.testing.assert_close(errors[2:], parts[2:])  # forward has other scales
    expected = quantization_error_reference(swiglu(gate_up), grouped=True)
    torch.testing.assert_close(errors[0], (expected[0] / expected[1]).sqrt())

    norm = partial(add_rms_norm_linear, recompute=recompute)
    inputs = *(normal(20, 32, device=device, seed=s) for s in (0, 1)), normal(32, device=device)
    errors = errors_of(norm, *inputs, normal(16, 32, device=device), matmul="int8")
    assert (errors[:4] > 0.001).all()


def test_compiled_gives_the_same(device):
    def op(x, weight, errors):
        return int8_linear(x, weight, "int8-all", errors)

    inputs = normal(30, 40, device=device), normal(20, 40, device=device)
    leaves = dict(zip(("x", "weight"), (x.requires_grad_() for x in inputs), strict=True))
    errors = torch.zeros(len(OPERANDS), SPOTS, 2, device=device, requires_grad=True)
    assert_same_bits(op, compiled(op), {**leaves, "errors": errors})


def test_without_tokens_there_is_none(device):
    x, weight = normal(0, 8, device=device), normal(6, 8, device=device)
    errors = errors_of(int8_linear, x, weight, matmul="int8-all")
    assert errors.isfinite().tolist() == [False, True, False, True, False, False]


def test_products_are_chosen_one_by_one(device):
    assert join_products(["weight_gradient", "forward"]) == "forward+weight_gradient"
    assert products(join_products(())) == ()
    x, weight = (normal(30, 40, device=device, seed=s).requires_grad_() for s in (0, 1))
    d_out = normal(30, 30, device=device, seed=2)
    weight = weight[:30].detach().requires_grad_()

    def run(matmul):
        out = int8_linear(x, weight, matmul)
        return out, *torch.autograd.grad(out, (x, weight), d_out)

    exact, quantised = run("bf16"), run("int8-all")
    for number, product in enumerate(("forward", "data_gradient", "weight_gradient")):
        expected = [*exact[:number], quantised[number], *exact[number + 1 :]]
        for result, wanted in zip(run(product), expected, strict=True):
            assert torch.equal(result, wanted)


@pytest.mark.gpu
def test_at_a_training_shape():
    x = normal(24_576, 1024, device="cuda", dtype=torch.bfloat16)
    for transposed, grouped in MODES:
        mode = {"transposed": transposed, "grouped": grouped}
        errors = [
            (sums[0] / sums[1]).sqrt().item()
            for sums in (sampled(x, **mode), quantization_error_reference(x, **mode))
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.05), mode
