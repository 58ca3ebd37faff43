"""The MLP in one op: two ops and int8 between them, held to plain torch and to its parts."""

import importlib

import pytest
import torch

from hamner.kernels import (
    add_rms_norm_linear,
    add_rms_norm_mlp,
    swiglu_linear,
)
from hamner.kernels.int8_error import SPOTS
from hamner.kernels.int8_linear import OPERANDS
from hamner.kernels.norm_mlp import add_rms_norm_mlp_reference
from tests.kernels.gradients import (
    DTYPES,
    assert_matches_reference,
    assert_same_bits,
    compiled,
)
from tests.kernels.test_int8_linear import make, norm_linear_in_groups


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


def is_joined(op, inputs) -> bool:
    """Whether SwiGLU's backward quantises; else the op calls the two, one after the other."""
    return op(**inputs)[0].grad_fn.name() == "_NormMlpBackward"


class TestMlpEqualsItsTwoOps:
    """SwiGLU's backward quantises as the quantiser does; what fell back is not quantised."""

    @pytest.mark.parametrize(
        ("gate_up", "down", "recompute", "residual"),
        [
            ("int8", "int8", True, True),
            ("int8-all", "int8-all", False, False),
            ("data_gradient", "bf16", True, True),
        ],
    )
    def test_bits(self, gate_up, down, recompute, residual, device):
        inputs = mlp_inputs(2, 20, 32, inner=512, residual=residual, device=device)
        how = {"gate_up": gate_up, "down": down, "recompute": recompute}
        assert is_joined(mlp(parts=False, **how), inputs)
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
        with pytest.raises(ValueError, match="down_errors has shape"):
            op(**inputs, errors=(None, torch.zeros(6)))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, residual, device):
    inputs = mlp_inputs(2, 21, 40, inner=70, residual=residual, dtype=dtype, device=device)

    def reference(x, norm_weight, gate_up_weight, down_weight, residual=None):
        return add_rms_norm_mlp_reference(x, residual, norm_weight, gate_up_weight, down_weight)

    assert_matches_reference(mlp(parts=False, gate_up="bf16", down="bf16"), reference, inputs)


@pytest.mark.parametrize(
    ("gate_up", "inner"),
    [("int8", 300), ("forward+weight_gradient", 512), ("bf16", 512)],
)
def test_where_nothing_is_joined(gate_up, inner, device):
    """There a group has elements of gate and of up, or no matmul takes the gradient in int8."""
    inputs = mlp_inputs(2, 5, 32, inner=inner, device=device)
    assert not is_joined(mlp(parts=False, gate_up=gate_up, down="int8"), inputs)


@pytest.mark.parametrize("inner", [300, 512])
def test_gradient_of_gate_up_has_groups(inner, device):
    """The same as by hand, whoever quantises it."""

    def by_hand(x, norm_weight, gate_up_weight, down_weight, residual):
        gate_up, stream = norm_linear_in_groups(x, residual, norm_weight, gate_up_weight)
        return swiglu_linear(gate_up, down_weight, matmul="int8"), stream

    inputs = mlp_inputs(2, 20, 32, inner=inner, device=device)
    assert_same_bits(mlp(parts=False, gate_up="int8", down="int8"), by_hand, inputs)


def test_the_inner_width_has_no_limit(device, monkeypatch):
    """What has one scale a row is as wide as the model, on either side."""
    # By its full name: the package has a function of the same.
    module = importlib.import_module("hamner.kernels.int8_linear")
    monkeypatch.setattr(module, "MAX_ROW", 40)
    inputs = mlp_inputs(2, 5, 32, inner=256, device=device)
    op = mlp(parts=False, gate_up="int8-all", down="int8-all")
    assert op(**inputs)[0].shape == inputs["x"].shape
    wide = mlp_inputs(2, 5, 48, inner=256, device=device)
    with pytest.raises(ValueError, match="gate_up_weight has shape .* one scale for 48 elements"):
        op(**wide)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [True, False])
def test_training_shape(recompute):
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    how = {"gate_up": "int8-all", "down": "int8-all", "recompute": recompute}
    inputs = mlp_inputs(24, 1024, 1024, inner=2816, **bf16)
    assert_same_bits(mlp(parts=False, **how), mlp(parts=True, **how), inputs)
