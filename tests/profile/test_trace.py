"""Reading traces: nesting, launches, and files that are none."""

import gzip

import pytest

from hamner.errors import UserError
from hamner.profile.trace import read_trace, with_callers_of
from tests.profile.traces import H100, TraceWriter, shapes


def test_a_kernel_knows_what_launched_it(tmp_path):
    writer = TraceWriter()
    writer.range("ProfilerStep#3", 0, 100)
    writer.range("layers.0.mlp", 10, 50)
    writer.range("hamner::swiglu_linear", 10, 40)
    writer.range("aten::mm", 20, 20, **shapes([2, 3], [3, 4]))
    writer.kernel("swiglu_forward_kernel", 200, 5, launch=12)
    writer.kernel("nvjet_a", 210, 5, launch=25)
    trace = read_trace(writer.write(tmp_path / "t.json"))
    assert trace.device == H100
    assert [r.name for r in trace.steps] == ["ProfilerStep#3"]
    first, second = trace.activities
    above = ["hamner::swiglu_linear", "layers.0.mlp", "ProfilerStep#3"]
    assert [r.name for r in first.caller.chain()] == above
    assert [r.name for r in second.caller.chain()] == ["aten::mm", *above]
    assert second.caller.dims == [[2, 3], [3, 4]]
    assert second.launched == 27


def test_ranges_of_other_threads_do_not_nest(tmp_path):
    writer = TraceWriter()
    writer.range("backward", 0, 100, thread=1)
    writer.range("aten::mm", 10, 20, thread=2)
    writer.kernel("nvjet_a", 50, 5, launch=15, thread=2)
    (activity,) = read_trace(writer.write(tmp_path / "t.json")).activities
    assert [r.name for r in activity.caller.chain()] == ["aten::mm"]


def test_without_a_gpu_operations_are_the_work(tmp_path):
    writer = TraceWriter()
    writer.range("aten::linear", 0, 100)
    writer.range("aten::mm", 10, 70)
    writer.range("aten::add", 120, 30)
    trace = read_trace(writer.write(tmp_path / "t.json"))
    assert trace.device is None
    own = {activity.name: activity.duration for activity in trace.activities}
    assert own == {"aten::linear": 30, "aten::mm": 70, "aten::add": 30}


def test_annotations_do_not_take_an_operations_time(tmp_path):
    writer = TraceWriter()
    writer.range("aten::outer", 0, 100)
    writer.range("a note", 10, 80)
    writer.range("aten::inner", 20, 30)
    trace = read_trace(writer.write(tmp_path / "t.json"))
    own = {activity.name: activity.duration for activity in trace.activities}
    assert own == {"aten::outer": 70, "aten::inner": 30}


def test_gzip_is_told_by_content(tmp_path):
    writer = TraceWriter()
    writer.kernel("nvjet_a", 0, 5, launch=-10)
    path = tmp_path / "trace.json"
    path.write_bytes(gzip.compress(writer.write(tmp_path / "plain.json").read_bytes()))
    assert len(read_trace(path).activities) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not json", "is not a torch-profiler trace"),
        (b"\x1f\x8bnot gzip", "is not a torch-profiler trace"),
        (b"\x80\x04pickle", "is not a torch-profiler trace"),
        (b'{"a": 1}', "has no traceEvents"),
        (b'{"traceEvents": [', "is not a torch-profiler trace"),
        (b"[]", "nothing to summarise"),
        (b'{"traceEvents": []}', "nothing to summarise"),
    ],
)
def test_files_that_are_no_traces(tmp_path, content, said):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_trace(path)


def test_a_file_cut_short(tmp_path):
    writer = TraceWriter()
    writer.kernel("nvjet_a", 0, 5, launch=-10)
    path = writer.write(tmp_path / "t.json.gz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="is not a torch-profiler trace"):
        read_trace(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json cannot be read"):
        read_trace(tmp_path / "missing.json")


def test_a_graphs_kernels_learn_their_callers(tmp_path):
    """Two steps in a graph, three launched one by one; copies of the graph's inputs stay apart."""
    launches, graph = TraceWriter(), TraceWriter()
    for number in range(3):
        begin = 1000.0 * number
        launches.range(f"ProfilerStep#{number}", begin, 900)
        for i, size in enumerate((2, 3)):
            launches.range("aten::mm", begin + 10 * i, 5, **shapes([size, 4], [4, 5]))
            launches.kernel("nvjet_a", begin + 100 + 10 * i, 8, launch=begin + 10 * i + 1)
    for number in range(2):
        begin = 1000.0 * number
        graph.range(f"ProfilerStep#{number}", begin, 900)
        graph.kernel("copy_kernel", begin + 50, 8, launch=begin)
        for i in range(2):
            graph.kernel("nvjet_a", begin + 100 + 10 * i, 8, launch=begin + 5)
    trace = with_callers_of(
        read_trace(graph.write(tmp_path / "g.json")),
        read_trace(launches.write(tmp_path / "l.json")),
    )
    kernels = [a.caller.dims[0] for a in trace.activities if a.name == "nvjet_a"]
    assert kernels == [[2, 4], [3, 4]] * 2
    assert {a.caller.name for a in trace.activities if a.name == "copy_kernel"} == {
        "ProfilerStep#0",
        "ProfilerStep#1",
    }
