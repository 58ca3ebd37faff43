"""What can be said of recordings without a GPU; replays are tested in `test_loop_gpu`."""

import contextlib

import pytest
import torch

from hamner.errors import UserError
from hamner.train.cuda_graph import GraphedBackward


@pytest.fixture
def broken_recording(monkeypatch):
    """CUDA refuses what is recorded, and then to end the recording."""

    @contextlib.contextmanager
    def record(*_args, **_kwargs):
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: capture was invalidated\nmore of it")

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


def test_a_recording_that_fails_says_why_and_what_to_do(broken_recording):
    calls = []

    def function(x):
        calls.append(x)
        if len(calls) == 3:
            raise RuntimeError("CUDA error: not permitted when stream is capturing\nmore of it")
        return x

    graphed = GraphedBackward(function, [], warm_up_calls=2)
    assert [graphed(1), graphed(2)] == [1, 2]
    with pytest.raises(UserError, match=r"\(CUDA error: not permitted .*ing\).* --no-cuda-graph$"):
        graphed(3)
    assert graphed.graph is None


def test_running_out_of_memory_is_left_to_the_step(monkeypatch):
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_args, **_kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)

    def function():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        GraphedBackward(function, [], warm_up_calls=0)()
