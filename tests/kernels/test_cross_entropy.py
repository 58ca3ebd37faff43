import math

import pytest
import torch
from torch import zeros

from hamner.kernels.cross_entropy import (
    default_chunk_size,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from tests.kernels.gradients import (
    DTYPES,
    assert_derivative,
    assert_matches_reference,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)
from tests.waiting import no_waiting


def make_inputs(num_tokens, vocabulary, width, dtype, device, *, ignored=0.2):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 2.0 * width**-0.5
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    targets[torch.rand(num_tokens, generator=generator) < ignored] = -100
    return {
        "hidden": hidden.to(device, dtype).requires_grad_(),
        "weight": weight.to(device, dtype).requires_grad_(),
        "targets": targets.to(device),
    }


def with_options(op, **options):
    return lambda hidden, weight, targets: op(hidden, weight, targets, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
# The last shape takes three blocks of logits a row, with the largest in each, and ignored rows.
@pytest.mark.parametrize(
    ("num_tokens", "vocabulary", "width", "chunk_size"),
    [(1, 1, 1, None), (7, 123, 33, 3), (41, 507, 20, 16), (9, 38_000, 8, None)],
)
def test_accuracy(num_tokens, vocabulary, width, chunk_size, z_loss, dtype, device):
    inputs = make_inputs(num_tokens, vocabulary, width, dtype, device)
    op = with_options(linear_cross_entropy, z_loss=z_loss, chunk_size=chunk_size)
    reference = with_options(linear_cross_entropy_reference, z_loss=z_loss)
    assert_matches_reference(op, reference, inputs)


def test_agrees_with_torch(device):
    inputs = make_inputs(41, 507, 20, torch.float32, device)
    hidden, weight, targets = inputs.values()
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), expected)


def test_another_ignore_index(device):
    inputs = make_inputs(41, 57, 20, torch.float32, device, ignored=0.0)
    op, reference = (
        with_options(f, ignore_index=3)
        for f in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    inputs["targets"][::2] = 3
    assert_matches_reference(op, reference, inputs)


def test_upstream_gradient_scales_the_gradients(device):
    inputs = make_inputs(41, 57, 20, torch.float32, device)
    loss = linear_cross_entropy(*inputs.values())
    leaves = [inputs["hidden"], inputs["weight"]]
    ones = torch.autograd.grad(loss, leaves, retain_graph=True)
    scaled = torch.autograd.grad(0.375 * loss, leaves, retain_graph=True)
    torch.testing.assert_close(scaled, tuple(0.375 * gradient for gradient in ones))
    again = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, ones, again))


def test_half_precision_gradients_of_a_long_batch_do_not_underflow(device):
    num_tokens, logit = 256, 13.0
    hidden = torch.ones(num_tokens, 4, dtype=torch.float16, device=device)
    weight = torch.zeros(16, 4, dtype=torch.float16, device=device)
    weight[0] = logit / 4
    targets = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), targets)
    (gradient,) = torch.autograd.grad(1024.0 * loss, weight)
    # Each token's share, probability / num_tokens, is below fp16's smallest number, 6e-8.
    probability = 1.0 / (math.exp(logit) + 15.0)
    expected = torch.full((4,), 1024.0 * probability, device=device)
    torch.testing.assert_close(gradient[1].float(), expected, rtol=0.03, atol=0.0)


def test_nothing_kept(device):
    inputs = make_inputs(9, 57, 20, torch.float32, device, ignored=1.1)
    results = outputs_and_gradients(linear_cross_entropy, inputs)
    for name, result in results.items():
        assert torch.equal(result, torch.zeros_like(result)), name


def test_empty(device):
    inputs = make_inputs(0, 57, 20, torch.float32, device)
    results = outputs_and_gradients(linear_cross_entropy, inputs)
    assert results["output 0"].item() == 0.0
    assert results["gradient of hidden"].shape == (0, 20)
    assert torch.equal(results["gradient of weight"], torch.zeros(57, 20, device=device))


