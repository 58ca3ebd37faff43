import functools
import math

import pytest
import torch
from torch import Tensor

from hamner.kernels.flash_attention import (
    document_bounds,
    flash_attention,
    flash_attention_qkv,
    flash_attention_reference,
    split_qkv,
)
from tests.kernels.gradients import (
    DTYPES,
    assert_derivative,
    assert_matches_reference,
    assert_same_bits,
    compiled,
    outputs_and_gradients,
)

HALF = DTYPES[-1]  # the trainer's dtype where there is a GPU, fp16 in the interpreter


def make_inputs(
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
    heads: tuple[int, int],
    head_sizes: tuple[int, int] = (64, 64),
    batch_size: int = 2,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (batch_size, seq_len, heads[0], head_sizes[0]),
        "k": (batch_size, seq_len, heads[1], head_sizes[0]),
        "v": (batch_size, seq_len, heads[1], head_sizes[1]),
    }
    return {
        name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def make_qkv(device, dtype, seq_len, heads, head_size=64, batch_size=2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    width = (heads[0] + 2 * heads[1]) * head_size
    qkv = torch.randn(batch_size, seq_len, width, generator=generator)
    return qkv.to(device, dtype).requires_grad_()


def documents(rows: list[list[int]], device: torch.device) -> Tensor:
    """Document ids of rows given by their documents' lengths."""
    ids = [
        torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row, dtype=torch.long))
        for row in rows
    ]
    return torch.stack(ids).int().to(device)


def pair(**options):
    """The kernel and its reference with the same options."""
    return (
        functools.partial(flash_attention, **options),
        functools.partial(flash_attention_reference, **options),
    )


def test_more_heads_than_start_together(device):
    """72 query heads and 12 of keys, where 64 and 11 start together: several blocks of each, which
    are dealt out in the same way without the causal mask, and in every dtype."""
    inputs = make_inputs(device, torch.float32, 33, (24, 4), (16, 16), batch_size=3)
    assert_matches_reference(*pair(causal=True), inputs)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
