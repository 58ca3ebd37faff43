"""`--device` says which device a command computes on, and `--matmul` what it must be able to do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hamner.config.options import for_option
from hamner.errors import UserError
from hamner.parallel.device import (
    require_int8,
    select,
    select_device,
    why_no_gpu,
)


def test_device():
    assert select_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert select_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match="--device cuda: PyTorch finds no CUDA GPU"):
            select_device("cuda")


def test_int8_needs_a_gpu():
    config = replace(for_option("tiny"), device="cpu", matmul="int8")
    with pytest.raises(UserError, match="--matmul int8 needs a GPU; use --matmul bf16 on a CPU"):
        select(config)


@pytest.mark.parametrize(
    ("capability", "change", "mend"),
    [
        ((7, 0), {"matmul": "int8"}, "--precision fp32 without --matmul int8"),
        ((7, 5), {"matmul": "int8-all"}, "--precision fp32 without --matmul int8-all"),
        (
            (7, 5),
            {"matmul": "int8", "precision": "fp32"},
            "--precision fp32 without --matmul int8",
        ),
        ((7, 0), {}, "--precision fp32"),
    ],
)
def test_a_card_without_bf16(capability, change, mend, monkeypatch):
    major, minor = capability
    card = SimpleNamespace(name="Old", major=major, minor=minor, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with pytest.raises(UserError) as error:
        select(replace(for_option("tiny"), **change))
    assert str(error.value) == (
        f"Old has no bf16 matmuls (compute capability {major}.{minor}, 8.0 needed); use {mend}"
    )
    assert select(replace(for_option("tiny"), precision="fp32")).precision == "fp32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp32"}, "--matmul int8-all is for --precision bf16"),
        ({"kernels": "torch"}, "use --matmul bf16 with --kernels torch"),
        ({"kernels": "liger"}, "use --matmul bf16 with --kernels liger"),
    ],
)
def test_int8_with_other_flags(change, message):
    config = replace(for_option("tiny"), matmul="int8-all")
    require_int8(config)
    with pytest.raises(UserError, match=message):
        require_int8(replace(config, **change))
    require_int8(replace(config, matmul="bf16", **change))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("hidden_size", 1000, "16 as --hidden-size, and it is 1,000; use 1,008 or --matmul bf16"),
        ("expert_intermediate_size", 2730, "-intermediate-size, and it is 2,730; use 2,736 or"),
    ],
)
def test_int8_of_sizes_that_no_16_bytes_divide(name, size, message):
    config = replace(for_option("a"), matmul="int8")
    odd = replace(config, model=replace(config.model, num_attention_heads=4, **{name: size}))
    with pytest.raises(UserError, match=message):
        require_int8(odd)
    require_int8(replace(odd, matmul="bf16"))
    experts = replace(odd.model, hidden_size=1024, num_experts=4, num_experts_per_token=2)
    require_int8(replace(odd, model=experts))  # experts stay bf16


def test_int8_of_heads_and_tokens_that_no_16_bytes_divide():
    config = replace(for_option("a"), matmul="int8")
    heads = {"hidden_size": 1040, "num_attention_heads": 20, "num_kv_heads": 1}
    with pytest.raises(UserError, match="heads 20 with --num-kv-heads 1 gives 1,144; use other"):
        require_int8(replace(config, model=replace(config.model, **heads)))
    odd = replace(config, seq_len=1000)
    require_int8(odd)
    with pytest.raises(UserError, match="16 as --seq-len, and it is 1,000; use 1,008 or --matmul"):
        require_int8(replace(odd, matmul="int8-all"))


def test_why_a_run_is_on_the_cpu(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    monkeypatch.setattr("hamner.parallel.device.NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_no_gpu("auto") == why_no_gpu("cpu") == "no GPU found"
    driver.write_text("NVRM version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, though an NVIDIA driver is here" in why_no_gpu("auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_gpu("cpu") == "--device cpu"
