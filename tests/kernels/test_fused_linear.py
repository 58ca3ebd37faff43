import pytest
import torch
from torch import zeros
from torch.utils._python_dispatch import TorchDispatchMode

from hamner.kernels.fused_linear import (
    add_rms_norm_linear,
    add_rms_norm_linear_reference,
    add_rms_norm_qkv_rope,
    add_rms_norm_qkv_rope_reference,
    rms_norm_linear,
    rms_norm_linear_reference,
    swiglu_linear,
    swiglu_linear_reference,
)
from tests.kernels.gradients import (
    DTYPES,
    assert_derivative,
    assert_matches_reference,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)
from tests.kernels.test_rope import make_tables

HEADS, KV_HEADS, HEAD_DIM = 3, 1, 8


def make(shape, dtype, device, *, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype).requires_grad_()


def norm_inputs(shape, outputs, dtype, device, *, residual=True):
    width = shape[-1]
    return {
        "x": make(shape, dtype, device, seed=1),
        "residual": make(shape, dtype, device, seed=2) if residual else None,
        "norm_weight": make((width,), torch.float32, device, seed=3),
        "weight": make((outputs, width), dtype, device, scale=width**-0.5, seed=4),
    }


def swiglu_inputs(shape, outputs, dtype, device):
    return {
        "gate_up": make(shape, dtype, device, seed=1),
        "weight": make((outputs, shape[-1] // 2), dtype, device, seed=2),
    }


def qkv_inputs(dtype, device, *, residual=True, positions=None):
    inputs = norm_inputs(
        (2, 7, 40), (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype, device, residual=residual
    )
    cos, sin = make_tables(9, HEAD_DIM, device)
    return {**inputs, "cos": cos, "sin": sin, "positions": positions}


def documents(device):
    return torch.tensor(
        [[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]], dtype=torch.int32, device=device
    )


def qkv_rope(recompute=True):
    return lambda x, residual, norm_weight, weight, cos, sin, positions: add_rms_norm_qkv_rope(
        x, residual, norm_weight, weight, cos, sin, HEADS, KV_HEADS, positions, recompute=recompute
    )


def qkv_rope_reference(x, residual, norm_weight, weight, cos, sin, positions):
    return add_rms_norm_qkv_rope_reference(
        x, residual, norm_weight, weight, cos, sin, HEADS, KV_HEADS, positions
    )


def with_recompute(op, recompute):
    return lambda *arguments: op(*arguments, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [True, False])
class TestAccuracy:
    @pytest.mark.parametrize("residual", [True, False])
    @pytest.mark.parametrize(("shape", "outputs"), [((1, 33), 5), ((2, 19, 48), 40)])
    def test_add_rms_norm_linear(self, shape, outputs, residual, recompute, dtype, device):
        inputs = norm_inputs(shape, outputs, dtype, device, residual=residual)
        op = with_recompute(add_rms_norm_linear, recompute)
        assert_matches_reference(op, add_rms_norm_linear_reference, inputs)

    def test_rms_norm_linear(self, recompute, dtype, device):
        inputs = norm_inputs((2, 19, 48), 40, dtype, device)
        del inputs["residual"]
        op = with_recompute(rms_norm_linear, recompute)
        assert_matches_reference(op, rms_norm_linear_reference, inputs)

    @pytest.mark.parametrize("residual", [True, False])
    @pytest.mark.parametrize("has_positions", [True, False])
    def test_add_rms_norm_qkv_rope(self, has_positions, residual, recompute, dtype, device):
        positions = documents(device) if has_positions else None
        inputs = qkv_inputs(dtype, device, residual=residual, positions=positions)
        assert_matches_reference(qkv_rope(recompute), qkv_rope_reference, inputs)

    @pytest.mark.parametrize(("shape", "outputs"), [((1, 66), 5), ((2, 19, 74), 40)])
    def test_swiglu_linear(self, shape, outputs, recompute, dtype, device):
        inputs = swiglu_inputs(shape, outputs, dtype, device)
        assert_matches_reference(
            with_recompute(swiglu_linear, recompute), swiglu_linear_reference, inputs
        )


def test_recomputing_gives_the_bits_of_keeping(device):
    pairs = [
        (add_rms_norm_linear, norm_inputs((9, 48), 16, torch.float16, device)),
        (swiglu_linear, swiglu_inputs((9, 48), 16, torch.float16, device)),
    ]
    for op, inputs in pairs:
        assert_same_bits(with_recompute(op, True), with_recompute(op, False), inputs)


def bytes_kept(op, inputs):
    """Count what autograd keeps of a call, beyond the inputs."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = op(*inputs.values())  # held, so that no two tensors share an address
    for x in inputs.values():
        kept.pop(x.untyped_storage().data_ptr(), None)
    del outputs
    return sum(kept.values())


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_kept_for_backward(recompute, device):
    inputs = norm_inputs((9, 48), 16, torch.float32, device)
    x, rstd = 9 * 48 * 4, 9 * 4
    expected = rstd + (x if recompute else 2 * x)
    assert bytes_kept(with_recompute(add_rms_norm_linear, recompute), inputs) == expected

    inputs = swiglu_inputs((9, 48), 16, torch.float32, device)
    expected = 0 if recompute else 9 * 24 * 4
    assert bytes_kept(with_recompute(swiglu_linear, recompute), inputs) == expected


class Zeros(TorchDispatchMode):
    """It lists the shapes of the zeros that are made while it is on."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "zero" in function.name():
            self.shapes.append(args[0] if isinstance(args[0], list) else list(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_backward_makes_no_zeros_of_the_size_of_what_is_kept(device):
    """Autograd would, for the gradient of swiglu's result, which no one gives and no one reads."""
    inputs = swiglu_inputs((9, 48), 16, torch.float32, device)
    out = swiglu_linear(*inputs.values(), recompute=False)
    with Zeros() as made:
        out.backward(torch.ones_like(out))
    assert [9, 24] not in made.shapes


def test_without_a_residual_x_is_the_residual_stream(device):
    inputs = norm_inputs((9, 48), 16, torch.float32, device, residual=False)
    _, new_residual = add_rms_norm_linear(*inputs.values())
    assert new_residual is inputs["x"]
    inputs = qkv_inputs(torch.float32, device, residual=False)
    assert qkv_rope()(*inputs.values())[1] is inputs["x"]


def test_gradient_of_the_residual_stream_alone(device):
    inputs = norm_inputs((9, 48), 16, torch.float32, device)
    _, new_residual = add_rms_norm_linear(*inputs.values())
    (2.0 * new_residual).sum().backward()
    for name in ("x", "residual"):
        assert torch.equal(inputs[name].grad, torch.full_like(inputs[name], 2.0))
    assert inputs["norm_weight"].grad is None
    assert inputs["weight"].grad is None


def test_backward_leaves_its_gradients_alone(device):
    inputs = qkv_inputs(torch.float32, device)
    qkv, new_residual = qkv_rope()(*inputs.values())
    gradients = [torch.randn_like(qkv), torch.randn_like(new_residual)]
    copies = [gradient.clone() for gradient in gradients]
    torch.autograd.backward((qkv, new_residual), gradients, retain_graph=True)
    assert all(map(torch.equal, gradients, copies))
    first = inputs["x"].grad.clone()
    inputs["x"].grad = None
    torch.autograd.backward((qkv, new_residual), gradients)
    assert torch.equal(inputs["x"].grad, first)


def test_not_contiguous(device):
    for op, name, inputs in (
        (add_rms_norm_linear, "x", norm_inputs((33, 10), 8, torch.float32, device)),
        (swiglu_linear, "gate_up", swiglu_inputs((33, 10), 8, torch.float32, device)),
    ):
        view = inputs[name].detach().t().contiguous().t()
        assert not view.is_contiguous()
        expected = outputs_and_gradients(op, inputs)
        results = outputs_and_gradients(op, {**inputs, name: view.requires_grad_()})
        for result in results:
            assert torch.equal(results[result], expected[result]), result


def test_empty(device):
    results = outputs_and_gradients(
        add_rms_norm_linear, norm_inputs((0, 16), 8, torch.float32, device)
    )
    assert results["output 0"].shape == (0, 8)
    assert torch.equal(results["gradient of weight"], torch.zeros(8, 16, device=device))
    results = outputs_and_gradients(swiglu_linear, swiglu_inputs((0, 16), 4, torch.float32, device))
    assert results["output 0"].shape == (0, 4)
    assert torch.equal(results["gradient of weight"], torch.zeros(4, 8, device=device))


@pytest.mark.parametrize("recompute", [True, False])
def test_compiled_gives_the_same_bits(recompute, device):
    op = qkv_rope(recompute)
    inputs = qkv_inputs(torch.float32, device, positions=documents(device))
    assert_same_bits(op, compiled(op), inputs)
    op = with_recompute(swiglu_linear, recompute)
    assert_same_bits(op, compiled(op), swiglu_inputs((3, 5, 20), 8, torch.float32, device))


def test_compiled_block_gives_the_same_bits(device):
    def block(x, norm_weight, qkv_weight, cos, sin, gate_up_weight, down_weight):
        qkv, x = add_rms_norm_qkv_rope(x, None, norm_weight, qkv_weight, cos, sin, HEADS, KV_HEADS)
        attention = qkv[..., : x.shape[-1]] * 2.0
        gate_up, x = add_rms_norm_linear(attention, x, norm_weight, gate_up_weight)
        return swiglu_linear(gate_up, down_weight), x

    inputs = qkv_inputs(torch.float32, device, residual=False)
    del inputs["residual"], inputs["positions"]
    inputs["gate_up_weight"] = make((32, 40), torch.float32, device, seed=5)
    inputs["down_weight"] = make((40, 16), torch.float32, device, seed=6)
    inputs["x"] = make((2, 7, 40), torch.float32, device, seed=7)
    results = outputs_and_gradients(block, inputs)
    for name, result in outputs_and_gradients(compiled(block), inputs).items():
        torch.testing.assert_close(result, results[name])


def test_derivative(device):
    assert_derivative(qkv_rope(), qkv_inputs(torch.float32, device))
    assert_derivative(swiglu_linear, swiglu_inputs((3, 20), 8, torch.float32, device))


@pytest.mark.parametrize("recompute", [True, False])
def test_opcheck(recompute, device):
    inputs = qkv_inputs(torch.float32, device)
    x, residual, norm_weight, weight, cos, sin, positions = inputs.values()
    torch.library.opcheck(
        torch.ops.hamner.rms_norm_linear,
        (x, residual, norm_weight, weight, 1e-5, recompute, cos, sin, positions, HEADS, KV_HEADS),
    )
    inputs = swiglu_inputs((3, 20), 8, torch.float32, device)
    torch.library.opcheck(torch.ops.hamner.swiglu_linear, (*inputs.values(), recompute))


@pytest.mark.parametrize(
    ("error", "message", "op", "arguments"),
    [
        (TypeError, "norm_weight is", rms_norm_linear, (zeros(2, 4), zeros(4).half(), zeros(3, 4))),
        (TypeError, "weight is", rms_norm_linear, (zeros(2, 4), zeros(4), zeros(3, 4).half())),
        (ValueError, "weight has shape", rms_norm_linear, (zeros(2, 4), zeros(4), zeros(4, 3))),
        (
            ValueError,
            "weight is on meta",
            rms_norm_linear,
            (zeros(2, 4), zeros(4), zeros(3, 4).to("meta")),
        ),
        (
            ValueError,
            "residual has shape",
            add_rms_norm_linear,
            (zeros(2, 4), zeros(3, 4), zeros(4), zeros(3, 4)),
        ),
        (
            ValueError,
            "qkv rows have 7 elements",
            add_rms_norm_qkv_rope,
            (zeros(1, 2, 4), None, zeros(4), zeros(7, 4), zeros(2, 1), zeros(2, 1), 2, 1),
        ),
        (
            ValueError,
            "cos has shape",
            add_rms_norm_qkv_rope,
            (zeros(1, 2, 4), None, zeros(4), zeros(8, 4), zeros(1, 1), zeros(1, 1), 2, 1),
        ),
        (TypeError, "gate_up is", swiglu_linear, (zeros(2, 4).double(), zeros(3, 2))),
        (ValueError, "weight has shape", swiglu_linear, (zeros(2, 4), zeros(3, 4))),
    ],
)
def test_wrong_arguments(error, message, op, arguments):
    with pytest.raises(error, match=message):
        op(*arguments)


@pytest.mark.gpu
class TestOnGpu:
    def test_training_shape(self):
        inputs = norm_inputs((8, 1024, 1024), 1536, torch.bfloat16, "cuda")
        inputs["cos"], inputs["sin"] = make_tables(1024, 64, "cuda")
        for recompute in (True, False):
            assert_matches_reference(
                lambda *xs, recompute=recompute: add_rms_norm_qkv_rope(
                    *xs, 16, 4, recompute=recompute
                ),
                lambda *xs: add_rms_norm_qkv_rope_reference(*xs, 16, 4),
                inputs,
            )
        inputs = swiglu_inputs((8, 1024, 2 * 2816), 1024, torch.bfloat16, "cuda")
        assert_matches_reference(swiglu_linear, swiglu_linear_reference, inputs)

    def test_recompute_takes_no_memory_of_its_own(self):
        inputs = swiglu_inputs((8192, 2 * 2816), 1024, torch.bfloat16, "cuda")
        for _ in range(2):  # the first call allocates cuBLAS's workspaces
            for x in inputs.values():
                x.grad = None
            out = swiglu_linear(*inputs.values())
            gradient = torch.ones_like(out)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out.backward(gradient)
            peak = torch.cuda.max_memory_allocated() - before
        # d_h (then h), d_gate_up and d_weight; 1 MiB for rounding.
        assert peak <= 2 * (8192 * 2816 * 3 + 1024 * 2816) + 2**20

    @pytest.mark.xdist_group("most of the GPU's memory")
    @pytest.mark.parametrize("pair", ["norm", "swiglu"])
    def test_more_elements_than_int32(self, pair):
        rows, width, few = 2**31 // 2048 + 3, 2048, 5
        # All rows but the last few are zero, so the weights' gradients are those of the few alone.
        x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
        x[-few:].normal_()
        d_out = torch.empty(rows, 16, dtype=torch.bfloat16, device="cuda").normal_()
        if pair == "norm":
            op, scale = rms_norm_linear, make((width,), torch.float32, "cuda")
            weights = scale, make((16, width), torch.bfloat16, "cuda", scale=width**-0.5)
        else:
            op = swiglu_linear
            weights = (make((16, width // 2), torch.bfloat16, "cuda", scale=width**-0.5),)
        results = []
        for selected in (slice(None), slice(-few, None)):
            leaves = (x[selected].clone().requires_grad_(), *weights)
            out = op(*leaves)
            gradients = torch.autograd.grad(out, leaves, d_out[selected])
            results.append((out[-few:], gradients[0][-few:], *gradients[1:]))
            del leaves, out, gradients
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)