class TestAccuracy:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("seq_len", "heads"), [(17, (6, 1)), (113, (4, 2)), (128, (2, 2))])
    def test_lengths(self, seq_len, heads, dtype, causal, device):
        batch_size = 1 if seq_len > 17 else 2
        inputs = make_inputs(device, dtype, seq_len, heads, batch_size=batch_size)
        assert_matches_reference(*pair(causal=causal), inputs)

    @pytest.mark.parametrize("heads", [(16, 4), (12, 4), (8, 8), (6, 1)], ids=str)
    def test_groups_of_heads(self, heads, causal, device):
        inputs = make_inputs(device, HALF, 33, heads, batch_size=1)
        assert_matches_reference(*pair(causal=causal), inputs)

    @pytest.mark.parametrize("head_sizes", [(128, 128), (64, 128), (128, 64), (16, 16), (40, 72)])
    def test_head_sizes(self, head_sizes, causal, device):
        inputs = make_inputs(device, HALF, 130, (2, 1), head_sizes, batch_size=1)
        assert_matches_reference(*pair(causal=causal), inputs)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_documents(self, dtype, causal, device):
        # Documents of one token, at both ends and across tiles, and one longer than a tile.
        ids = documents([[1, 1, 30, 140, 27, 1], [200]], device)
        inputs = make_inputs(device, dtype, 200, (2, 1))
        assert_matches_reference(*pair(causal=causal, document_ids=ids), inputs)

    def test_documents_that_end_with_tiles(self, causal, device):
        ids = documents([[64, 128, 64], [128, 32, 96]], device)
        inputs = make_inputs(device, HALF, 256, (2, 1))
        assert_matches_reference(*pair(causal=causal, document_ids=ids), inputs)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("head_sizes", [(64, 64), (128, 128), (64, 128)], ids=str)
    @pytest.mark.parametrize(
        ("seq_len", "heads"),
        [
            (17, (6, 1)),
            (113, (16, 4)),
            (128, (12, 4)),
            (1000, (16, 4)),
            (1024, (16, 4)),
            (2048, (8, 8)),
            (3000, (12, 4)),
        ],
    )
    def test_on_gpu(self, seq_len, heads, head_sizes, dtype, causal, device):
        inputs = make_inputs(device, dtype, seq_len, heads, head_sizes)
        assert_matches_reference(*pair(causal=causal), inputs)

    @pytest.mark.gpu
    @pytest.mark.parametrize("head_sizes", [(64, 64), (128, 128), (64, 128)], ids=str)
    @pytest.mark.parametrize("seq_len", [113, 1000, 1024, 3000])
    def test_documents_on_gpu(self, seq_len, head_sizes, causal, device):
        # Cuts at random: documents of 40 tokens and fewer, and of the whole row.
        generator = torch.Generator().manual_seed(0)
        begins = torch.rand(4, seq_len, generator=generator) < torch.tensor(
            [[1 / 40], [1 / 350], [1.0], [0.0]]
        )
        ids = begins.cumsum(dim=1).int().to(device)
        inputs = make_inputs(device, HALF, seq_len, (8, 2), head_sizes, batch_size=4)
        assert_matches_reference(*pair(causal=causal, document_ids=ids), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents_of_one", [True, False])
def test_one_key(documents_of_one, dtype, device):
    """A query that sees one key returns its value; q and k have no influence.

    Their gradients are the rounding of a difference between two equal sums of products, d_out with
    v, so they are compared with that sum's rounding, not with plain torch, which has exact zeros.
    """
    seq_len = 40 if documents_of_one else 1
    inputs = make_inputs(device, dtype, seq_len, (4, 2))
    ids = documents([[1] * seq_len] * 2, device) if documents_of_one else None
    results = outputs_and_gradients(
        functools.partial(flash_attention, document_ids=ids, scale=1.0), inputs
    )
    assert torch.equal(results["output 0"], inputs["v"].repeat_interleave(2, dim=2))
    sums = 64 * max(x.detach().abs().max().item() for x in inputs.values()) ** 2
    for name in ("q", "k"):
        error = results[f"gradient of {name}"].abs().max().item()
        assert error <= 4 * torch.finfo(dtype).eps * sums


def test_scale(device):
    inputs = make_inputs(device, torch.float32, 40, (2, 1))
    assert_matches_reference(*pair(scale=0.3), inputs)


def test_large_scores(device):
    # Scores of some hundreds overflow exp in fp32 unless the maximum is subtracted first.
    inputs = make_inputs(device, torch.float32, 70, (2, 1))
    criterion = {}
    if device.type != "cuda":
        # Backward computes the scores again, from transposed tiles. In the interpreter that is
        # NumPy's matmul, which rounds them as the processor at hand has it; and exp makes of a
        # score's rounding, eps times the score, a relative error.
        scores = 20.0 * torch.einsum("bthd,bsd->bths", inputs["q"], inputs["k"][:, :, 0]).abs()
        criterion = {"floor_eps": scores.max().item()}
    assert_matches_reference(*pair(scale=20.0), inputs, **criterion)


def test_derivative(device):
    inputs = make_inputs(device, torch.float32, 19, (2, 1), (16, 32))
    ids = documents([[5, 14], [19]], device)
    assert_derivative(functools.partial(flash_attention, document_ids=ids), inputs)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_neighbouring_documents_have_no_influence(causal, device):
    """A document's output and gradients: the same bits, whatever else is in the row."""
    attend = functools.partial(
        flash_attention, causal=causal, document_ids=documents([[50, 90, 60]], device)
    )
    inputs = make_inputs(device, torch.float32, 200, (2, 1), batch_size=1)
    others = {name: x.detach().clone() for name, x in inputs.items()}
    for x in others.values():
        x[:, :50] = 100.0
        x[:, 140:] = -100.0
        x.requires_grad_()
    results, changed = outputs_and_gradients(attend, inputs), outputs_and_gradients(attend, others)
    for name, result in results.items():
        assert torch.equal(result[:, 50:140], changed[name][:, 50:140]), f"{name} differs"


def test_future_has_no_influence(device):
    inputs = make_inputs(device, torch.float32, 100, (2, 1))
    with torch.no_grad():
        before = flash_attention(*inputs.values())[:, :70]
        for x in inputs.values():
            x[:, 70:] = 100.0
        assert torch.equal(flash_attention(*inputs.values())[:, :70], before)


def test_document_bounds(device):
    starts, ends = document_bounds(documents([[1, 4, 2], [7]], device))
    assert starts.dtype == ends.dtype == torch.int32
    assert starts.tolist() == [[0, 1, 1, 1, 1, 5, 5], [0] * 7]
    assert ends.tolist() == [[1, 5, 5, 5, 5, 7, 7], [7] * 7]


def test_two_runs_same_bits(device):
    inputs = make_inputs(device, HALF, 150, (4, 2))
    ids = documents([[100, 50], [150]], device)
    attend = functools.partial(flash_attention, document_ids=ids)
    assert_same_bits(attend, attend, inputs)


def followed_by_nan(x: Tensor, count: int) -> Tensor:
    return x.new_full((x.numel() + count,), math.nan)[: x.numel()].view(x.shape)


def test_strided_inputs_and_gradient(device, monkeypatch):
    """Heads before time, a gradient without a contiguous axis, and after each head, after the last
    row and after backward's delta what must have no influence."""
    monkeypatch.setattr(torch, "empty_like", lambda x: followed_by_nan(x, 64))

    def strided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        views = [
            torch.nn.functional.pad(x.transpose(1, 2), (0, 16, 0, 9), value=math.nan)[
                :, :, : x.shape[1], : x.shape[-1]
            ].transpose(1, 2)
            for x in (q, k, v)
        ]
        assert not any(view.is_contiguous() for view in views)
        return flash_attention(*views).permute(3, 1, 0, 2).contiguous()

    def contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v).permute(3, 1, 0, 2).contiguous()

    inputs = make_inputs(device, HALF, 40, (2, 1))
    assert_same_bits(strided, contiguous, inputs)


