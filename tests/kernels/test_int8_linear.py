"""The int8 linear layer is held to its parts, bit for bit, by itself and inside the fused ops."""

from functools import partial

import pytest
import torch

from hamner.kernels import (
    add_rms_norm,
    add_rms_norm_attention,
    add_rms_norm_linear,
    add_rms_norm_qkv_rope,
    flash_attention_qkv,
    int8_linear,
    rms_norm_linear,
    swiglu,
    swiglu_linear,
)
from hamner.kernels.int8_linear import int8_linear_reference
from hamner.kernels.int8_matmul import int8_matmul
from hamner.kernels.int8_quantize import MAX_ROW, quantize_int8
from tests.kernels.gradients import DTYPES, assert_same_bits, compiled, outputs_and_gradients

MODES = ("int8", "int8-all")


def make(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).requires_grad_()


def linear_inputs(n: int, inputs: int, outputs: int, dtype, device) -> dict[str, torch.Tensor]:
    weight = make(outputs, inputs, dtype=dtype, device=device, seed=1)
    return {"x": make(n, inputs, dtype=dtype, device=device), "weight": weight}


def norm_inputs(device) -> dict[str, torch.Tensor]:
    return {
        "x": make(2, 20, 32, device=device),
        "residual": make(2, 20, 32, device=device, seed=1),
        "norm_weight": make(32, device=device, seed=2),
        "weight": make(48, 32, device=device, seed=3),
    }


def norm_linear_in_groups(x, residual, norm_weight, weight, matmul="int8"):
    """`add_rms_norm_linear` with `grouped_gradient`, by hand."""
    normed, stream = add_rms_norm(x, residual, norm_weight)
    out = int8_linear(normed, weight, matmul)
    seen = []
    out.register_hook(lambda d_out: seen.append(d_out.flatten(0, -2)))

    def in_groups(d_normed):
        columns = quantize_int8(weight.detach(), transposed=True, grouped=True)
        rows = quantize_int8(seen.pop(), grouped=True)
        return int8_matmul(rows, columns, weight.dtype).view_as(d_normed)

    normed.register_hook(in_groups)
    return out, stream


