import functools
import json
import math
import sys
import types

import pytest
import torch
from torch import Tensor

from hamner.errors import UserError
from hamner.kernels.flash_attention import flash_attention_reference, split_qkv
from hamner.model import attention, attention_timing
from hamner.model.attention import (
    AttentionBackend,
    AttentionShape,
    document_positions,
    get_attention,
    split_halves,
)
from tests.kernels.accuracy import assert_as_accurate_as_torch
from tests.kernels.gradients import assert_same_bits, compiled, outputs_and_gradients

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16
REFERENCE = AttentionBackend(
    "reference",
    lambda qkv, num_heads, num_kv_heads, **options: flash_attention_reference(
        *split_qkv(qkv, num_heads, num_kv_heads), **options
    ).flatten(-2),
    flash_attention_reference,
    "for the tests",
)


def choose(name: str, device: torch.device, **changes) -> AttentionBackend:
    asked = {
        "device": device,
        "dtype": torch.float32,
        "head_size": HEAD_SIZE,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "seq_len": 32,
        "micro_batch_size": 2,
    }
    return get_attention(name, AttentionShape(**(asked | changes)))


def make_qkv(device, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 37, (HEADS + 2 * KV_HEADS) * HEAD_SIZE, generator=generator)
    return qkv.to(device, dtype).requires_grad_()


def make_document_ids(device, seq_len=37) -> Tensor:
    starts = torch.zeros(2, seq_len, dtype=torch.int32)
    starts[0, [1, 11, 30]] = 1
    return starts.cumsum(dim=1).int().to(device)


def assert_close_to_reference(function, reference, qkv: Tensor) -> None:
    """Outputs and gradients are held against fp64 and plain torch, as the kernels' are."""
    actual, same_dtype, exact = (
        outputs_and_gradients(f, {"qkv": x})
        for f, x in (
            (function, qkv),
            (reference, qkv),
            (reference, qkv.detach().double().requires_grad_()),
        )
    )
    for name in exact:
        assert_as_accurate_as_torch(name, actual[name], same_dtype[name], exact[name])


@pytest.fixture
def installed_flash_attn(monkeypatch):
    """The stand-in for flash-attn has the functions we call, by their documented meaning."""

    def flash_attn_func(q, k, v, *, causal, deterministic):
        return flash_attention_reference(q, k, v, causal=causal)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
    ):
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) <= max_seqlen_q == max_seqlen_k
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat(
            [flash_attn_func(*(x[None] for x in part), **options)[0] for part in parts]
        )

    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace()
    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.fixture
def backend(request, device, monkeypatch) -> AttentionBackend:
    """The test names the backend; flash-attn is its stand-in, which runs on any device."""
    if request.param == "flash-attn":
        request.getfixturevalue("installed_flash_attn")
        monkeypatch.setitem(attention._UNSUPPORTED_REASONS, "flash-attn", lambda shape: None)
    return choose(request.param, device)


every_backend = pytest.mark.parametrize("backend", ["triton", "flash-attn", "sdpa"], indirect=True)


