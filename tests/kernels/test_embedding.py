import pytest
import torch

from hamner.kernels.embedding import BLOCK_N, tied_embedding, tied_embedding_reference
from tests.kernels.gradients import (
    DTYPES,
    assert_derivative,
    assert_matches_reference,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)

VOCABULARY = 7


def tokens_of(name: str) -> torch.Tensor:
    """Runs of equal tokens that lie within blocks, on their borders and across many of them."""
    generator = torch.Generator().manual_seed(0)
    return {
        "one": torch.tensor([3]),
        "rows": torch.randint(VOCABULARY, (3, 11), generator=generator),
        "all equal": torch.full((5 * BLOCK_N + 3,), 2),
        "exactly a block": torch.full((BLOCK_N,), 0),
        "a run for each block": torch.arange(4 * BLOCK_N) // BLOCK_N,
        "across a border": torch.tensor([0] * (BLOCK_N - 1) + [1, 1] + [2] * (BLOCK_N - 1)),
        "longer than a pass over partial sums": torch.tensor(
            [1] * 3 + [4] * (BLOCK_N * (BLOCK_N + 2)) + [5, 6]
        ),
        "many": torch.randint(VOCABULARY, (500,), generator=generator),
        "mostly different": torch.randperm(VOCABULARY, generator=generator),
    }[name]


CASES = [
    "one",
    "rows",
    "all equal",
    "exactly a block",
    "a run for each block",
    "across a border",
    "longer than a pass over partial sums",
    "many",
    "mostly different",
]


def inputs_of(name, width, dtype, device):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, width, generator=generator)
    return {
        "tokens": tokens_of(name).to(device),
        "weight": weight.to(device, dtype).requires_grad_(),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, dtype, device):
    assert_matches_reference(
        tied_embedding, tied_embedding_reference, inputs_of(name, 24, dtype, device)
    )


@pytest.mark.parametrize("width", [1, 33, 520])
def test_odd_widths(width, device):
    assert_matches_reference(
        tied_embedding, tied_embedding_reference, inputs_of("many", width, torch.float32, device)
    )


def test_the_gradient_of_the_head_alone_passes_through(device):
    inputs = inputs_of("rows", 24, torch.float32, device)
    _, head_weight = tied_embedding(*inputs.values())
    gradient = torch.randn_like(head_weight)
    head_weight.backward(gradient)
    assert torch.equal(inputs["weight"].grad, gradient)


def test_without_a_head(device):
    """Rows of tokens that did not occur have no gradient."""
    inputs = inputs_of("exactly a block", 24, torch.float32, device)
    x, _ = tied_embedding(*inputs.values())
    x.backward(torch.ones_like(x))
    expected = torch.zeros(VOCABULARY, 24, device=device)
    expected[0] = BLOCK_N
    assert torch.equal(inputs["weight"].grad, expected)


def test_rows_of_absent_tokens_keep_the_heads_gradient(device):
    inputs = inputs_of("across a border", 24, torch.float16, device)
    x, head_weight = tied_embedding(*inputs.values())
    gradient = torch.randn_like(head_weight)
    torch.autograd.backward((x, head_weight), (torch.ones_like(x), gradient.clone()))
    assert torch.equal(inputs["weight"].grad[3:], gradient[3:])


def test_empty(device):
    inputs = {
        "tokens": torch.empty(0, dtype=torch.int64, device=device),
        "weight": torch.ones(VOCABULARY, 8, device=device, requires_grad=True),
    }
    results = outputs_and_gradients(tied_embedding, inputs)
    assert results["output 0"].shape == (0, 8)


def test_not_contiguous(device):
    inputs = inputs_of("rows", 24, torch.float32, device)
    view = inputs["tokens"].t().contiguous().t()
    assert not view.is_contiguous()
    assert_same_bits(lambda tokens, weight: tied_embedding(view, weight), tied_embedding, inputs)


def test_two_runs_give_the_same_bits(device):
    assert_same_bits(tied_embedding, tied_embedding, inputs_of("many", 24, torch.float16, device))


def test_derivative(device):
    assert_derivative(tied_embedding, inputs_of("many", 8, torch.float32, device))


def test_compiled_gives_the_same_bits(device):
    def tied_model(tokens, weight):
        x, head_weight = tied_embedding(tokens, weight)
        return torch.nn.functional.linear(torch.tanh(x), head_weight)

    inputs = inputs_of("rows", 24, torch.float32, device)
    results = outputs_and_gradients(tied_model, inputs)
    for name, result in outputs_and_gradients(compiled(tied_model), inputs).items():
        torch.testing.assert_close(result, results[name])


def test_opcheck(device):
    d_x, d_weight = torch.randn(5, 8, device=device), torch.randn(VOCABULARY, 8, device=device)
    tokens = torch.tensor([0, 1, 1, 6, 0], device=device)
    torch.library.opcheck(torch.ops.hamner.add_embedding_gradient_, (d_x, tokens, d_weight))


@pytest.mark.parametrize(
    ("error", "message", "tokens", "weight"),
    [
        (TypeError, "tokens is", torch.zeros(2, dtype=torch.int32), torch.zeros(3, 4)),
        (TypeError, "weight is", torch.zeros(2, dtype=torch.int64), torch.zeros(3, 4).double()),
        (ValueError, "weight has shape", torch.zeros(2, dtype=torch.int64), torch.zeros(3)),
        (
            ValueError,
            "tokens is on",
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(3, 4, device="meta"),
        ),
    ],
)
def test_wrong_arguments(error, message, tokens, weight):
    with pytest.raises(error, match=message):
        tied_embedding(tokens, weight)


@pytest.mark.gpu
class TestOnGpu:
    def test_training_shape(self):
        """As in text: a few tokens are very frequent, most are rare."""
        generator = torch.Generator().manual_seed(0)
        ranks = torch.rand(24, 1024, generator=generator)
        inputs = {
            "tokens": (49_152**ranks - 1).long().cuda(),
            "weight": torch.randn(49_152, 1024, generator=generator).cuda().bfloat16(),
        }
        inputs["weight"].requires_grad_()
        assert_matches_reference(tied_embedding, tied_embedding_reference, inputs)
        assert_same_bits(tied_embedding, tied_embedding, inputs)

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self):
        rows, width = 2**31 // 1024 + 40, 1024
        d_weight = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
        tokens = torch.arange(rows - 40, rows, device="cuda").repeat(2)
        d_x = torch.randn(80, width, device="cuda", dtype=torch.bfloat16)
        torch.ops.hamner.add_embedding_gradient_(d_x, tokens, d_weight)
        expected = (d_x[:40].float() + d_x[40:].float()).bfloat16()
        assert torch.equal(d_weight[-40:], expected)
        assert not d_weight[:-40].any()
