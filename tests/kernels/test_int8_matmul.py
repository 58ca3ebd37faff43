"""The int8 matmul is held to integer sums and the same fp32 scaling, bit for bit."""

import math

import pytest
import torch

from hamner.kernels.int8_matmul import MAX_SUM, int8_matmul, int8_matmul_reference
from hamner.kernels.int8_quantize import Int8Matrix, num_groups, quantize_int8
from tests.kernels.gradients import compiled

MODES = [pytest.param(grouped, id="grouped" if grouped else "rows") for grouped in (False, True)]
# The interpreter's bf16 is wrong.
OUTPUTS = (torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16)


def operand(rows: int, length: int, grouped: bool, device, seed: int = 0) -> Int8Matrix:
    """Any values and scales of many sizes, whatever a quantiser would make of them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (rows, length), generator=generator, dtype=torch.int8)
    scales = torch.randn(num_groups(length, grouped), rows, generator=generator).exp() / 1000
    return Int8Matrix(values.to(device), scales.to(device))


def operands(m: int, n: int, k: int, grouped: bool, device) -> tuple[Int8Matrix, Int8Matrix]:
    return operand(m, k, grouped, device), operand(n, k, grouped, device, seed=1)


def int64_result(a: Int8Matrix, b: Int8Matrix) -> torch.Tensor:
    """The documented formula in fp32, on sums in int64, on the CPU."""
    (a_values, a_scales), (b_values, b_scales) = ((v.cpu().long(), s.cpu()) for v, s in (a, b))
    width = 256 if len(a_scales) > 1 else max(1, a_values.shape[1])
    total = torch.zeros(len(a_values), len(b_values))
    for group, (a_scale, b_scale) in enumerate(zip(a_scales, b_scales, strict=True)):
        columns = slice(group * width, (group + 1) * width)
        sums = a_values[:, columns] @ b_values[:, columns].T
        total = total + sums.float() * a_scale[:, None] * b_scale[None, :]
    return total


def assert_matches_reference(a: Int8Matrix, b: Int8Matrix, dtype: torch.dtype):
    out = int8_matmul(a, b, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, int8_matmul_reference(a, b, dtype))


# (M, N, K): one element; less than a tile; a tile and a bit of everything; whole tiles.
@pytest.mark.parametrize("grouped", MODES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 7), (17, 33, 257), (129, 257, 321), (256, 256, 512), (2, 130, 1100)]
)
def test_equals_int64_sums(shape, grouped, device):
    a, b = operands(*shape, grouped=grouped, device=device)
    expected = int64_result(a, b)
    for dtype in OUTPUTS:
        out = int8_matmul(a, b, dtype)
        assert out.dtype == dtype
        assert torch.equal(out.cpu(), expected.to(dtype))
        assert torch.equal(int8_matmul_reference(a, b, dtype).cpu(), expected.to(dtype))


@pytest.mark.parametrize("grouped", MODES)
def test_the_largest_sums(grouped, device):
    """K is that of a weight's gradient at 24 x 1024 tokens, and all values extreme."""
    length = 24_576
    values = torch.full((3, length), 127, dtype=torch.int8, device=device)
    values[1] = -127
    values[2, ::2] = -127
    scales = torch.ones(num_groups(length, grouped), 3, device=device)
    a = b = Int8Matrix(values, scales)
    largest = length * 127.0**2
    expected = torch.tensor([[largest, -largest, 0], [-largest, largest, 0], [0, 0, largest]])
    assert torch.equal(int8_matmul(a, b, torch.float32).cpu(), expected)


def test_an_outlier_spoils_its_group_alone(device):
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    x[:, 300] = 1000.0
    one = torch.zeros(1, 1024, device=device)
    one[0, 600] = 1.0
    by_group, by_row = (
        int8_matmul(*(quantize_int8(y, grouped=grouped) for y in (x, one)), torch.float32)
        for grouped in (True, False)
    )
    assert ((by_group - x[:, 600:601]).abs() < 0.02).all()
    assert (by_row == 0).all()


@pytest.mark.parametrize("grouped", MODES)
def test_a_scale_that_is_not_finite_spoils_its_row_alone(grouped, device):
    a, b = operands(5, 6, 600, grouped=grouped, device=device)
    clean = int8_matmul(a, b, torch.float32)
    a.scales[-1, 2] = math.nan
    out = int8_matmul(a, b, torch.float32)
    assert out[2].isnan().all()
    others = torch.arange(5, device=device) != 2
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("grouped", MODES)
@pytest.mark.parametrize("shape", [(0, 3, 300), (3, 0, 300), (3, 4, 0)])
def test_empty(shape, grouped, device):
    out = int8_matmul(*operands(*shape, grouped=grouped, device=device), torch.float32)
    assert torch.equal(out, torch.zeros(shape[0], shape[1], device=device))


def test_compiled_gives_the_same_bits(device):
    a, b = operands(9, 10, 300, grouped=True, device=device)
    function = compiled(lambda a, b: int8_matmul(a, b, torch.float32))
    assert torch.equal(function(a, b), int8_matmul(a, b, torch.float32))


