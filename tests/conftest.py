"""Runs the kernels where they can run: compiled on a GPU, in Triton's interpreter elsewhere."""

import os

import pytest
import torch

# Triton reads the variable when a kernel is decorated, so it must be set before any is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """The device the kernels run on in this session."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
