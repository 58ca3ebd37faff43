"""A report card's numbers become the efficiencies that they were made with."""

from dataclasses import replace

import pytest

from hamner.config.options import OPTIONS
from hamner.errors import UserError
from hamner.hardware import GIB, GPUS
from hamner.plan.analysis import make_plan
from hamner.plan.efficiency import efficiency
from hamner.plan.measured_efficiency import measured_efficiency
from hamner.plan.report_card import AttentionRate, KernelTime, MatmulRate
from tests.plan.test_report_card import CARD

RTX_3090 = GPUS["rtx-3090"]
SHAPES = ((1024, 768, 8192), (8192, 1024, 2816), (24_576, 2048, 2048), (8192, 8192, 8192))


def made_with(peak, half_dim, gb_per_s):
    """A card on which kernels follow the model, and no step was timed."""
    matmuls = [MatmulRate(*s, tflops=peak * min(s) / (min(s) + half_dim)) for s in SHAPES]
    half = efficiency(RTX_3090).half_seq_len
    attention = [
        AttentionRate(t, 64, direction, rate * t / (t + half))
        for direction, rate in (("forward", 40.0), ("backward", 30.0))
        for t in (512, 1024)
    ]
    kernels = [
        KernelTime("rms_norm", "", "norm", 1e6, 1e9, 1e3 / gb_per_s, 1.0, 1.0),
        KernelTime("swiglu", "", "swiglu", 1e6, 1e9, 1e3 / gb_per_s / 0.9, 1.0, 1.0),
        KernelTime("grouped_matmul", "", "matmul_grouped", 1e12, 1e9, 25.0, 1.0, 1.0),
        KernelTime("tied_embedding", "", "", 1e6, 1e9, 100.0, 1.0, None),
    ]
    rates = {"matmuls": tuple(matmuls), "attention": tuple(attention), "kernels": tuple(kernels)}
    return replace(CARD, step=None, **rates)


def test_kernels_become_shares_of_the_peak():
    gpu, reached = measured_efficiency(made_with(60.0, 120.0, 700.0))
    assert gpu is RTX_3090
    assert reached.flops["matmul"] == pytest.approx(60 / 71.2)
    assert reached.half_dim == pytest.approx(120)
    assert reached.flops["attention_forward"] == pytest.approx(40 / 71.2)
    assert reached.flops["attention_backward"] == pytest.approx(30 / 71.2)
    assert reached.flops["matmul_grouped"] == pytest.approx(40 / 71.2)
    assert reached.bandwidth == pytest.approx({"norm": 700 / 936, "swiglu": 630 / 936})
    assert (reached.clock_mhz, reached.power_w) == (None, 350.0)


def test_without_norms_a_copy_stands_for_them():
    _, reached = measured_efficiency(replace(made_with(60.0, 120.0, 700.0), kernels=()))
    assert reached.bandwidth == {"norm": CARD.bandwidth_gbs / 936}
    assert reached.flops["matmul_grouped"] == efficiency(RTX_3090).flops["matmul_grouped"]


@pytest.mark.parametrize(
    "matmuls",
    [
        (MatmulRate(8192, 1024, 2816, 60.0), MatmulRate(8192, 1024, 8192, 60.0)),
        # Faster where it is smaller: no line with a peak.
        (MatmulRate(8192, 512, 512, 60.0), MatmulRate(8192, 8192, 8192, 40.0)),
    ],
)
def test_matmuls_that_no_line_fits_keep_the_cards_half_dim(matmuls):
    card = replace(made_with(60.0, 120.0, 700.0), matmuls=matmuls)
    _, reached = measured_efficiency(card)
    assert reached.half_dim == efficiency(RTX_3090).half_dim
    assert 40 / 71.2 < reached.flops["matmul"] < 70 / 71.2


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
    assert reached.ranges["step"] == pytest.approx((0.98, 1.01))
    assert "all multiplied by 0.95" in reached.provenance
    b = make_plan(OPTIONS["b"], gpu, reached=reached).prediction
    before = make_plan(OPTIONS["b"], gpu, reached=by_kernels).prediction
    assert b.tokens_per_second == pytest.approx(0.95 * before.tokens_per_second, rel=2e-3)


def test_a_step_that_has_nothing_to_do_with_the_kernels_is_refused():
    step = replace(CARD.step, tokens_per_second=1_000.0)
    with pytest.raises(UserError, match="^--report-card: option a took 24,576 ms a step where"):
        measured_efficiency(replace(CARD, step=step))


def test_an_unknown_gpu_is_measured_against_its_own_fastest():
    device = replace(CARD.device, gpu="NVIDIA RTX Imaginary", memory_bytes=16 * GIB)
    gpu, reached = measured_efficiency(replace(made_with(60.0, 120.0, 700.0), device=device))
    assert (gpu.name, gpu.memory_gib, gpu.bandwidth_gbs) == ("NVIDIA RTX Imaginary", 16, 830)
    assert gpu.bf16_tflops == pytest.approx(60 * 8192 / (8192 + 120))
    assert reached.flops["matmul"] * gpu.bf16_tflops == pytest.approx(60)
    assert make_plan(OPTIONS["tiny"], gpu, reached=reached).prediction.tokens_per_second > 0


def test_kernels_of_another_capability_are_named():
    device = replace(CARD.device, capability=(9, 0), gpu="NVIDIA H200")
    gpu, reached = measured_efficiency(replace(CARD, step=None, device=device))
    assert gpu is GPUS["h200"]
    assert "with the kernels of compute capability 8.6" in reached.provenance
