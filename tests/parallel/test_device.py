"""`--device` says which device a command computes on, and `--matmul` what it must be able to do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hamner.config.options import for_option
from hamner.errors import UserError
from hamner.kernels.int8_quantize import MAX_ROW
from hamner.parallel.device import (
    MAX_INT8_INNER,
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


def test_int8_of_a_wide_mlp():
    assert 2 * MAX_INT8_INNER == MAX_ROW
    config = replace(for_option("tiny"), matmul="int8")
    widest, wider = (
        replace(config, model=replace(config.model, expert_intermediate_size=inner))
        for inner in (MAX_INT8_INNER, MAX_INT8_INNER + 1)
    )
    require_int8(widest)
    with pytest.raises(
        UserError, match="--expert-intermediate-size up to 16,384, and it is 16,385"
    ):
        require_int8(wider)
    experts = replace(wider.model, num_experts=4, num_experts_per_token=2)
    require_int8(replace(wider, model=experts))  # experts stay bf16


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
