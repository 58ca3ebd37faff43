"""The quantiser is held to plain torch, bit for bit, and to values worked out by hand."""

import math

import pytest
import torch

from hamner.kernels.int8_quantize import (
    MAX_ROW,
    Int8Matrix,
    quantize_int8,
    quantize_int8_reference,
)
from tests.kernels.gradients import DTYPES, compiled

WAYS = [
    pytest.param({"transposed": transposed, "grouped": grouped}, id=f"{transposed=}, {grouped=}")
    for transposed in (False, True)
    for grouped in (False, True)
]
SMALLEST_SCALE = torch.tensor(2.0**-100) / torch.tensor(127.0)


def assert_same(result: Int8Matrix, expected: Int8Matrix):
    for tensor, wanted in zip(result, expected, strict=True):
        assert tensor.is_contiguous()
        assert tensor.dtype == wanted.dtype
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=0, equal_nan=True)


def assert_matches_reference(x: torch.Tensor, way: dict[str, bool]):
    assert_same(quantize_int8(x, **way), quantize_int8_reference(x, **way))


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    sizes = torch.randn(shape[0], 1, generator=generator) + torch.randn(
        shape[1], generator=generator
    )
    x *= torch.exp2(3 * sizes)
    x[:: max(2, shape[0] // 3)] = 0
    return x


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (300, 5), (257, 65), (3, 1100)])
def test_matches_reference(shape, dtype, way, device):
    assert_matches_reference(spread(*shape).to(device, dtype), way)


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_element_may_be_anywhere(way, device):
    largest = [0, 255, 256, 511, 512, 519]
    x = torch.ones(6, 520)
    x[range(6), largest] = 50.0
    x = x.T if way["transposed"] else x
    assert_matches_reference(x.contiguous().to(device), way)


@pytest.mark.parametrize("way", WAYS)
def test_ties_go_to_the_even_number(way, device):
    """A row whose largest is 127 has the scale 1, and so its halves are ties."""
    halves = torch.arange(-126.5, 127, 1.0)
    x = torch.cat((halves, torch.tensor([127.0]))).to(device)
    x = x[:, None] if way["transposed"] else x[None]
    values, scales = quantize_int8(x.contiguous(), **way)
    # Python rounds so too.
    assert values[0].tolist() == [*(round(half) for half in halves.tolist()), 127]
    assert values[0, :3].tolist() == [-126, -126, -124]
    assert scales.tolist() == [[1.0]]


@pytest.mark.parametrize("way", WAYS)
def test_zeros_have_a_scale_that_gives_zeros(way, device):
    values, scales = quantize_int8(torch.zeros(40, 30, device=device), **way)
    assert not values.any()
    assert (scales.cpu() == SMALLEST_SCALE).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_spoils_its_own_scale_alone(bad, way, device):
    x = spread(8, 270).to(device)
    rows = x.T.contiguous() if way["transposed"] else x
    clean = quantize_int8(rows, **way)
    x[5, 260] = bad
    rows = x.T.contiguous() if way["transposed"] else x
    values, scales = quantize_int8(rows, **way)
    assert_same(Int8Matrix(values, scales), quantize_int8_reference(rows, **way))
    is_bad = torch.zeros_like(scales, dtype=torch.bool)
    is_bad[-1, 5] = True
    assert scales[is_bad].isnan().all()
    assert torch.equal(scales[~is_bad], clean.scales[~is_bad])
    first = 256 if way["grouped"] else 0
    assert not values[5, first:].any()
    values[5, first:] = clean.values[5, first:]
    assert torch.equal(values, clean.values)


@pytest.mark.parametrize("way", WAYS)
def test_subnormal_numbers_are_zeros_beside_the_smallest_scale(way, device):
    x = torch.full((3, 3), 2.0**-140, device=device)
    values, scales = quantize_int8(x, **way)
    assert not values.any()
    assert (scales.cpu() == SMALLEST_SCALE).all()
    x[1, 1] = 2.0**-99  # above the smallest maximum: a scale of its own
    assert_matches_reference(x, way)
    assert quantize_int8(x, **way).values[1, 1] == 127


@pytest.mark.parametrize("way", WAYS)
def test_largest_finite_number(way, device):
    x = torch.full((2, 2), -torch.finfo(torch.float32).max, device=device)
    values, scales = quantize_int8(x, **way)
    assert (values == -127).all()
    assert scales.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty(shape, way, device):
    assert_matches_reference(torch.empty(shape, device=device), way)


def test_an_error_of_half_a_step_at_most(device):
    x = spread(64, 600).to(device)
    for way in ({"grouped": False}, {"grouped": True}):
        values, scales = quantize_int8(x, **way)
        steps = scales.T.repeat_interleave(256 if way["grouped"] else 600, dim=1)[:, :600]
        assert ((values * steps - x).abs() <= 0.5001 * steps).all()


def test_compiled_gives_the_same_bits(device):
    x = spread(20, 300).to(device)
    function = compiled(lambda x: quantize_int8(x, transposed=True, grouped=True))
    assert_same(function(x), quantize_int8(x, transposed=True, grouped=True))


def test_opcheck(device):
    inputs = (torch.randn(5, 20, device=device), True, True)
    torch.library.opcheck(torch.ops.hamner.quantize_int8, inputs)


@pytest.mark.parametrize(
    ("error", "message", "x"),
    [
        (TypeError, "x is torch.int8; it must be", torch.ones(2, 3, dtype=torch.int8)),
        (ValueError, r"x has shape \(2, 3, 1\); it must be \(rows, columns\)", torch.ones(2, 3, 1)),
        (ValueError, r"x has strides \(1, 2\); it must be contiguous", torch.ones(3, 2).T),
        (ValueError, "longer rows take grouped=True", torch.ones(1, MAX_ROW + 1)),
    ],
)
def test_rejects(error, message, x):
    with pytest.raises(error, match=message):
        quantize_int8(x)


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("shape", [(24_576, 1024), (4099, 5632), (5632, 1024), (1001, 2817)])
    def test_training_shape(self, shape, dtype, way):
        x = spread(*shape).to("cuda", dtype)
        assert_matches_reference(x, way)
        assert_same(quantize_int8(x, **way), quantize_int8(x, **way))

    def test_longest_row(self):
        x = torch.randn(3, MAX_ROW, device="cuda", dtype=torch.bfloat16)
        assert_matches_reference(x, {})

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self, way):
        rows = 2**31 // 1024 + 300
        x = torch.empty(rows, 1024, dtype=torch.bfloat16, device="cuda").normal_()
        values, scales = quantize_int8(x, **way)
        last = x[-(rows % 256) - 256 :]  # begins with a group of 256
        expected = quantize_int8_reference(last, **way)
        if not way["transposed"]:
            assert torch.equal(values[-len(last) :], expected.values)
        elif way["grouped"]:
            assert torch.equal(values[:, -len(last) :], expected.values)
            assert torch.equal(scales[-2:], expected.scales)
        else:
            steps = scales[0][:, None]
            assert ((values[:, -len(last) :] * steps - last.T).abs() <= 0.5001 * steps).all()
