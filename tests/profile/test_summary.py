"""Summaries of traces whose times are known."""

from dataclasses import replace

import pytest

from hamner.errors import UserError
from hamner.hardware import GPUS
from hamner.profile.report import describe, describe_difference, table
from hamner.profile.summary import short_name, summarize
from hamner.profile.trace import read_trace, with_callers_of
from tests.profile.traces import AUTOGRAD, TraceWriter, shapes

M, K, N = 24_576, 1024, 1536


@pytest.fixture
def writer() -> TraceWriter:
    """Two steps of 1,000 us: 600 matmul, 200 norm, 50 waiting for the CPU, the rest queued."""
    writer = TraceWriter()
    for begin in (0.0, 1000.0):
        writer.range(f"ProfilerStep#{int(begin / 1000)}", begin, 990)
        writer.range("forward", begin + 10, 300)
        writer.range("aten::linear", begin + 20, 100)
        writer.range("aten::mm", begin + 30, 50, **shapes([M, K], [K, N]))
        writer.kernel("nvjet_tst_128x256", begin + 100, 600, launch=begin + 40)
        writer.range("backward", begin + 320, 600)
        writer.range(
            "hamner::rms_norm_backward",
            begin + 400,
            20,
            thread=AUTOGRAD,
            **shapes([M, K], [], [M, K]),
        )
        writer.kernel(
            "rms_norm_backward_kernel", begin + 705, 200, launch=begin + 405, thread=AUTOGRAD
        )
        # Launched after the last kernel has ended at 905: the GPU waited for the CPU.
        writer.kernel(
            "void at::native::unrolled_elementwise_kernel<1>", begin + 955, 45, launch=begin + 940
        )
    writer.wait(1990, 5)
    return writer


def test_time_by_category_and_phase(writer, tmp_path):
    summary = summarize(read_trace(writer.write(tmp_path / "trace.json.gz")))
    assert summary.steps == 2
    assert summary.launches == 3
    # From the first kernel to the last: the 100 us before the first step's kernel are not seen.
    assert summary.step_ms == pytest.approx(0.950)
    assert summary.busy_ms == pytest.approx(0.845)
    assert summary.categories == pytest.approx({"matmul": 0.600, "norm": 0.200, "other": 0.045})
    assert summary.phases == pytest.approx({"forward": 0.600, "backward": 0.200})
    assert summary.idle_ms == pytest.approx(0.105)


def test_a_graphs_kernels_reach_the_rate_of_their_operations(writer, tmp_path):
    """The work of every step is counted, not of one."""
    launches = read_trace(writer.write(tmp_path / "launches.json"))
    graph = TraceWriter()
    for begin in (0.0, 1000.0):
        graph.range(f"ProfilerStep#{int(begin / 1000)}", begin, 990)
        graph.kernel("nvjet_tst_128x256", begin + 100, 600, launch=begin + 40)
    trace = with_callers_of(read_trace(graph.write(tmp_path / "graph.json")), launches)
    [row] = summarize(trace).kernels
    assert row.tflop_per_s == pytest.approx(2 * M * K * N / 600e-6 / 1e12)


def test_idle_time_is_told_apart(writer, tmp_path):
    gaps = summarize(read_trace(writer.write(tmp_path / "t.json"))).gaps
    # Both steps wait 50 us for the launch at 940; the second matmul was launched 60 us after the
    # GPU had run out of work at 1,000, and starts at 1,100.
    assert gaps.waiting_for_cpu_ms * 2e3 == pytest.approx(50 + 50 + 100)
    assert gaps.between_kernels_ms * 2e3 == pytest.approx(5 + 5)
    assert gaps.long_gaps * 2 == 3
    assert gaps.longest_us == pytest.approx(100)
    assert gaps.head_start_us == pytest.approx(58)


def test_kernels_against_their_floor(writer, tmp_path):
    summary = summarize(read_trace(writer.write(tmp_path / "t.json")))
    matmul, norm, other = summary.kernels
    flops = 2 * M * K * N
    assert matmul.tflop_per_s == pytest.approx(flops / 600e-6 / 1e12)
    assert matmul.floor_ms == pytest.approx(flops / (GPUS["h100"].bf16_tflops * 1e12) * 1e3)
    # d_y, x and d_x in bf16: no gradient arrives at the residual.
    assert norm.gb_per_s == pytest.approx(3 * M * K * 2 / 200e-6 / 1e9)
    assert norm.floor_ms == pytest.approx(3 * M * K * 2 / 3352e9 * 1e3)
    assert other.floor_ms is None and other.gb_per_s is None
    assert summary.counted_tflops == pytest.approx(flops / 950e-6 / 1e12)


def test_kernels_of_one_operation_share_its_work(tmp_path):
    writer = TraceWriter()
    writer.range("aten::mm", 0, 50, **shapes([M, K], [K, N]))
    writer.kernel("nvjet_splitk", 100, 300, launch=10)
    writer.kernel("cublasLt::splitKreduce_kernel", 400, 100, launch=20)
    summary = summarize(read_trace(writer.write(tmp_path / "t.json")))
    rate = 2 * M * K * N / 400e-6 / 1e12
    assert [kernel.tflop_per_s for kernel in summary.kernels] == pytest.approx([rate, rate])


