"""A report card's numbers become the efficiencies that they were made with."""

from dataclasses import replace

import pytest

from hamner.config.options import OPTIONS
from hamner.errors import UserError
from hamner.hardware import GIB, GPUS
from hamner.plan import costs
from hamner.plan.analysis import make_plan
from hamner.plan.efficiency import efficiency
from hamner.plan.measured_efficiency import known_gpu, measured_efficiency
from hamner.plan.memory import FULL
from hamner.plan.report_card import AttentionRate, KernelTime, MatmulRate
from hamner.plan.step_time import ATTENTION_LAUNCHES, GRAPH_GAP_US, predict
from tests.plan.test_report_card import CARD

RTX_3090 = GPUS["rtx-3090"]
SHAPES = ((1024, 768, 8192), (8192, 1024, 2816), (24_576, 2048, 2048))
CUBE = MatmulRate(8192, 8192, 8192, tflops=30.0)
"""at a lower clock than a step's matmuls"""
GAP_MS = 1e-3 * GRAPH_GAP_US


def matmul(shape, peak, half_dim):
    """One call after the other takes what the step model counts: its work and a gap."""
    flops, dim = costs.matmul(*shape).flops, min(shape)
    rate = peak * dim / (dim + half_dim)
    return MatmulRate(*shape, tflops=flops / 1e9 / (flops / rate / 1e9 + GAP_MS))


def kernel(kind, milliseconds, flops=1e6, launches=1):
    spent = milliseconds + launches * GAP_MS
    return KernelTime("a kernel", "", kind, flops, 1e9, launches, spent, 1.0, 1.0)


def attention(seq_len, head_size, direction, peak):
    half, gap = efficiency(RTX_3090).half_seq_len, ATTENTION_LAUNCHES[direction] * GAP_MS
    rate = peak * seq_len / (seq_len + half)
    return AttentionRate(seq_len, head_size, direction, 1.0, tflops=rate * (1.0 - gap))


def made_with(peak, half_dim, gb_per_s):
    """A card on which kernels follow the model, and no step was timed."""
    rates = [
        attention(t, 64, direction, rate)
        for direction, rate in (("forward", 40.0), ("backward", 30.0))
        for t in (512, 1024)
    ]
    kernels = [
        kernel("norm", 1e3 / gb_per_s, launches=2),
        kernel("swiglu", 1e3 / gb_per_s / 0.9),
        kernel("matmul_grouped", 30.0, flops=1e12, launches=3),
        kernel("matmul_grouped", 20.0, flops=1e12),
        kernel("", 100.0),
    ]
    return replace(
        CARD,
        step=None,
        matmuls=tuple(matmul(shape, peak, half_dim) for shape in SHAPES),
        attention=tuple(rates),
        kernels=tuple(kernels),
    )


def test_kernels_become_shares_of_the_peak_without_the_gaps_between_them():
    gpu, reached = measured_efficiency(made_with(60.0, 120.0, 700.0))
    assert gpu.name == RTX_3090.name
    assert reached.flops["matmul"] == pytest.approx(60 / 71.2)
    assert reached.half_dim == pytest.approx(120)
    assert reached.flops["attention_forward"] == pytest.approx(40 / 71.2)
    assert reached.flops["attention_backward"] == pytest.approx(30 / 71.2)
    # All work over all of its time.
    assert reached.flops["matmul_grouped"] == pytest.approx(40 / 71.2)
    assert reached.bandwidth == pytest.approx({"norm": 700 / 936, "swiglu": 630 / 936})
    assert (reached.clock_mhz, reached.power_w) == (None, 350.0)


def test_what_no_step_has_does_not_count():
    """Cubes, and heads of another size than the options'."""
    card = made_with(60.0, 120.0, 700.0)
    wide = attention(1024, 128, "forward", 60.0)
    more = replace(card, matmuls=(*card.matmuls, CUBE), attention=(*card.attention, wide))
    assert measured_efficiency(more)[1].flops == measured_efficiency(card)[1].flops
    _, reached = measured_efficiency(replace(card, matmuls=(CUBE,), attention=(wide,)))
    assert reached.flops["matmul"] < 0.5
    assert reached.flops["attention_forward"] == pytest.approx(60 / 71.2)
    assert reached.flops["attention_backward"] == efficiency(RTX_3090).flops["attention_backward"]


def test_of_a_time_at_most_half_is_a_gap():
    short = replace(kernel("norm", 0.0), measured_ms=1e-4, launches=10**6)
    _, reached = measured_efficiency(replace(made_with(60.0, 120.0, 700.0), kernels=(short,)))
    assert reached.bandwidth["norm"] == pytest.approx(1e9 / 5e-5 / 1e6 / 936)


def test_the_budget_is_of_the_memory_that_the_card_has():
    device = replace(CARD.device, memory_bytes=int(23.69 * GIB))
    gpu, _ = measured_efficiency(replace(CARD, device=device))
    assert gpu.memory_gib == 23.6
    assert known_gpu(replace(CARD, device=device))[0].memory_gib == 23.6


def test_what_was_known_is_at_the_cards_power_limit():
    gpu, reached = known_gpu(CARD)
    assert reached is efficiency(RTX_3090)
    device = replace(CARD.device, power_limit_w=280.0)
    _, limited = known_gpu(replace(CARD, device=device))
    assert limited == reached.at_power(gpu, 280.0)
    _, unsaid = known_gpu(replace(CARD, device=replace(device, power_limit_w=None)))
    assert unsaid == reached