@pytest.mark.parametrize("target", [57, -1, 2**40, -(2**40)])
def test_an_invalid_target_makes_the_loss_nan(target, device):
    inputs = make_inputs(9, 57, 20, torch.float32, device)
    inputs["targets"][4] = target
    loss = linear_cross_entropy(*inputs.values())
    loss.backward()
    assert loss.isnan()
    assert inputs["hidden"].grad[4].isnan().all()
    assert inputs["weight"].grad.isnan().all()


def test_ignored_rows_get_no_gradient_and_change_nothing(device):
    inputs = make_inputs(41, 57, 20, torch.float32, device)
    is_kept = inputs["targets"] != -100
    results = outputs_and_gradients(linear_cross_entropy, inputs)
    assert (results["gradient of hidden"][~is_kept] == 0).all()
    kept_only = {
        "hidden": inputs["hidden"].detach()[is_kept].requires_grad_(),
        "weight": inputs["weight"],
        "targets": inputs["targets"][is_kept],
    }
    for name, result in outputs_and_gradients(linear_cross_entropy, kept_only).items():
        expected = results[name][is_kept] if name == "gradient of hidden" else results[name]
        torch.testing.assert_close(result, expected)


def test_chunk_size_changes_rounding_alone(device):
    inputs = make_inputs(41, 57, 20, torch.float32, device)
    whole, chunked = (
        outputs_and_gradients(with_options(linear_cross_entropy, chunk_size=n), inputs)
        for n in (64, 7)
    )
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name])


def test_the_gradient_of_weight_is_accumulated_in_fp32(device):
    # Equal contributions, a chunk each: in fp16 the sum would lose more of each as it grows.
    hidden = torch.randn(4).expand(300, 4).to(device, torch.float16)
    weight = torch.randn(8, 4).to(device, torch.float16).requires_grad_()
    targets = torch.full((300,), 3, device=device)
    linear_cross_entropy(hidden, weight, targets, chunk_size=1).backward()
    exact = weight.detach().double().requires_grad_()
    linear_cross_entropy_reference(hidden.double(), exact, targets).backward()
    eps = torch.finfo(torch.float16).eps
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=4 * eps, atol=eps / 8)


@pytest.mark.parametrize(
    ("num_tokens", "vocabulary", "element_size", "expected"),
    [
        (24 * 1024, 49_152, 2, 3584),  # options a, c; and 3584 * V * 2 + V * 1024 * 4 = 0.52 GiB
        (48 * 1024, 49_152, 2, 3584),  # option current
        (8 * 256, 4096, 4, 2048),  # option tiny: one chunk
        (100, 49_152, 2, 128),
        (4096, 10**9, 2, 128),
    ],
)
def test_default_chunk_size(num_tokens, vocabulary, element_size, expected):
    assert default_chunk_size(num_tokens, vocabulary, element_size) == expected


def test_without_gradients_none_are_formed(device):
    inputs = make_inputs(9, 57, 20, torch.float32, device)
    expected = linear_cross_entropy(*inputs.values()).detach()
    frozen = {name: x.detach() for name, x in inputs.items()}
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*inputs.values()), expected)
    loss = linear_cross_entropy(*frozen.values())
    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    op = torch.ops.hamner.linear_cross_entropy
    _, d_hidden, d_weight, _ = op(*frozen.values(), -100, 0.0, None, False)
    assert d_hidden.numel() == d_weight.numel() == 0


def test_one_frozen_input(device):
    inputs = make_inputs(9, 57, 20, torch.float32, device)
    inputs["weight"] = inputs["weight"].detach()
    assert_matches_reference(linear_cross_entropy, linear_cross_entropy_reference, inputs)


def test_not_contiguous(device):
    inputs = make_inputs(9, 57, 20, torch.float32, device)
    views = {
        name: inputs[name].detach().t().contiguous().t().requires_grad_()
        for name in ("hidden", "weight")
    }
    views["targets"] = inputs["targets"].repeat_interleave(2)[::2]
    assert not any(view.is_contiguous() for view in views.values())
    expected = outputs_and_gradients(linear_cross_entropy, inputs)
    for name, result in outputs_and_gradients(linear_cross_entropy, views).items():
        assert torch.equal(result, expected[name]), name


def test_two_runs_give_the_same_bits(device):
    inputs = make_inputs(41, 57, 20, torch.float16, device)
    op = with_options(linear_cross_entropy, chunk_size=16)
    assert_same_bits(op, op, inputs)