@every_backend
class TestBackends:
    @pytest.mark.parametrize("with_documents", [False, True])
    def test_packed(self, backend, with_documents, device):
        options = {
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "document_ids": make_document_ids(device) if with_documents else None,
        }
        assert_close_to_reference(
            functools.partial(backend.function, **options),
            functools.partial(REFERENCE.function, **options),
            make_qkv(device, dtype=torch.float16),
        )

    @pytest.mark.parametrize("with_documents", [False, True])
    def test_differential(self, backend, with_documents, device):
        options = {
            "lambda_full": torch.tensor(0.4, device=device),
            "num_heads": HEADS,
            "num_kv_heads": KV_HEADS,
            "document_ids": make_document_ids(device) if with_documents else None,
        }
        assert_close_to_reference(
            functools.partial(differential_attention, backend=backend, **options),
            functools.partial(dense_differential_attention, **options),
            make_qkv(device, dtype=torch.float16),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("with_documents", [False, True])
def test_flash_attn_package(with_documents, device):
    pytest.importorskip("flash_attn")
    options = {
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "document_ids": make_document_ids(device) if with_documents else None,
    }
    backend = choose("flash-attn", device, dtype=torch.bfloat16)
    assert_close_to_reference(
        functools.partial(backend.function, **options),
        functools.partial(REFERENCE.function, **options),
        make_qkv(device, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_compiled(name, device):
    function = functools.partial(
        choose(name, device).function,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        document_ids=make_document_ids(device),
    )
    assert_same_bits(compiled(function), function, {"qkv": make_qkv(device)})


def differential_attention(qkv, lambda_full, num_heads, num_kv_heads, *, backend, **documents):
    """The function calls differential attention as the model does in training."""
    halves = split_halves(qkv, num_heads, num_kv_heads)
    attend = functools.partial(backend.unpacked, **documents)
    return attention.differential_attention(attend, *halves, lambda_full)


def dense_differential_attention(
    qkv: Tensor,
    lambda_full: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document_ids: Tensor | None = None,
) -> Tensor:
    """The function is the definition, head by head, with every score in memory."""
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    seq_len, group = q.shape[1], num_heads // num_kv_heads
    visible = torch.ones(seq_len, seq_len, dtype=torch.bool, device=qkv.device).tril()
    if document_ids is not None:
        visible = visible & (document_ids[:, :, None] == document_ids[:, None, :])

    def score_map(head: int) -> Tensor:
        scores = q[:, :, head] @ k[:, :, head // group].mT / math.sqrt(q.shape[-1])
        return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)

    heads = []
    for head in range(num_heads // 2):
        difference = score_map(head) - lambda_full * score_map(head + num_heads // 2)
        pair = head // group
        values = torch.cat((v[:, :, pair], v[:, :, pair + num_kv_heads // 2]), dim=-1)
        heads.append(difference @ values)
    return torch.cat(heads, dim=-1)


def test_differential_attention_is_that_of_diffllama(device):
    """Maps, subtraction and norm are those of transformers, from the same projections."""
    modeling = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    config = modeling.DiffLlamaConfig(
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    layer = modeling.DiffLlamaAttention(config, layer_idx=3).to(device)
    x = torch.randn(2, 37, config.hidden_size, device=device)
    no_rotation = (
        torch.ones(2, 37, HEAD_SIZE, device=device),
        torch.zeros(2, 37, HEAD_SIZE, device=device),
    )
    mask = torch.full((37, 37), -torch.inf, device=device).triu(1)[None, None]
    with torch.no_grad():
        expected, _ = layer(x, no_rotation, mask)
        qkv = torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), dim=-1)
        lambda_full = (
            (layer.lambda_q1 @ layer.lambda_k1).exp()
            - (layer.lambda_q2 @ layer.lambda_k2).exp()
            + layer.lambda_init
        )
        out = differential_attention(
            qkv, lambda_full, HEADS, KV_HEADS, backend=choose("triton", device)
        )
        out = layer.groupnorm(out.unflatten(-1, (HEADS // 2, -1))) * (1 - layer.lambda_init)
        actual = layer.o_proj(out.flatten(-2))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_differential_attention_differentiates_lambda(device):
    qkv = make_qkv(device)

    def gradient(function) -> Tensor:
        lambda_full = torch.tensor([0.4], device=device, requires_grad=True)
        function(qkv, lambda_full, HEADS, KV_HEADS).square().sum().backward()
        return lambda_full.grad

    actual = gradient(functools.partial(differential_attention, backend=choose("triton", device)))
    torch.testing.assert_close(actual, gradient(dense_differential_attention))


def test_differential_attention_keeps_the_dtype_of_qkv(device):
    qkv = make_qkv(device, dtype=torch.float16)
    lambda_full = torch.tensor([0.4], device=device)
    out = differential_attention(
        qkv, lambda_full, HEADS, KV_HEADS, backend=choose("triton", device)
    )
    assert out.dtype == torch.float16


def test_document_positions(device):
    ids = torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, 5, 5, 5, 5]], dtype=torch.int32, device=device)
    positions = document_positions(ids)
    assert positions.dtype == torch.int32
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_cumulative_lengths_are_computed_once_a_batch(device, monkeypatch):
    ids = make_document_ids(device)
    lengths = attention._cumulative_lengths(ids)
    assert lengths.tolist() == [0, 1, 11, 30, 37, 74]
    assert attention._cumulative_lengths(ids) is lengths
    ids.zero_()  # the next batch, in the same tensor
    assert attention._cumulative_lengths(ids).tolist() == [0, 37, 74]


class TestRefusals:
    CPU = torch.device("cpu")

    def test_triton_needs_a_gpu(self, monkeypatch):
        monkeypatch.setattr(attention, "INTERPRETED", False)
        with pytest.raises(UserError, match="--attention triton: it needs a CUDA GPU; use .* sdpa"):
            choose("triton", self.CPU)

    def test_triton_head_size(self, device):
        with pytest.raises(UserError, match="head sizes up to 128, not 192; use --attention sdpa"):
            choose("triton", device, head_size=192)

    def test_flash_attn_needs_a_gpu(self):
        with pytest.raises(UserError, match="flash-attn: it needs a CUDA GPU; use --attention"):
            choose("flash-attn", self.CPU)

    def test_flash_attn_that_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        gpu = torch.device("cuda", 0)
        with pytest.raises(UserError, match=r"pip install -e '\.\[flash\]'.*use --attention trit"):
            choose("flash-attn", gpu, dtype=torch.bfloat16)
        with pytest.raises(UserError, match="does not compute in float32"):
            choose("flash-attn", gpu)

    def test_sdpa_mask_that_is_too_large(self):
        changes = {"document_mask": True, "micro_batch_size": 24, "seq_len": 8192}
        with pytest.raises(UserError, match=r"mask of 7\.5 GiB in every layer; use .* triton"):
            choose("sdpa", self.CPU, **changes)
        with pytest.raises(UserError, match="--attention auto: .* lower --micro-batch-size"):
            choose("auto", self.CPU, **changes)
        choose("sdpa", self.CPU, **(changes | {"seq_len": 1024}))

    def test_unknown_name(self):
        with pytest.raises(UserError, match="choose from auto, triton, flash-attn, sdpa"):
            choose("xformers", self.CPU)


class TestAuto:
    @pytest.fixture
    def gpu(self, monkeypatch, tmp_path) -> torch.device:
        """The device is a GPU as far as the choice is concerned; the cache folder is empty."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3090")
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        return torch.device("cuda", 0)

    @pytest.fixture
    def measured(self, monkeypatch) -> list:
        """The fixture stands in for the GPU's clock, and records what was measured."""
        calls = []

        def measure(shape, name, function):
            calls.append((name, shape.rotates_apart(name)))
            return 0.93 if name == "triton" else 1.1

        monkeypatch.setattr(attention_timing, "measure", measure)
        return calls

    def test_cpu(self):
        backend = choose("auto", torch.device("cpu"))
        assert (backend.name, backend.reason) == ("sdpa", "runs on the CPU")

    def test_fastest(self, gpu, measured):
        backend = choose("auto", gpu)
        assert backend.name == "triton"
        assert backend.reason.startswith(
            "0.93 ms forward + backward per layer against sdpa 1.10, not flash-attn ("
        )

    @pytest.mark.parametrize("folds_rope", [True, False])
    def test_rope_that_triton_folds_is_counted_against_the_others(self, folds_rope, gpu, measured):
        choose("auto", gpu, folds_rope=folds_rope)
        assert measured == [("triton", False), ("sdpa", folds_rope)]

    def test_remembers(self, gpu, measured):
        first = choose("auto", gpu)
        assert len(measured) == 2
        assert choose("auto", gpu) == first
        assert len(measured) == 2

    @pytest.mark.parametrize(
        "change",
        [
            {"seq_len": 64},
            {"document_mask": True},
            {"dtype": torch.float16},
            {"head_size": 32},
            {"num_kv_heads": 4},
            {"folds_rope": True},
        ],
        ids=str,
    )
    def test_measures_again_for_another_shape(self, change, gpu, measured):
        choose("auto", gpu)
        choose("auto", gpu, **change)
        assert len(measured) == 4

    def test_measures_again_when_flash_attn_arrives(
        self, gpu, measured, monkeypatch, installed_flash_attn
    ):
        choose("auto", gpu, dtype=torch.float16)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
        backend = choose("auto", gpu, dtype=torch.float16)
        assert len(measured) == 5
        assert "against flash-attn 1.10, sdpa 1.10" in backend.reason

    def test_an_account_without_a_home_folder_has_no_cache(self, monkeypatch):
        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(attention_timing.Path, "home", no_home)
        assert attention_timing.cache_file() is None

    @pytest.mark.parametrize(
        "damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"KEY": 3}', b'{"KEY": {"triton": "fast"}}']
    )
    def test_damaged_cache(self, damage, gpu, measured):
        choose("auto", gpu)
        file = attention_timing.cache_file()
        (key,) = json.loads(file.read_text())
        file.write_bytes(damage.replace(b"KEY", key.encode()))
        assert choose("auto", gpu).name == "triton"
        assert len(measured) == 4
        assert json.loads(file.read_text())[key] == {"triton": 0.93, "sdpa": 1.1}

    def test_keeps_other_entries(self, gpu, measured):
        choose("auto", gpu)
        choose("auto", gpu, seq_len=64)
        assert len(json.loads(attention_timing.cache_file().read_text())) == 2

    def test_cache_that_cannot_be_written(self, gpu, measured, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert choose("auto", gpu).name == "triton"

    def test_a_backend_that_fails_is_named_and_not_remembered(self, gpu, monkeypatch):
        def measure(shape, name, function):
            if name == "triton":
                raise torch.OutOfMemoryError("out of memory\nby a lot")
            return 1.1

        monkeypatch.setattr(attention_timing, "measure", measure)
        backend = choose("auto", gpu)
        assert backend.name == "sdpa"
        assert "triton failed (OutOfMemoryError: out of memory)" in backend.reason
        assert not attention_timing.cache_file().exists()

    def test_only_one_can(self, gpu, measured):
        backend = choose("auto", gpu, head_size=192)
        assert backend.name == "sdpa"
        assert backend.reason.startswith("the only one that can, not triton (it takes head sizes")
        assert not measured

    @pytest.mark.gpu
    def test_measures_on_the_gpu(self, device, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        changes = {
            "dtype": torch.bfloat16,
            "seq_len": 512,
            "document_mask": True,
            "folds_rope": True,
        }
        backend = choose("auto", device, **changes)
        (times,) = json.loads(attention_timing.cache_file().read_text()).values()
        assert backend.name == min(times, key=times.__getitem__)
        assert choose("auto", device, **changes) == backend

    @pytest.mark.gpu
    def test_a_backend_that_computes_nonsense_is_not_chosen(self, device, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

        def nonsense(qkv, num_heads, num_kv_heads, *, document_ids=None):
            return qkv[..., : num_heads * HEAD_SIZE] * float("nan")

        shape = AttentionShape(
            device=device,
            dtype=torch.bfloat16,
            head_size=HEAD_SIZE,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            seq_len=32,
            micro_batch_size=2,
            document_mask=False,
            folds_rope=False,
        )
        functions = {"triton": REFERENCE.function, "flash-attn": nonsense}
        name, why = attention_timing.fastest(shape, functions)
        assert name == "triton"
        assert why.endswith("flash-attn failed (RuntimeError: its result is not finite)")