def test_opcheck(device):
    a, b = operands(3, 4, 300, grouped=True, device=device)
    torch.library.opcheck(torch.ops.hamner.int8_matmul, (*a, *b, torch.float32))


def ones(rows: int, length: int, groups: int = 1) -> Int8Matrix:
    return Int8Matrix(torch.ones(rows, length, dtype=torch.int8), torch.ones(groups, rows))


@pytest.mark.parametrize(
    ("error", "message", "a", "b"),
    [
        (TypeError, "a.values is torch.float32",
         ones(2, 3)._replace(values=torch.ones(2, 3)), None),
        (ValueError, r"b.values has shape \(4, 5\); it must be \(rows, 3\)", None, ones(4, 5)),
        (ValueError, r"a.values has strides \(1, 2\); it must be contiguous",
         ones(2, 3)._replace(values=ones(3, 2).values.T), None),
        (TypeError, "b.scales is torch.float64", None,
         ones(4, 3)._replace(scales=torch.ones(1, 4).double())),
        (ValueError, r"b.scales has shape \(1, 3\)", None,
         ones(4, 3)._replace(scales=torch.ones(1, 3))),
        (ValueError, r"b.scales has strides \(1, 2\)", ones(2, 300, groups=2),
         ones(2, 300)._replace(scales=torch.ones(2, 2).T)),
        (ValueError, "a.scales has 3 groups; K 300 has 1 or 2", ones(2, 300, groups=3),
         ones(4, 300, groups=3)),
        (ValueError, r"b.scales has shape \(1, 4\); it must be \(2, 4\)", ones(2, 300, groups=2),
         ones(4, 300)),
        (ValueError, "b.values is on meta", None, Int8Matrix(*(x.to("meta") for x in ones(4, 3)))),
        (ValueError, "b.scales is on meta", None,
         ones(4, 3)._replace(scales=torch.ones(1, 4, device="meta"))),
        (ValueError, "longer rows take grouped scales", ones(1, MAX_SUM + 1), ones(1, MAX_SUM + 1)),
    ],
)  # fmt: skip
def test_rejects(error, message, a, b):
    with pytest.raises(error, match=message):
        int8_matmul(ones(2, 3) if a is None else a, ones(4, 3) if b is None else b)


def test_rejects_another_output():
    with pytest.raises(TypeError, match="dtype is torch.int32; it must be"):
        int8_matmul(ones(2, 3), ones(4, 3), torch.int32)


@pytest.mark.gpu
class TestOnGpu:
    # The three matmuls of each linear layer of option a, and tails in every dimension.
    @pytest.mark.parametrize("grouped", MODES)
    @pytest.mark.parametrize(
        "shape",
        [
            *((24_576, 1536, 1024), (24_576, 1024, 1536), (1536, 1024, 24_576)),
            *((24_576, 1024, 1024), (1024, 1024, 24_576)),
            *((24_576, 5632, 1024), (24_576, 1024, 5632), (5632, 1024, 24_576)),
            *((24_576, 1024, 2816), (24_576, 2816, 1024), (1024, 2816, 24_576)),
            *((1001, 1003, 1007), (1000, 1000, 1040), (129, 5000, 2817)),
        ],
    )
    def test_training_shape(self, shape, grouped):
        a, b = operands(*shape, grouped=grouped, device="cuda")
        for dtype in (torch.bfloat16, torch.float32):
            assert_matches_reference(a, b, dtype)
        assert torch.equal(int8_matmul(a, b), int8_matmul(a, b))

    def test_equals_torchs_own(self):
        a, b = operands(4096, 1536, 1024, grouped=False, device="cuda")
        sums = torch._int_mm(a.values, b.values.T)
        assert torch.equal(
            int8_matmul(a, b, torch.float32), sums.float() * a.scales[0][:, None] * b.scales[0]
        )

    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_longest_sum(self, sign):
        a = Int8Matrix(
            torch.full((130, MAX_SUM), 127 * sign, dtype=torch.int8, device="cuda"),
            torch.ones(1, 130, device="cuda"),
        )
        b = Int8Matrix(a.values.abs(), a.scales)
        assert (int8_matmul(a, b, torch.float32) == float(sign * MAX_SUM * 127**2)).all()

    @pytest.mark.parametrize("grouped", MODES)
    @pytest.mark.xdist_group("most of the GPU's memory")
    def test_more_elements_than_int32(self, grouped):
        rows = 2**31 // 1024 + 3
        a = operand(300, 1024, grouped, "cuda")
        many = Int8Matrix(
            a.values.repeat(rows // 300 + 1, 1)[:rows],
            a.scales.repeat(1, rows // 300 + 1)[:, :rows].contiguous(),
        )
        b = operand(1024, 1024, grouped, "cuda", seed=1)
        out = int8_matmul(many, b)
        last = Int8Matrix(many.values[-5:], many.scales[:, -5:].contiguous())
        assert torch.equal(out[-5:], int8_matmul_reference(last, b))
