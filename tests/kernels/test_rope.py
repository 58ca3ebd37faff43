import pytest
import torch
from torch import zeros

from hamner.kernels.rope import (
    launch_packed_rotation,
    rope,
    rope_packed_,
    rope_packed_reference,
    rope_reference,
)
from tests.kernels.gradients import (
    DTYPES,
    assert_as_accurate_as_torch,
    assert_derivative,
    assert_matches_reference,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)


def make_tables(num_positions, head_dim, device, dtype=torch.float32):
    """Make Llama's cos and sin, theta 10,000."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(num_positions)[:, None] * frequencies
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def make_inputs(shape, num_kv_heads, dtype, device, tables_dtype=torch.float32):
    """Make q of this shape, k with num_kv_heads, and tables with two rows to spare."""
    generator = torch.Generator().manual_seed(0)
    batch, time, _, head_dim = shape
    q = torch.randn(shape, generator=generator).to(device, dtype)
    k = torch.randn(batch, time, num_kv_heads, head_dim, generator=generator).to(device, dtype)
    cos, sin = make_tables(time + 2, head_dim, device, tables_dtype)
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), "cos": cos, "sin": sin}


def make_packed(batch, time, num_heads, num_kv_heads, head_dim, dtype, device):
    generator = torch.Generator().manual_seed(0)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    return torch.randn(batch, time, width, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_kv_heads"),
    [((1, 1, 1, 2), 1), ((2, 19, 5, 6), 5), ((2, 9, 6, 64), 2), ((1, 3, 2, 128), 1)],
)
def test_accuracy(shape, num_kv_heads, dtype, device):
    assert_matches_reference(rope, rope_reference, make_inputs(shape, num_kv_heads, dtype, device))


def test_tables_in_half_precision(device):
    inputs = make_inputs((2, 9, 3, 16), 1, torch.float16, device, tables_dtype=torch.float16)
    assert_matches_reference(rope, rope_reference, inputs)


def test_halves_rotate_as_in_llama(device):
    cos, sin = torch.tensor([[0.6]], device=device), torch.tensor([[0.8]], device=device)
    q = torch.tensor([1.0, 2.0], device=device).view(1, 1, 1, 2)
    rotated, _ = rope(q, q, cos, sin)
    torch.testing.assert_close(
        rotated.flatten(), torch.tensor([1 * 0.6 - 2 * 0.8, 2 * 0.6 + 1 * 0.8], device=device)
    )


def test_scores_depend_on_distance_alone(device):
    head_dim = 16
    cos, sin = make_tables(12, head_dim, device)
    q = torch.randn(head_dim, device=device).expand(1, 12, 1, head_dim)
    k = torch.randn(head_dim, device=device).expand(1, 12, 1, head_dim)
    q, k = (x[0, :, 0] for x in rope(q, k, cos, sin))
    scores = q @ k.t()
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_positions", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 2), (5, 2, 24), (3, 1, 64), (33, 3, 8)]
)
def test_packed(num_heads, num_kv_heads, head_dim, has_positions, dtype, device):
    qkv = make_packed(2, 11, num_heads, num_kv_heads, head_dim, dtype, device)
    positions = None
    if has_positions:  # two documents in the first sequence, three in the second
        positions = torch.tensor(
            [[*range(4), *range(7)], [*range(2), *range(8), 0]], dtype=torch.int32, device=device
        )
    check_packed(qkv, num_heads, num_kv_heads, positions)


def check_packed(qkv, num_heads, num_kv_heads, positions=None):
    """Compare with the reference in fp64, leave v as it is, and rotate back."""
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    cos, sin = make_tables(qkv.shape[1], head_dim, qkv.device)
    heads = (num_heads, num_kv_heads, positions)
    rotated = rope_packed_(qkv.clone(), cos, sin, *heads)
    same_dtype = rope_packed_reference(qkv, cos, sin, *heads)
    exact = rope_packed_reference(qkv.double(), cos.double(), sin.double(), *heads)
    assert_as_accurate_as_torch("qkv", rotated, same_dtype, exact)
    v = slice((num_heads + num_kv_heads) * head_dim, None)
    assert torch.equal(rotated[..., v], qkv[..., v])
    assert torch.equal(launch_packed_rotation(qkv, cos, sin, *heads, in_place=False), rotated)

    back = rope_packed_(rotated.clone(), cos, sin, *heads, inverse=True)
    tolerance = 8 * torch.finfo(qkv.dtype).eps
    torch.testing.assert_close(back, qkv, rtol=tolerance, atol=tolerance)


def test_packed_is_in_place_and_agrees_with_rope(device):
    qkv = make_packed(2, 7, 4, 2, 16, torch.float32, device)
    cos, sin = make_tables(7, 16, device)
    q, k, v = qkv.clone().unflatten(-1, (8, 16)).split((4, 2, 2), dim=2)
    expected = torch.cat((*rope(q, k, cos, sin), v), dim=2).flatten(2)
    assert rope_packed_(qkv, cos, sin, 4, 2) is qkv
    assert torch.equal(qkv, expected)


def test_positions_outside_the_table_take_its_nearest_row(device):
    qkv = make_packed(1, 2, 1, 1, 8, torch.float32, device)
    cos, sin = make_tables(5, 8, device)
    inside, outside = (
        torch.tensor([p], dtype=torch.int32, device=device) for p in ([0, 4], [-3, 2**31 - 1])
    )
    assert torch.equal(
        rope_packed_(qkv.clone(), cos, sin, 1, 1, outside),
        rope_packed_(qkv.clone(), cos, sin, 1, 1, inside),
    )


def test_not_contiguous(device):
    inputs = make_inputs((3, 4, 2, 8), 2, torch.float32, device)
    views = dict(inputs)
    for name in ("q", "k"):  # as Hugging Face has them: (B, heads, T, hd) behind a transpose
        view = inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
        assert not view.is_contiguous()
        views[name] = view.requires_grad_()
    expected = outputs_and_gradients(rope, inputs)
    for name, result in outputs_and_gradients(rope, views).items():
        assert torch.equal(result, expected[name]), name


def test_one_token_behind_a_transpose(device):
    # Counts as contiguous, with the stride of its time axis unrelated to its rows.
    q = torch.randn(3, 2, 1, 8, device=device).transpose(1, 2)
    cos, sin = make_tables(1, 8, device)
    cos, sin = cos + 1.0, sin + 1.0
    rotated, _ = rope(q, q, cos, sin)
    torch.testing.assert_close(rotated, rope_reference(q, q, cos, sin)[0])


def test_empty(device):
    results = outputs_and_gradients(rope, make_inputs((0, 4, 2, 8), 1, torch.float32, device))
    assert results["output 0"].shape == results["gradient of q"].shape == (0, 4, 2, 8)


def test_two_runs_give_the_same_bits(device):
    assert_same_bits(rope, rope, make_inputs((2, 9, 3, 16), 1, torch.float16, device))


def test_compiled_gives_the_same_bits(device):
    assert_same_bits(rope, compiled(rope), make_inputs((2, 5, 3, 16), 1, torch.float32, device))
    qkv = make_packed(2, 5, 3, 1, 16, torch.float32, device)
    cos, sin = make_tables(5, 16, device)
    expected = rope_packed_(qkv.clone(), cos, sin, 3, 1)
    assert torch.equal(compiled(rope_packed_)(qkv.clone(), cos, sin, 3, 1), expected)


def test_derivative(device):
    assert_derivative(rope, make_inputs((2, 3, 2, 4), 1, torch.float32, device))


def test_opcheck(device):
    inputs = make_inputs((2, 3, 2, 4), 1, torch.float32, device)
    torch.library.opcheck(torch.ops.hamner.rope, (*inputs.values(), False))
    qkv = make_packed(2, 5, 3, 1, 16, torch.float32, device)
    tables = make_tables(5, 16, device)
    torch.library.opcheck(torch.ops.hamner.rope_packed_, (qkv, *tables, 3, 1, None, False))


GOOD = {"q": zeros(2, 5, 4, 8), "k": zeros(2, 5, 2, 8), "cos": zeros(5, 4), "sin": zeros(5, 4)}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "q is torch.float64", {"q": zeros(2, 5, 4, 8, dtype=torch.float64)}),
        (ValueError, r"q has shape \(5, 4, 8\)", {"q": zeros(5, 4, 8)}),
        (TypeError, "k is torch.float16", {"k": zeros(2, 5, 2, 8, dtype=torch.float16)}),
        (ValueError, r"k has shape \(2, 6, 2, 8\)", {"k": zeros(2, 6, 2, 8)}),
        (ValueError, "k is on meta", {"k": zeros(2, 5, 2, 8).to("meta")}),
        (ValueError, "head size is 7", {"q": zeros(2, 5, 4, 7), "k": zeros(2, 5, 2, 7)}),
        (TypeError, "cos is torch.float64", {"cos": zeros(5, 4, dtype=torch.float64)}),
        (ValueError, r"cos has shape \(4, 4\)", {"cos": zeros(4, 4)}),
        (ValueError, r"sin has shape \(5, 8\)", {"sin": zeros(5, 8)}),
        (ValueError, r"sin has shape \(6, 4\), cos", {"sin": zeros(6, 4)}),
        (ValueError, "sin is on meta", {"sin": zeros(5, 4).to("meta")}),
    ],
)
def test_wrong_arguments(error, message, change):
    with pytest.raises(error, match=message):
        rope(**{**GOOD, **change})


GOOD_PACKED = {
    "qkv": zeros(2, 5, 64),
    "cos": zeros(5, 4),
    "sin": zeros(5, 4),
    "num_heads": 4,
    "num_kv_heads": 2,
}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "qkv is torch.int64", {"qkv": zeros(2, 5, 64, dtype=torch.int64)}),
        (ValueError, "qkv has strides", {"qkv": zeros(2, 64, 5).transpose(1, 2)}),
        (ValueError, r"qkv has shape \(5, 64\)", {"qkv": zeros(5, 64)}),
        (ValueError, "qkv rows have 60 elements", {"qkv": zeros(2, 5, 60)}),
        (ValueError, "num_heads is 0", {"num_heads": 0}),
        (ValueError, "num_kv_heads is 0", {"num_kv_heads": 0}),
        (ValueError, r"cos has shape \(4, 4\)", {"cos": zeros(4, 4)}),
        (TypeError, "positions is torch.int64", {"positions": zeros(2, 5, dtype=torch.int64)}),
        (ValueError, r"positions has shape \(5,\)", {"positions": zeros(5, dtype=torch.int32)}),
    ],
)
def test_wrong_packed_arguments(error, message, change):
    with pytest.raises(error, match=message):
        rope_packed_(**{**GOOD_PACKED, **change})


@pytest.mark.gpu
class TestOnGpu:
    def test_training_shape(self):
        inputs = make_inputs((24, 1024, 16, 64), 4, torch.bfloat16, "cuda")
        assert_matches_reference(rope, rope_reference, inputs)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_packed_training_shape(self, head_dim):
        check_packed(make_packed(24, 1024, 16, 4, head_dim, torch.bfloat16, "cuda"), 16, 4)

    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self):
        rows = 2**31 // 1536 + 3
        qkv = torch.empty(1, rows, 1536, dtype=torch.bfloat16, device="cuda").normal_()
        cos, sin = make_tables(8, 64, "cuda")
        positions = (torch.arange(rows, device="cuda") % 8).to(torch.int32)[None]
        last = qkv[:, -5:].clone()
        expected = rope_packed_reference(last, cos, sin, 16, 4, positions[:, -5:])
        rope_packed_(qkv, cos, sin, 16, 4, positions)
        torch.testing.assert_close(qkv[:, -5:], expected)