def test_a_clock_at_which_nothing_was_measured_scales_nothing():
    gpu, reached = measured_efficiency(CARD)
    with pytest.raises(UserError, match="the clock of the RTX 3090 is not known, leave the flag"):
        reached.at_clock(gpu, 1500)
    device = replace(CARD.device, load_clock_mhz=1800.0, power_limit_w=300.0)
    gpu, reached = measured_efficiency(replace(CARD, device=device))
    slower = reached.at_clock(gpu, 900)
    assert slower.flops["matmul"] == pytest.approx(reached.flops["matmul"] / 2)
    assert reached.at_power(gpu, 300).flops == pytest.approx(reached.flops)


def test_without_norms_a_copy_stands_for_them():
    _, reached = measured_efficiency(replace(made_with(60.0, 120.0, 700.0), kernels=()))
    assert reached.bandwidth == {"norm": CARD.bandwidth_gbs / 936}
    assert reached.flops["matmul_grouped"] == efficiency(RTX_3090).flops["matmul_grouped"]


@pytest.mark.parametrize(
    "matmuls",
    [
        (MatmulRate(8192, 1024, 2816, 60.0), MatmulRate(8192, 1024, 8192, 60.0)),
        # Faster where it is smaller: no line with a peak.
        (MatmulRate(8192, 512, 512, 60.0), MatmulRate(8192, 8192, 4096, 40.0)),
    ],
)
def test_matmuls_that_no_line_fits_keep_the_cards_half_dim(matmuls):
    card = replace(made_with(60.0, 120.0, 700.0), matmuls=matmuls)
    _, reached = measured_efficiency(card)
    assert reached.half_dim == efficiency(RTX_3090).half_dim
    assert 40 / 71.2 < reached.flops["matmul"] < 71 / 71.2


def test_a_measured_step_is_what_is_projected():
    card = made_with(60.0, 120.0, 700.0)
    gpu, by_kernels = measured_efficiency(card)
    slower = make_plan(OPTIONS["a"], gpu, reached=by_kernels).prediction.tokens_per_second * 0.95
    step = replace(
        CARD.step,
        tokens_per_second=slower,
        tokens_per_second_p10=0.98 * slower,
        tokens_per_second_p90=1.01 * slower,
    )
    gpu, reached = measured_efficiency(replace(card, step=step))
    prediction = make_plan(OPTIONS["a"], gpu, reached=reached).prediction
    assert prediction.tokens_per_second == pytest.approx(slower)
    # The mean of 40 steps, each 0.98 to 1.01 of their median in eight of ten cases.
    assert reached.ranges["step"] == pytest.approx(
        (1 - 0.02 / 40**0.5, 1 + 0.01 / 40**0.5), abs=1e-4
    )
    assert "all multiplied by 0.95" in reached.provenance
    b = make_plan(OPTIONS["b"], gpu, reached=reached).prediction
    before = make_plan(OPTIONS["b"], gpu, reached=by_kernels).prediction
    assert b.tokens_per_second == pytest.approx(0.95 * before.tokens_per_second, rel=2e-3)


def test_a_step_is_projected_as_it_was_made_to_fit():
    """All blocks were recomputed, in two micro-batches, as the GPU was not free."""
    card = made_with(60.0, 120.0, 700.0)
    gpu, by_kernels = measured_efficiency(card)
    option, full = OPTIONS["a"], (FULL,) * OPTIONS["a"].model.num_layers
    speed = predict(option, gpu, full, 12, reached=by_kernels).tokens_per_second
    fitted = {"recompute": "full", "micro_batch_size": 12}
    speeds = dict.fromkeys(("", "_p10", "_p90"), speed)
    fitted |= {f"tokens_per_second{name}": value for name, value in speeds.items()}
    _, reached = measured_efficiency(replace(card, step=replace(CARD.step, **fitted)))
    assert reached.flops == pytest.approx(by_kernels.flops)


@pytest.mark.parametrize(
    "changes", [{"recompute": "auto"}, {"recompute": "some"}, {"micro_batch_size": 7}]
)
def test_a_step_that_cannot_have_been_trained_is_refused(changes):
    with pytest.raises(UserError, match="^--report-card: option a cannot have been trained with"):
        measured_efficiency(replace(CARD, step=replace(CARD.step, **changes)))


def test_a_step_that_has_nothing_to_do_with_the_kernels_is_refused():
    step = replace(CARD.step, tokens_per_second=1_000.0)
    with pytest.raises(UserError, match="^--report-card: option a took 24,576 ms a step where"):
        measured_efficiency(replace(CARD, step=step))


def test_an_unknown_gpu_is_measured_against_its_own_fastest():
    device = replace(CARD.device, gpu="NVIDIA RTX Imaginary", memory_bytes=16 * GIB)
    gpu, reached = measured_efficiency(replace(made_with(60.0, 120.0, 700.0), device=device))
    assert (gpu.name, gpu.memory_gib, gpu.bandwidth_gbs) == ("NVIDIA RTX Imaginary", 16, 830)
    assert gpu.bf16_tflops == max(rate.tflops for rate in made_with(60.0, 120.0, 700.0).matmuls)
    assert reached.flops["matmul"] * gpu.bf16_tflops == pytest.approx(60)
    assert make_plan(OPTIONS["tiny"], gpu, reached=reached).prediction.tokens_per_second > 0
    with pytest.raises(UserError, match="the int8 rate of the NVIDIA RTX Imaginary is not known"):
        make_plan(replace(OPTIONS["tiny"], matmul="int8"), gpu, reached=reached)


def test_kernels_of_another_capability_are_named():
    device = replace(CARD.device, capability=(9, 0), gpu="NVIDIA H200")
    gpu, reached = measured_efficiency(replace(CARD, step=None, device=device))
    assert gpu.name == "H200"
    assert "with the kernels of compute capability 8.6" in reached.provenance