def test_expanded_gradient(device):
    """`out.sum()` hands back a gradient whose strides are all zero."""
    q, k, v = make_inputs(device, torch.float32, 20, (2, 1)).values()
    actual = torch.autograd.grad(flash_attention(q, k, v).sum(), (q, k, v))
    ones = torch.ones_like(q)
    expected = torch.autograd.grad(flash_attention(q, k, v), (q, k, v), ones)
    for gradient, other in zip(actual, expected, strict=True):
        assert torch.equal(gradient, other)


class TestPacked:
    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("heads", [(4, 2), (2, 2)], ids=str)
    def test_same_bits_as_unpacked(self, heads, causal, device):
        ids = documents([[20, 50], [70]], device)
        options = {"causal": causal, "document_ids": ids, "scale": 0.2}

        def unpacked(qkv: Tensor) -> Tensor:
            return flash_attention(*split_qkv(qkv, *heads), **options).flatten(-2)

        packed = functools.partial(
            flash_attention_qkv, num_heads=heads[0], num_kv_heads=heads[1], **options
        )
        assert_same_bits(packed, unpacked, {"qkv": make_qkv(device, HALF, 70, heads)})

    def test_strided(self, device):
        """qkv as a view of something wider."""
        qkv = make_qkv(device, torch.float32, 30, (4, 2), head_size=16)

        def of_view(qkv: Tensor) -> Tensor:
            view = torch.cat((qkv, qkv[..., :8]), dim=-1)[..., : qkv.shape[-1]]
            assert not view.is_contiguous()
            return flash_attention_qkv(view, 4, 2)

        assert_same_bits(of_view, lambda qkv: flash_attention_qkv(qkv, 4, 2), {"qkv": qkv})

    def test_backward_allocates_one_packed_gradient(self, device):
        qkv = make_qkv(device, HALF, 40, (4, 2))
        out = flash_attention_qkv(qkv, 4, 2)
        (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        assert gradient.is_contiguous()
        assert gradient.untyped_storage().nbytes() == qkv.numel() * qkv.element_size()


class TestRegistration:
    def test_compiled(self, device):
        ids = documents([[20, 50], [70]], device)
        inputs = {"qkv": make_qkv(device, HALF, 70, (4, 2))}

        def attend(qkv: Tensor) -> Tensor:
            return 2 * flash_attention_qkv(2 * qkv, 4, 2, document_ids=ids)

        assert_same_bits(compiled(attend), attend, inputs)

    def test_compiled_unpacked(self, device):
        inputs = make_inputs(device, HALF, 40, (2, 1), (64, 128))
        assert_same_bits(compiled(flash_attention), flash_attention, inputs)

    @pytest.mark.parametrize("with_documents", [False, True])
    def test_opcheck(self, with_documents, device):
        bounds = None
        if with_documents:
            bounds = document_bounds(documents([[3, 9], [12]], device))
        masking = bounds, True, 0.25
        inputs = make_inputs(device, torch.float32, 12, (2, 1), (16, 16))
        ops = torch.ops.hamner
        torch.library.opcheck(ops.flash_attention.default, (*inputs.values(), *masking))
        qkv = make_qkv(device, torch.float32, 12, (2, 1), head_size=16).detach()
        results = ops.flash_attention(*split_qkv(qkv, 2, 1), *masking)
        arguments = results[0].flatten(-2), qkv, *results, *masking, None, None, None
        torch.library.opcheck(ops.flash_attention_qkv_backward.default, arguments)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_empty(shape, device):
    q = torch.zeros(shape, device=device, requires_grad=True)
    k, v = q[:, :, :1], q[:, :, :1]
    out = flash_attention(q, k, v)
    assert out.shape == shape
    out.sum().backward()
    assert q.grad.shape == shape


@pytest.mark.gpu
@pytest.mark.xdist_group("most of the GPU's memory")
def test_offsets_beyond_32_bits(device):
    """Rows of the batch 2^31 elements apart (4 GiB)."""
    near = make_qkv(device, torch.bfloat16, 128, (4, 2)).detach().requires_grad_()
    storage = torch.zeros(2**31 + near[0].numel(), dtype=torch.bfloat16, device=device)
    far = storage.as_strided(near.shape, (2**31, *near.stride()[1:]))
    far.copy_(near.detach())
    far.requires_grad_()
    attend = functools.partial(flash_attention_qkv, num_heads=4, num_kv_heads=2)
    results, expected = (outputs_and_gradients(attend, {"qkv": qkv}) for qkv in (far, near))
    for name, result in results.items():
        assert torch.equal(result, expected[name]), f"{name} differs"


class TestWrongArguments:
    @pytest.fixture
    def qkv(self, device):
        return tuple(
            x.detach() for x in make_inputs(device, torch.float32, 8, (4, 2), (16, 16)).values()
        )

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda q, k, v: (q[0], k, v), ValueError, r"q has shape .* it must be \(B, T"),
            (lambda q, k, v: (q.double(), k, v), TypeError, "q is torch.float64"),
            (lambda q, k, v: (q, k.half(), v), TypeError, "k is torch.float16, q is"),
            (lambda q, k, v: (q, k, v[:, :4]), ValueError, r"v has \(B, T\) \(2, 4\)"),
            (lambda q, k, v: (q, k[..., :8], v), ValueError, "k has head size 8, q 16"),
            (lambda q, k, v: (q, k, v[:, :, :1]), ValueError, "v has 1 heads, k 2"),
            (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "num_heads 3 must be a positive"),
            (lambda q, k, v: (q[..., ::2], k, v), ValueError, "q has strides .* last must be 1"),
            (
                lambda q, k, v: (q, k, v.repeat(1, 1, 1, 9)),
                ValueError,
                "v has head size 144; it must be 1 to 128",
            ),
        ],
    )
    def test_tensors(self, change, error, message, qkv):
        with pytest.raises(error, match=message):
            flash_attention(*change(*qkv))

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
    def test_scale(self, scale, qkv):
        with pytest.raises(ValueError, match="scale is"):
            flash_attention(*qkv, scale=scale)

    def test_document_ids(self, qkv, device):
        ids = torch.zeros(2, 8, dtype=torch.int32, device=device)
        with pytest.raises(TypeError, match="document_ids is torch.int64"):
            flash_attention(*qkv, document_ids=ids.long())
        with pytest.raises(ValueError, match=r"document_ids has shape \(2, 7\)"):
            flash_attention(*qkv, document_ids=ids[:, :7])

    def test_packed(self, device):
        qkv = torch.zeros(2, 8, 4 * 16, device=device)
        with pytest.raises(ValueError, match="qkv has shape"):
            flash_attention_qkv(qkv[0], 2, 1)
        with pytest.raises(ValueError, match="multiple of num_heads"):
            flash_attention_qkv(qkv, 3, 1)
        with pytest.raises(ValueError, match="num_heads 2 must be a positive multiple"):
            flash_attention_qkv(qkv, 2, 0)
        with pytest.raises(ValueError, match="qkv has head size 0"):
            flash_attention_qkv(qkv[..., :0], 2, 1)

    def test_bfloat16_in_the_interpreter(self):
        if torch.cuda.is_available():
            pytest.skip("the kernels are compiled here")
        qkv = torch.zeros(1, 4, 64, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="bfloat16"):
            flash_attention_qkv(qkv, 2, 1)