def equals_its_reference(n: int, inputs: int, outputs: int, *, matmul, dtype, device):
    tensors = linear_inputs(n, inputs, outputs, dtype, device)
    out = int8_linear(**tensors, matmul=matmul)
    d_out = make(n, outputs, dtype=dtype, device=device, seed=2).detach()
    gradients = torch.autograd.grad(out, list(tensors.values()), d_out)
    values = (tensor.detach() for tensor in tensors.values())
    expected = int8_linear_reference(*values, d_out, matmul)
    for result, wanted in zip((out, *gradients), expected, strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("matmul", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_its_reference(dtype, matmul, device):
    equals_its_reference(300, 40, 70, matmul=matmul, dtype=dtype, device=device)


@pytest.mark.parametrize(("recompute", "matmul"), [(True, "int8"), (False, "int8-all")])
class TestFusedOpsEqualTheirParts:
    def test_norm_linear(self, recompute, matmul, device):
        def parts(x, residual, norm_weight, weight):
            normed, stream = add_rms_norm(x, residual, norm_weight)
            return int8_linear(normed, weight, matmul), stream

        op = partial(add_rms_norm_linear, recompute=recompute, matmul=matmul)
        assert_same_bits(op, parts, norm_inputs(device))

    def test_norm_linear_whose_gradient_has_groups(self, recompute, matmul, device):
        """The data gradient alone has operands with a scale each 256 outputs."""

        inputs = norm_inputs(device) | {"weight": make(600, 32, device=device, seed=3)}
        settings = {"recompute": recompute, "matmul": matmul}
        op = partial(add_rms_norm_linear, grouped_gradient=True, **settings)
        assert_same_bits(op, partial(norm_linear_in_groups, matmul=matmul), inputs)

    def test_attention(self, recompute, matmul, device):
        angles = torch.rand(20, 8, device=device)
        heads = {"cos": angles.cos(), "sin": angles.sin(), "num_heads": 1, "num_kv_heads": 1}
        settings = {"recompute": recompute, "matmul": matmul}

        def fused(x, residual, norm_weight, weight):
            return add_rms_norm_attention(x, residual, norm_weight, weight, **heads, **settings)

        def parts(x, residual, norm_weight, weight):
            qkv, stream = add_rms_norm_qkv_rope(
                x, residual, norm_weight, weight, **heads, **settings
            )
            return flash_attention_qkv(qkv, 1, 1), stream

        results, expected = (
            outputs_and_gradients(op, norm_inputs(device)) for op in (fused, parts)
        )
        assert torch.equal(results["output 0"], expected["output 0"])
        for name, result in results.items():
            # RoPE's backward rotates before it rounds, so a few elements round to another step.
            torch.testing.assert_close(result, expected[name], rtol=0.02, atol=0.02)

    def test_swiglu_linear(self, recompute, matmul, device):
        """SwiGLU's result has a scale each 256 elements."""
        inputs = {
            "gate_up": make(40, 600, device=device),
            "weight": make(20, 300, device=device, seed=1),
        }
        op = partial(swiglu_linear, recompute=recompute, matmul=matmul)
        results = outputs_and_gradients(op, inputs)
        with torch.no_grad():
            rows = quantize_int8(swiglu(inputs["gate_up"]), grouped=True)
            weight = quantize_int8(inputs["weight"].detach(), grouped=True)
        assert torch.equal(results["output 0"], int8_matmul(rows, weight, torch.float32))
        # Backward is int8_linear's.
        parts = outputs_and_gradients(
            lambda gate_up, weight: int8_linear(swiglu(gate_up), weight, matmul), inputs
        )
        for name in ("gradient of gate_up", "gradient of weight"):
            assert torch.equal(results[name], parts[name]), name


def test_a_gradient_of_bf16_is_untouched_by_int8(device):
    """With "int8" the gradient of the weight is torch's own."""
    tensors = linear_inputs(300, 40, 70, torch.float32, device)
    d_out = make(300, 70, device=device, seed=2).detach()
    out = int8_linear(**tensors)
    (d_weight,) = torch.autograd.grad(out, tensors["weight"], d_out)
    assert torch.equal(d_weight, d_out.T @ tensors["x"])


@pytest.mark.parametrize("matmul", MODES)
def test_empty(matmul, device):
    results = outputs_and_gradients(
        partial(int8_linear, matmul=matmul), linear_inputs(0, 8, 6, torch.float32, device)
    )
    assert results["output 0"].shape == (0, 6)
    assert torch.equal(results["gradient of weight"], torch.zeros(6, 8, device=device))


def test_compiled_gives_the_same_bits(device):
    op = partial(int8_linear, matmul="int8-all")
    inputs = linear_inputs(30, 40, 20, torch.float32, device)
    assert_same_bits(op, compiled(op), inputs)


def test_opcheck(device):
    x, weight = (t.detach() for t in linear_inputs(5, 8, 6, torch.float32, device).values())
    torch.library.opcheck(torch.ops.hamner.int8_linear, (x, weight, "int8-all"))
    d_out = make(5, 6, device=device, seed=7).detach()
    arguments = d_out, x, weight, "int8-all", True, *quantize_int8(d_out)
    torch.library.opcheck(torch.ops.hamner.int8_linear_backward, arguments)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x is torch.int64", {"x": torch.ones(2, 3, dtype=torch.int64)}),
        (ValueError, r"x has shape \(\); its last axis", {"x": torch.ones(())}),
        (ValueError, r"x has shape \(2, 0\); its last axis", {"x": torch.ones(2, 0)}),
        (TypeError, "weight is torch.float16", {"weight": torch.ones(4, 3).half()}),
        (ValueError, r"weight has shape \(4, 5\)", {"weight": torch.ones(4, 5)}),
        (
            ValueError,
            "matmul is 'int4'; it must be one of bf16, int8, int8-all",
            {"matmul": "int4"},
        ),
        (
            ValueError,
            r"weight has shape \(32769, 3\); int8 has one scale for 32,769 elements there, and "
            "takes up to 32,768",
            {"weight": torch.ones(MAX_ROW + 1, 3)},
        ),
        (
            ValueError,
            r"errors has shape \(3,\); it must be \(6, 64, 2\)",
            {"errors": torch.ones(3)},
        ),
        (TypeError, "errors is torch.float16", {"errors": torch.ones(6, 64, 2).half()}),
    ],
)
def test_rejects(error, message, change):
    with pytest.raises(error, match=message):
        int8_linear(**{"x": torch.ones(2, 3), "weight": torch.ones(4, 3), **change})


def test_fused_ops_reject():
    x, weight = torch.ones(2, 4), torch.ones(4, 4)
    with pytest.raises(ValueError, match="matmul is 'fp8'"):
        rms_norm_linear(x, torch.ones(4), weight, matmul="fp8")
    with pytest.raises(ValueError, match="matmul is 'fp8'"):
        swiglu_linear(torch.ones(2, 8), weight, matmul="fp8")
    with pytest.raises(ValueError, match="errors has shape"):
        swiglu_linear(torch.ones(2, 8), weight, errors=torch.ones(6))


@pytest.mark.gpu
@pytest.mark.parametrize("matmul", MODES)
def test_training_shape(matmul):
    settings = {"matmul": matmul, "dtype": torch.bfloat16, "device": "cuda"}
    equals_its_reference(24_576, 1024, 1024, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [True, False])
def test_fused_ops_at_a_training_shape(recompute):
    """What norm and SwiGLU quantise as they write it is what the quantiser makes of the result."""
    settings = {"recompute": recompute, "matmul": "int8-all"}
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    inputs = {
        "x": make(24, 1024, 1024, **bf16),
        "residual": make(24, 1024, 1024, seed=1, **bf16),
        "norm_weight": make(1024, seed=2, device="cuda"),
        "weight": make(5632, 1024, seed=3, **bf16),
    }

    def norm_parts(x, residual, norm_weight, weight):
        normed, stream = add_rms_norm(x, residual, norm_weight)
        return int8_linear(normed, weight, "int8-all"), stream

    assert_same_bits(partial(add_rms_norm_linear, **settings), norm_parts, inputs)

    gate_up, weight = make(24_576, 5632, **bf16), make(1024, 2816, seed=1, **bf16)
    with torch.no_grad():
        rows, weight_rows = (quantize_int8(x, grouped=True) for x in (swiglu(gate_up), weight))
        out = swiglu_linear(gate_up, weight, **settings)
    assert torch.equal(out, int8_matmul(rows, weight_rows))
