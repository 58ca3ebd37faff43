"""Memory by kind, from allocations whose purpose is known."""

import pytest

from hamner.profile.memory import draw, memory_timeline
from hamner.profile.report import describe_memory
from hamner.profile.trace import read_trace
from tests.profile.traces import TraceWriter

HELD = 1000


@pytest.fixture
def writer() -> TraceWriter:
    writer = TraceWriter()
    writer.kernel("nvjet_a", 0, 5, launch=-10)
    for name, start in (("forward", 0), ("backward", 100), ("optimizer", 200)):
        writer.range(name, start, 99)
    total = HELD
    for time, address, size in (
        (10, 0xA, 500),  # an activation
        (20, 0xB, 40),  # a temporary of the forward pass
        (30, 0xB, -40),
        (110, 0xC, 300),  # a gradient
        (120, 0xB, 70),  # a temporary of the backward pass, where the other one lay
        (130, 0xB, -70),
        (140, 0xA, -500),
        (210, 0xC, -300),
        (220, 0xD, -100),  # held before the trace began
    ):
        total += size
        writer.memory(time, address, size, total)
    return writer


def test_kinds_by_when_they_live(writer, tmp_path):
    metadata = {"weight_bytes": 200, "optimizer_bytes": 600}
    trace = read_trace(writer.write(tmp_path / "t.json", hamner=metadata))
    timeline = memory_timeline(trace)
    kinds = timeline.kinds
    assert kinds["activations"] == [500, 500, 500, 500, 500, 500, 0, 0, 0]
    assert kinds["gradients"] == [0, 0, 0, 300, 300, 300, 300, 0, 0]
    assert kinds["temporary"] == [0, 40, 0, 0, 70, 0, 0, 0, 0]
    assert kinds["held before"] == [200] * 8 + [100]
    totals = [sum(sizes) for sizes in zip(*kinds.values(), strict=True)]
    assert totals == [event.allocated for event in trace.memory]
    assert timeline.peak == {
        "weights": 200,
        "optimizer state": 600,
        "held before": 200,
        "gradients": 300,
        "activations": 500,
        "temporary": 70,
    }
    assert "weights" in describe_memory(timeline)


def test_memory_of_the_gpu_comes_first(writer, tmp_path):
    writer.memory(15, 0xE, 7777, 7777, device_type=0)
    timeline = memory_timeline(read_trace(writer.write(tmp_path / "t.json")))
    assert 7777 not in timeline.kinds["activations"]


def test_a_trace_without_allocations(tmp_path):
    writer = TraceWriter()
    writer.kernel("nvjet_a", 0, 5, launch=-10)
    assert memory_timeline(read_trace(writer.write(tmp_path / "t.json"))) is None


def test_draws_a_picture(writer, tmp_path):
    draw(memory_timeline(read_trace(writer.write(tmp_path / "t.json"))), tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
