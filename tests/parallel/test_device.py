"""`--device` says which device a command computes on."""

import pytest
import torch

from hamner.errors import UserError
from hamner.parallel.device import select_device


def test_device():
    assert select_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert select_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match="--device cuda: PyTorch finds no CUDA GPU"):
            select_device("cuda")
