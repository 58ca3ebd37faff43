"""The picture of a step."""

from hamner.profile.picture import draw
from hamner.profile.trace import read_trace
from tests.profile.traces import TraceWriter


def write_two_steps(path):
    """A step of a matmul, and one of a matmul and a norm that runs after the step's own range."""
    writer = TraceWriter()
    writer.range("ProfilerStep#1", 0, 100)
    writer.kernel("nvjet_a", 20, 50, launch=10)
    writer.range("ProfilerStep#2", 100, 100)
    writer.kernel("nvjet_a", 120, 50, launch=110)
    writer.kernel("rms_norm_forward_kernel", 300, 20, launch=150)
    return read_trace(writer.write(path))


def test_the_last_step_is_what_it_launched(tmp_path):
    trace = write_two_steps(tmp_path / "t.json")
    step = trace.launched_in(trace.steps[-1:])
    assert [(a.name, a.start) for a in step] == [("nvjet_a", 120), ("rms_norm_forward_kernel", 300)]


def test_without_marks_everything_is_the_step(tmp_path):
    writer = TraceWriter()
    writer.kernel("nvjet_a", 20, 50, launch=10)
    trace = read_trace(writer.write(tmp_path / "t.json"))
    assert len(trace.launched_in(trace.steps[-1:])) == 1


def test_draws_one_trace_and_two(tmp_path):
    trace = write_two_steps(tmp_path / "t.json")
    for traces in ([trace], [trace, trace]):
        path = tmp_path / f"{len(traces)}.png"
        draw(traces, path)
        assert path.read_bytes().startswith(b"\x89PNG")