def test_an_unknown_gpu_has_rates_but_no_floor(writer, tmp_path):
    writer.device = "NVIDIA Unheard Of"
    path = writer.write(tmp_path / "t.json", hamner={"tokens_per_step": 100, "flops_per_token": 1})
    summary = summarize(read_trace(path))
    assert summary.kernels[0].tflop_per_s is not None
    assert summary.kernels[0].floor_ms is None
    assert summary.mfu is None
    assert "peak is unknown" in describe(summary)


def test_mfu_counts_the_step_without_the_profiler(writer, tmp_path):
    metadata = {
        "tokens_per_step": 24_576,
        "flops_per_token": 2_000_000_000,
        "precision": "bf16",
        "unprofiled_step_ms": 100.0,
    }
    summary = summarize(read_trace(writer.write(tmp_path / "t.json", hamner=metadata)))
    assert summary.tokens_per_second == pytest.approx(245_760)
    assert summary.mfu == pytest.approx(245_760 * 2e9 / 989.4e12)


def test_streams_side_by_side_are_busy_once(tmp_path):
    writer = TraceWriter()
    writer.kernel("nvjet_a", 0, 100, launch=-5)
    writer.kernel("ncclDevKernel_AllReduce", 50, 100, launch=-4, stream=9)
    summary = summarize(read_trace(writer.write(tmp_path / "t.json")))
    assert summary.busy_ms == pytest.approx(0.150)
    assert summary.categories == pytest.approx({"matmul": 0.1, "communication": 0.1})
    assert "side by side" in describe(summary)


def test_communication_is_hidden_or_exposed(tmp_path):
    """Two steps, each with 100 us of two messages: 50 us and 10 us of them beside arithmetic."""
    writer = TraceWriter()
    for begin in (0.0, 1000.0):
        writer.range(f"ProfilerStep#{int(begin / 1000)}", begin, 990)
        writer.kernel("nvjet_a", begin + 100, 100, launch=begin + 10)
        writer.kernel("nvjet_b", begin + 120, 30, launch=begin + 11)  # on another stream
        writer.kernel(
            "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", begin + 150, 80, launch=begin + 12, stream=9
        )
        # What a collective's tensors are put together with is arithmetic like any other.
        writer.kernel(
            "void at::native::chunk_cat_cuda_kernel<1>", begin + 250, 20, launch=begin + 13
        )
        writer.kernel(
            "ncclDevKernel_AllGather_RING_LL", begin + 260, 20, launch=begin + 14, stream=9
        )
    metadata = {"tokens_per_step": 100, "flops_per_token": 10**9, "gpus": 2}
    summary = summarize(read_trace(writer.write(tmp_path / "t.json", hamner=metadata)))
    assert summary.communication.milliseconds == pytest.approx(0.100)
    assert summary.communication.exposed_ms == pytest.approx(0.040)
    assert summary.categories["communication"] == pytest.approx(0.120)
    text = describe(summary)
    assert "0.06 ms of it (60%) beside other work, 0.04 ms exposed" in text
    assert "tokens/s on 2 GPUs" in text
    assert summary.mfu == pytest.approx(summary.tokens_per_second / 2 * 1e9 / 989.4e12)


def test_one_gpu_sends_nothing(writer, tmp_path):
    summary = summarize(read_trace(writer.write(tmp_path / "t.json")))
    assert summary.communication is None
    assert "Communication" not in describe(summary)


def test_steps_of_a_trace_that_marks_none(tmp_path):
    writer = TraceWriter()
    for i in range(4):
        writer.kernel("nvjet_a", 100 * i, 100, launch=-5)
    trace = read_trace(writer.write(tmp_path / "t.json"))
    assert summarize(trace).step_ms == pytest.approx(0.4)
    assert summarize(trace, steps=4).step_ms == pytest.approx(0.1)
    assert summarize(trace, steps=4).launches == 1


def test_steps_may_not_contradict_the_trace(writer, tmp_path):
    with pytest.raises(UserError, match="marks 2 steps"):
        summarize(read_trace(writer.write(tmp_path / "t.json")), steps=3)


def test_the_report_names_everything(writer, tmp_path):
    text = describe(summarize(read_trace(writer.write(tmp_path / "t.json"))))
    for part in ("nvjet_tst_128x256", "idle", "launch-bound", "cudaStreamSynchronize 0.5 times"):
        assert part in text


def test_difference_of_two(writer, tmp_path):
    a = summarize(read_trace(writer.write(tmp_path / "a.json")))
    norm = replace(a.kernels[1], milliseconds=0.1)
    b = replace(
        a,
        step_ms=a.step_ms - 0.1,
        categories={**a.categories, "norm": 0.1},
        kernels=[a.kernels[0], norm, a.kernels[2]],
    )
    text = describe_difference(a, b)
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "-0.10" in lines["norm"] and "-0.10" in lines["step"]
    assert "-0.10" in lines["rms_norm_backward_kernel"]
    assert "+0.00" in lines["matmul"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("rope_kernel", "rope_kernel"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>,"
            " std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>)",
            "vectorized_elementwise_kernel<CUDAFunctor_add>",
        ),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<"
            "TensorListMetadata<1>, LpNormFunctor<float, 1>>(int)",
            "multi_tensor_apply_kernel<LpNormFunctor>",
        ),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


def test_tables_are_markdown():
    assert table(("a", "ms"), [("long", "1.0")]).splitlines() == [
        "| a    |  ms |",
        "|------|----:|",
        "| long | 1.0 |",
    ]