def test_compiled_gives_the_same_bits(device):
    inputs = make_inputs(41, 57, 20, torch.float32, device)
    op = with_options(linear_cross_entropy, chunk_size=16, z_loss=1e-3)
    assert_same_bits(op, compiled(op), inputs)
    with torch.no_grad():
        assert torch.equal(compiled(op)(*inputs.values()), op(*inputs.values()))


def test_derivative(device):
    inputs = make_inputs(9, 30, 12, torch.float32, device)
    assert_derivative(with_options(linear_cross_entropy, z_loss=1e-2), inputs)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_opcheck(needs_gradient, device):
    inputs = make_inputs(9, 30, 12, torch.float32, device)
    if not needs_gradient:
        inputs = {name: x.detach() for name, x in inputs.items()}
    torch.library.opcheck(
        torch.ops.hamner.linear_cross_entropy,
        (*inputs.values(), -100, 1e-3, 4, needs_gradient),
    )


GOOD = {
    "hidden": zeros(5, 4),
    "weight": zeros(7, 4),
    "targets": zeros(5, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "hidden is torch.float64", {"hidden": zeros(5, 4).double()}),
        (ValueError, r"hidden has shape \(1, 5, 4\)", {"hidden": zeros(1, 5, 4)}),
        (TypeError, "weight is torch.float16", {"weight": zeros(7, 4).half()}),
        (ValueError, r"weight has shape \(7, 5\)", {"weight": zeros(7, 5)}),
        (ValueError, r"weight has shape \(0, 4\)", {"weight": zeros(0, 4)}),
        (ValueError, "weight is on meta", {"weight": zeros(7, 4).to("meta")}),
        (TypeError, "targets is torch.int32", {"targets": zeros(5, dtype=torch.int32)}),
        (ValueError, r"targets has shape \(6,\)", {"targets": zeros(6, dtype=torch.int64)}),
        (ValueError, "targets is on meta", {"targets": zeros(5, dtype=torch.int64).to("meta")}),
        (ValueError, "chunk_size is 0", {"chunk_size": 0}),
    ],
)
def test_wrong_arguments(error, message, change):
    arguments = {**GOOD, **change}
    with pytest.raises(error, match=message):
        linear_cross_entropy(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments
        )


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("vocabulary", [4096, 49_152])
    def test_training_shape(self, vocabulary):
        inputs = make_inputs(4096 + 77, vocabulary, 1024, torch.bfloat16, "cuda")
        op = with_options(linear_cross_entropy, chunk_size=1024)
        assert_matches_reference(op, linear_cross_entropy_reference, inputs)
        assert_same_bits(op, op, inputs)

    def test_no_host_sync(self):
        inputs = make_inputs(4096, 1000, 64, torch.bfloat16, "cuda")
        linear_cross_entropy(*inputs.values()).backward()  # compiles and loads what it needs
        torch.cuda.synchronize()
        with no_waiting():
            linear_cross_entropy(*inputs.values(), chunk_size=1024).backward()

    def test_extra_memory(self):
        inputs = make_inputs(24 * 1024, 49_152, 1024, torch.bfloat16, "cuda")
        for _ in range(2):  # the first call allocates cuBLAS's workspaces
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss = linear_cross_entropy(*inputs.values())
            peak = torch.cuda.max_memory_allocated() - before
            del loss
        d_hidden = 24 * 1024 * 1024 * 2
        assert peak - d_hidden <= 0.6 * 2**30

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_logits_than_int32(self):
        inputs = make_inputs(2**31 // 65_536 + 3, 65_536, 16, torch.bfloat16, "cuda", ignored=0.0)
        whole, chunked = (
            outputs_and_gradients(with_options(linear_cross_entropy, chunk_size=n), inputs)
            for n in (2**20, None)
        )
        torch.testing.assert_close(whole["output 0"], chunked["output 0"], rtol=1e-5, atol=0.0)
        last_rows = (results["gradient of hidden"][-5:].float() for results in (whole, chunked))
        torch.testing.assert_close(*last_rows, rtol=2e-2, atol=1e-7)
