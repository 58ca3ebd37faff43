"""What the fork server of `tests.kills` has loaded: all that a training, alone or with others,
would load again in each process that a test starts, seconds of it.

No `__main__` of a command is among it, which `python -m` must find new.
"""
# ruff: noqa: F401

import os

import numpy.random
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.onnx

import hamner.data.prepare
import hamner.train.loop
from hamner.data.tokenizer import load_tokenizer
from hamner.train import pictures
from tests.interpreter import adapt

BYTES_ONLY = 261
"""vocabulary of most of the tests' models"""

load_tokenizer("builtin", BYTES_ONLY)
pictures.COMMAND = ("true",)
"""trainings draw nothing, see tests/conftest.py"""
# Asking for CUDA here would keep every process that is forked from using it.
if os.environ.get("TRITON_INTERPRET"):
    adapt()
