"""Attention stands beside SDPA's flash and cuDNN kernels, the flash-attn package and FlexAttention.

    pytest bench/test_flash_attention.py --benchmark-only

24,576 tokens, 16 query and 4 key/value heads, causal, bf16. With documents (mean length 350) the
peers are those that can skip: flash-attn's variable lengths and FlexAttention's block mask.

Each row first compares the output and gradients of one group of heads with fp32 plain torch, and is
not timed if they disagree: our row fails then, a peer's is skipped with what is wrong. Medians with
10th and 90th percentiles and TFLOP/s (pairs that are seen, 4 hd FLOPs forward and 10 backward) are
in the row's extra_info (`--benchmark-json`); pytest-benchmark's own columns include the launch from
Python and a wait for the GPU.

Backward with RoPE's is timed as the model runs it, in attention's own kernels ("hamner"), and with
RoPE's kernel behind them ("rope apart"); each is compared with the other.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from bench import scale
from bench.record import record
from hamner.kernels.flash_attention import (
    document_bounds,
    flash_attention,
    flash_attention_reference,
    split_qkv,
)
from hamner.kernels.rope import launch_packed_rotation
from hamner.plan import costs
from hamner.plan.costs import Cost

pytestmark = [pytest.mark.needs_gpu, pytest.mark.usefixtures("keep_graphs")]

TOKENS, HEADS, KV_HEADS = scale.pick((24_576, 16, 4), (32, 4, 2))
GROUP = HEADS // KV_HEADS
DEVICE, DTYPE = scale.device(), scale.dtype()
MEAN_DOCUMENT_LENGTH = scale.pick(350, 8)
# (sequence length, head size): the options', longer ones, the other head size
SHAPES = scale.pick([(1024, 64), (512, 64), (2048, 64), (8192, 64), (1024, 128)], [(16, 16)])
SHAPES_WITH_DOCUMENTS = scale.pick([(1024, 64), (8192, 64)], [(16, 16)])
QUICK = {((1024, 64), "hamner"), ((1024, 64), "sdpa-cudnn")}
MAX_RELATIVE_ERROR = 0.02  # of norms: bf16 keeps 8 bits, and backward rounds some steps in between

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    q: Tensor  # (B, T, H, hd), requires a gradient, as k and v
    k: Tensor  # (B, T, KV, hd)
    v: Tensor  # (B, T, KV, hd)
    d_out: Tensor  # (B, T, H, hd)
    document_ids: Tensor | None  # (B, T) int32
    pairs: int  # of a query and a key that it sees, over the batch


def make_problem(seq_len: int, head_size: int, with_documents: bool) -> Problem:
    generator = torch.Generator(DEVICE).manual_seed(0)
    batch_size = TOKENS // seq_len

    def randn(heads: int) -> Tensor:
        shape = (batch_size, seq_len, heads, head_size)
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)

    q, k, v = (randn(heads).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS))
    shape, document_ids = (batch_size, seq_len), None
    positions = torch.arange(seq_len, device=DEVICE).expand(shape)
    if with_documents:
        begins = torch.rand(shape, generator=generator, device=DEVICE) < 1 / MEAN_DOCUMENT_LENGTH
        document_ids = begins.cumsum(dim=1).int()
        positions = positions - document_bounds(document_ids)[0]
    return Problem(
        q, k=k, v=v, d_out=randn(HEADS), document_ids=document_ids, pairs=int((positions + 1).sum())
    )


def cost_of(problem: Problem, *, backward: bool) -> Cost:
    """The function counts the work of what is seen."""
    head_size = problem.q.shape[-1]
    return costs.attention(
        problem.pairs,
        problem.q.numel(),
        problem.k.numel(),
        width=HEADS * head_size,
        element_size=DTYPE.itemsize,
        backward=backward,
    )


def hamner_attention(problem: Problem) -> Attend:
    return functools.partial(flash_attention, document_ids=problem.document_ids)


def sdpa(backend: SDPBackend, problem: Problem) -> Attend:
    if problem.document_ids is not None:
        pytest.skip("SDPA's fast kernels take no document mask")
    if scale.SMOKE:
        backend = SDPBackend.MATH

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def flash_attn(problem: Problem) -> Attend:
    package = pytest.importorskip("flash_attn")
    if problem.document_ids is None:
        return functools.partial(package.flash_attn_func, causal=True)
    batch_size, seq_len = problem.document_ids.shape
    starts, _ = document_bounds(problem.document_ids)
    bounds = (starts == torch.arange(seq_len, device=DEVICE)).flatten().nonzero().flatten()
    lengths = pad(bounds, (0, 1), value=starts.numel()).int()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = package.flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)), lengths, lengths, seq_len, seq_len, causal=True
        )
        return out.unflatten(0, (batch_size, seq_len))

    return attend


compiled_flex_attention = functools.cache(lambda: scale.compiled(flex_attention, fullgraph=True))


def flex(problem: Problem) -> Attend:
    if scale.SMOKE:
        pytest.skip("FlexAttention without a code generator differentiates on a GPU only")
    batch_size, seq_len = problem.q.shape[:2]
    ids = problem.document_ids

    def causal(batch, head, query, key):
        return query >= key

    def causal_in_document(batch, head, query, key):
        return (query >= key) & (ids[batch, query] == ids[batch, key])

    mask = create_block_mask(
        causal if ids is None else causal_in_document,
        None if ids is None else batch_size, None, seq_len, seq_len, device=DEVICE,
    )  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


IMPLEMENTATIONS: dict[str, Callable[[Problem], Attend]] = {
    "hamner": hamner_attention,
    "sdpa-flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "flash-attn": flash_attn,
    "flex": flex,
}


def check(attend: Attend, problem: Problem) -> None:
    """The function compares the last row of the batch and last group of heads, out and
    gradients."""
    inputs = problem.q, problem.k, problem.v
    out = attend(*inputs)
    actual = (out, *torch.autograd.grad(out, inputs, problem.d_out))
    actual = [x[-1:, :, -GROUP if x.shape[2] == HEADS else -1 :] for x in actual]
    one = [
        x.detach()[-1:, :, -heads:].float().requires_grad_()
        for x, heads in zip(inputs, (GROUP, 1, 1), strict=True)
    ]
    ids = None if problem.document_ids is None else problem.document_ids[-1:]
    out = flash_attention_reference(*one, document_ids=ids)
    d_out = problem.d_out[-1:, :, -GROUP:].float()
    expected = (out, *torch.autograd.grad(out, one, d_out))
    for name, x, y in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = (x.float() - y).norm() / y.norm()
        assert error <= MAX_RELATIVE_ERROR, f"not timed: {name} is off by {error:.1%}"


ROWS = [
    pytest.param(
        *shape,
        with_documents,
        implementation,
        marks=[pytest.mark.quick] if (shape, implementation) in QUICK else [],
        id=f"{shape[0]}-{shape[1]}-{'documents' if with_documents else 'causal'}-{implementation}",
    )
    for with_documents, shapes in ((False, SHAPES), (True, SHAPES_WITH_DOCUMENTS))
    for shape in shapes
    for implementation in IMPLEMENTATIONS
]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("seq_len", "head_size", "with_documents", "implementation"), ROWS)
def test_attention(
    seq_len, head_size, with_documents, implementation, direction, benchmark, ceilings
):
    mask = "documents" if with_documents else "causal"
    op = f"attention {mask} {seq_len} x {head_size} {direction}"
    problem = make_problem(seq_len, head_size, with_documents)
    attend = IMPLEMENTATIONS[implementation](problem)
    try:
        check(attend, problem)
    except AssertionError as error:
        if implementation == "hamner":
            raise
        pytest.skip(str(error))
    inputs = problem.q, problem.k, problem.v
    if direction == "forward":
        call = functools.partial(attend, *inputs)
    else:
        out = attend(*inputs)
        call = functools.partial(torch.autograd.grad, out, inputs, problem.d_out, retain_graph=True)
    record(
        benchmark,
        call,
        ceilings,
        op=op,
        implementation=implementation,
        cost=cost_of(problem, backward=direction == "backward"),
    )


def backward_with_rope(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Each implementation gives the gradient of a packed qkv as it was before q and k were
    rotated."""
    heads, head_size = (HEADS, KV_HEADS), problem.q.shape[-1]
    ids, documents, positions = problem.document_ids, None, None
    qkv = torch.cat((problem.q, problem.k, problem.v), dim=2).detach().flatten(2)
    if ids is not None:
        documents = document_bounds(ids)
        positions = torch.arange(qkv.shape[1], dtype=torch.int32, device=DEVICE) - documents[0]
    masking = documents, True, head_size**-0.5
    results = torch.ops.hamner.flash_attention(*split_qkv(qkv, *heads), *masking)
    inputs = (problem.d_out.flatten(2), qkv, *results, *masking)
    angles = torch.rand(qkv.shape[1], head_size // 2, device=DEVICE)
    tables = angles.cos(), angles.sin()
    attention = torch.ops.hamner.flash_attention_qkv_backward

    def apart() -> Tensor:
        d_qkv = attention(*inputs, None, None, None)
        return launch_packed_rotation(
            d_qkv, *tables, *heads, positions, inverse=True, in_place=False
        )

    return {"hamner": lambda: attention(*inputs, *tables, positions), "rope apart": apart}


@pytest.mark.parametrize("implementation", ["hamner", "rope apart"])
@pytest.mark.parametrize("with_documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize(("seq_len", "head_size"), SHAPES_WITH_DOCUMENTS)
def test_backward_with_rope(
    seq_len, head_size, with_documents, implementation, benchmark, ceilings
):
    mask = "documents" if with_documents else "causal"
    op = f"attention and rope {mask} {seq_len} x {head_size} backward"
    problem = make_problem(seq_len, head_size, with_documents)
    calls = backward_with_rope(problem)
    folded, apart = (call().float() for call in calls.values())
    error = (folded - apart).norm() / apart.norm()
    assert error <= MAX_RELATIVE_ERROR, f"not timed: the gradients differ by {error:.1%}"
    record(
        benchmark,
        calls[implementation],
        ceilings,
        op=op,
        implementation=implementation,
        cost=cost_of(problem, backward=True),
    )
