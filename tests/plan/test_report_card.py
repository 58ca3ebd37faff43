"""A report card is what was written, or refused in one sentence."""

import json
from dataclasses import asdict, replace

import pytest

from hamner.errors import UserError
from hamner.plan.report_card import (
    AttentionRate,
    Device,
    KernelTime,
    MatmulRate,
    ReportCard,
    StepMeasurement,
)

DEVICE = Device(
    gpu="NVIDIA GeForce RTX 3090",
    capability=(8, 6),
    compiled_for=(8, 6),
    driver="580.00",
    torch="2.11.0",
    triton="3.6.0",
    memory_bytes=24 * 2**30,
    power_limit_w=350.0,
    max_clock_mhz=2100.0,
    load_clock_mhz=None,
)
STEP = StepMeasurement(
    steps=40,
    tokens_per_second=25_000,
    tokens_per_second_p10=24_800,
    tokens_per_second_p90=25_100,
    peak_bytes=16 * 2**30,
    recompute="selective",
    micro_batch_size=24,
    attention="triton",
    projected_low=22_000,
    projected=26_000,
    projected_high=29_000,
    projected_peak_bytes=2**34,
)
CARD = ReportCard(
    date="2026-11-29",
    commit="0123456",
    device=DEVICE,
    bandwidth_gbs=830.0,
    matmuls=(MatmulRate(1024, 1024, 1024, 52.0), MatmulRate(8192, 8192, 8192, 72.0)),
    attention=(
        AttentionRate(1024, 64, "forward", milliseconds=1.0, tflops=45.0),
        AttentionRate(1024, 64, "backward", milliseconds=3.0, tflops=38.0),
    ),
    kernels=(
        KernelTime("rms_norm", "24576 x 1024", "norm", 0.0, 1.0e8, 1, 0.13, 0.11, 0.12),
        KernelTime("embedding", "24576 x 1024", "", 0.0, 1.0e8, 1, 0.13, 0.11, None),
    ),
    step=STEP,
)


@pytest.fixture
def path(tmp_path):
    CARD.write(tmp_path / "card.json")
    return tmp_path / "card.json"


def test_a_card_is_read_as_it_was_written(path):
    assert ReportCard.read(path) == CARD
    replace(CARD, step=None).write(path)
    assert ReportCard.read(path).step is None


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(CARD, bandwidth_gbs=float("nan")).write(tmp_path / "card.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, r"has format 1, this version reads 2: make it again"),
        ({"bandwidth_gbs": "fast"}, r'is damaged, bandwidth_gbs is "fast": make it again'),
        ({"bandwidth_gbs": -1}, r"is damaged, bandwidth_gbs is -1: "),
        ({"bandwidth_gbs": True}, r"is damaged, bandwidth_gbs is true: "),
        ({"bandwidth_gbs": float("inf")}, r"is damaged, bandwidth_gbs is Infinity: "),
        ({"bandwidth_gbs": 1e-320}, r"is damaged, bandwidth_gbs is 1e-320: "),
        ({"bandwidth_gbs": 0}, r"is damaged, bandwidth_gbs has a 0: "),
        ({"matmuls": []}, r"is damaged, matmuls is empty: "),
        ({"device": []}, r"is damaged, device is \[\]: "),
        ({"device": {}}, r"is damaged, device.gpu is missing: "),
        ({"device": {**asdict(DEVICE), "capability": [8]}}, r"device.capability is \[8\]: "),
        ({"matmuls": [{"m": 1.5}]}, r"is damaged, matmuls\[0\].m is 1.5: "),
        ({"step": {**asdict(STEP), "steps": None}}, r"is damaged, step.steps is null: "),
        ({"step": {**asdict(STEP), "tokens_per_second_p90": 0}}, r"is damaged, step has a 0: "),
        ({"step": {**asdict(STEP), "micro_batch_size": 0}}, r"is damaged, step has a 0: "),
        ({"step": {**asdict(STEP), "steps": 0}}, r"is damaged, step has a 0: "),
        ({"step": {**asdict(STEP), "tokens_per_second_p10": 25_001}}, r"not between p10 and p90: "),
        ({"step": {**asdict(STEP), "tokens_per_second_p90": 24_999}}, r"not between p10 and p90: "),
        ({"device": {**asdict(DEVICE), "gpu": "\x1b[2J"}}, r'device.gpu is "\\u001b\[2J": '),
        ({"attention": [{**asdict(CARD.attention[0]), "direction": "up"}]}, r"direction is \"up\""),
    ],
)
def test_a_damaged_card_is_refused_by_the_field(path, change, message):
    path.write_text(json.dumps(asdict(CARD) | change))
    with pytest.raises(UserError, match=f"^--report-card {path} .*{message}"):
        ReportCard.read(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "\x00", "[" * 100_000])
def test_a_foreign_file_is_refused(path, text):
    path.write_text(text)
    mend = "(give the report_card.json that|make it again with) python -m bench.report_card"
    with pytest.raises(UserError, match=f"^--report-card {path} (is not|cannot).*{mend}"):
        ReportCard.read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="^--report-card .*: .*No such file.*; give the"):
        ReportCard.read(tmp_path / "none.json")
