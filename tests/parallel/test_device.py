"""`--device` says which device a command computes on."""

import pytest
import torch

from hamner.errors import UserError
from hamner.parallel.device import select_device, why_no_gpu


def test_device():
    assert select_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert select_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match="--device cuda: PyTorch finds no CUDA GPU"):
            select_device("cuda")


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
