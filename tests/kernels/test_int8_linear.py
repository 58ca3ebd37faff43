"""The int8 linear layer is held to its parts, bit for bit, by itself and inside the fused ops."""

from functools import partial

import pytest
import torch

from hamner.kernels import (
    add_rms_norm,
    add_rms_norm_attention,
    add_rms_norm_linear,
    add_rms_norm_mlp,
    add_rms_norm_qkv_rope,
    flash_attention_qkv,
    int8_linear,
    rms_norm_linear,
    swiglu,
    swiglu_linear,
)
from hamner.kernels.int8_error import SPOTS
from hamner.kernels.int8_linear import OPERANDS, int8_linear_reference
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

        def parts(x, residual, norm_weight, weight):
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

        inputs = norm_inputs(device) | {"weight": make(600, 32, device=device, seed=3)}
        settings = {"recompute": recompute, "matmul": matmul}
        op = partial(add_rms_norm_linear, grouped_gradient=True, **settings)
        assert_same_bits(op, parts, inputs)

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


def mlp_inputs(*shape: int, inner: int, residual: bool = True, **how) -> dict[str, torch.Tensor]:
    width = shape[-1]
    inputs = {
        "x": make(*shape, **how),
        "norm_weight": make(width, seed=2, device=how["device"]),
        "gate_up_weight": make(2 * inner, width, seed=3, **how),
        "down_weight": make(width, inner, seed=4, **how),
    }
    return inputs | ({"residual": make(*shape, seed=1, **how)} if residual else {})


def mlp(*, parts: bool, gate_up: str, down: str, recompute: bool = True):
    """The op, or the two that it joins; with the errors of all operands as inputs."""

    def op(x, norm_weight, gate_up_weight, down_weight, residual=None, errors=(None, None)):
        if not parts:
            return add_rms_norm_mlp(
                x, residual, norm_weight, gate_up_weight, down_weight,
                recompute=recompute, gate_up_matmul=gate_up, gate_up_errors=errors[0],
                down_matmul=down, down_errors=errors[1],
            )  # fmt: skip
        how = {"recompute": recompute, "matmul": gate_up, "errors": errors[0]}
        gate_up_out, stream = add_rms_norm_linear(
            x, residual, norm_weight, gate_up_weight, grouped_gradient=True, **how
        )
        how = {"recompute": recompute, "matmul": down, "errors": errors[1]}
        return swiglu_linear(gate_up_out, down_weight, **how), stream

    return op


class TestMlpEqualsItsTwoOps:
    """SwiGLU's backward quantises as the quantiser does; what fell back is not quantised."""

    @pytest.mark.parametrize(
        ("gate_up", "down", "recompute", "residual"),
        [
            ("int8", "int8", True, True),
            ("int8-all", "int8-all", False, False),
            ("data_gradient", "bf16", True, True),
            ("forward+weight_gradient", "int8", True, True),
        ],
    )
    def test_bits(self, gate_up, down, recompute, residual, device):
        inputs = mlp_inputs(2, 20, 32, inner=512, residual=residual, device=device)
        how = {"gate_up": gate_up, "down": down, "recompute": recompute}
        assert_same_bits(mlp(parts=False, **how), mlp(parts=True, **how), inputs)

    def test_errors(self, device):
        shape, found = (2, len(OPERANDS), SPOTS, 2), []
        for parts in (False, True):
            errors = torch.zeros(shape, device=device, requires_grad=True)
            inputs = mlp_inputs(2, 20, 32, inner=512, device=device)
            op = mlp(parts=parts, gate_up="int8-all", down="int8")
            op(**inputs, errors=errors)[0].sum().backward()
            found.append(errors.grad)
        assert torch.equal(*found)
        measured = (found[0][..., 1] > 0).any(dim=-1)
        assert measured[0].all() and measured[1].tolist() == [True] * 4 + [False] * 2

    def test_a_stream_without_its_branch(self, device):
        inputs = mlp_inputs(2, 20, 32, inner=256, device=device)
        _, stream = mlp(parts=False, gate_up="int8", down="int8")(**inputs)
        d_x, d_residual = torch.autograd.grad(stream.sum(), [inputs["x"], inputs["residual"]])
        assert d_x.eq(1).all() and d_residual.eq(1).all()

    def test_compiled(self, device):
        op = mlp(parts=False, gate_up="int8-all", down="int8-all")
        assert_same_bits(op, compiled(op), mlp_inputs(2, 5, 32, inner=256, device=device))

    def test_groups_with_elements_of_gate_and_of_up(self, device):
        """SwiGLU's backward does not quantise them, the quantiser does."""
        inputs = mlp_inputs(2, 20, 32, inner=300, device=device)
        op, parts = (mlp(parts=p, gate_up="int8", down="int8") for p in (False, True))
        assert op(**inputs)[0].grad_fn.name() != "_NormMlpBackward"
        assert_same_bits(op, parts, inputs)
        whole = mlp_inputs(2, 20, 32, inner=256, device=device)
        assert op(**whole)[0].grad_fn.name() == "_NormMlpBackward"

    def test_not_finite(self, device):
        """A token that is not finite spoils no other's gradient."""
        inputs = mlp_inputs(1, 20, 32, inner=512, device=device)
        op = mlp(parts=False, gate_up="int8", down="int8")
        d_out = make(1, 20, 32, device=device, seed=5).detach()
        (expected,) = torch.autograd.grad(op(**inputs)[0], inputs["x"], d_out)
        d_out[0, 3] = torch.inf
        (found,) = torch.autograd.grad(op(**inputs)[0], inputs["x"], d_out)
        assert found[0, 3].isnan().all()
        others = [i for i in range(20) if i != 3]
        assert torch.equal(found[0, others], expected[0, others])

    def test_opcheck(self, device):
        d_out, gate_up, h, weight = (
            make(*s, device=device) for s in ((5, 8), (5, 512), (5, 256), (8, 256))
        )
        arguments = (x.detach() for x in (d_out, gate_up, h, weight))
        op = torch.ops.hamner.swiglu_linear_backward
        torch.library.opcheck(op, (*arguments, "int8-all", True, True))

    def test_rejects(self):
        inputs = mlp_inputs(2, 5, 32, inner=256, device="cpu")
        op = mlp(parts=False, gate_up="int8", down="int8")
        with pytest.raises(ValueError, match=r"gate_up_weight has shape \(511, 32\)"):
            op(**{**inputs, "gate_up_weight": torch.ones(511, 32)})
        with pytest.raises(TypeError, match="down_weight is torch.float16"):
            op(**{**inputs, "down_weight": torch.ones(32, 256).half()})
        with pytest.raises(ValueError, match="matmul is 'fp8'"):
            mlp(parts=False, gate_up="int8", down="fp8")(**inputs)


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
    inputs = linear_inputs(5, 8, 6, torch.float32, device)
    torch.library.opcheck(torch.ops.hamner.int8_linear, (*inputs.values(), "int8-all"))


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
        (ValueError, "axes up to 32,768", {"weight": torch.ones(MAX_ROW + 1, 3)}),
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

    how = {"gate_up": "int8-all", "down": "int8-all", "recompute": recompute}
    inputs = mlp_inputs(24, 1024, 1024, inner=2816, **bf16)
    assert_same_bits(mlp(parts=False, **how), mlp(parts=True, **how), inputs)
