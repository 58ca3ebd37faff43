"""Times are made up, and option a is a minute model; the rest is as on a GPU."""

import contextlib
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import card_kernels, card_step, ceilings, report_card
from bench.card_step import Load, watched
from bench.card_text import spread
from bench.ceilings import Ceilings
from bench.report_card import main
from hamner.config.options import for_option
from hamner.errors import UserError
from hamner.hardware import GIB, GPUS
from hamner.plan import costs
from hamner.plan.__main__ import main as plan
from hamner.plan.efficiency import efficiency
from hamner.plan.memory import NONE
from hamner.plan.report_card import ReportCard
from hamner.plan.step_time import CATEGORIES, predict
from tests.corpus import write_predictable
from tests.plan.test_report_card import STEP

CONDITIONS = {
    "driver": "580.1",
    "commit": "abc",
    "power_limit_w": "[N/A]",
    "max_sm_clock_mhz": "2100",
}
SHARE = 0.8
"""of its peak and its bandwidth that everything reaches on this card"""


@pytest.fixture
def gpu(monkeypatch):
    """An RTX 3090 that reaches SHARE of its floors, however long that takes here."""
    card = GPUS["rtx-3090"]
    properties = SimpleNamespace(major=8, minor=6, total_memory=24 * GIB)
    floors = iter(
        [costs.matmul(*shape).flops / card.bf16_tflops / 1e9 for shape in card_kernels.MATMULS]
        + [
            card_kernels.attention_work(*shape, direction).flops / card.bf16_tflops / 1e9
            for shape in card_kernels.ATTENTION
            for direction in ("forward", "backward")
        ]
        + [1e3 * op.cost.floor_seconds(card, "bf16") for *_, op in card_kernels.kernels()]
    )
    copy = Ceilings(copy_gb_per_s=card.bandwidth_gbs * SHARE, matmul_tflop_per_s=60.0)
    for owner, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_properties", lambda: properties),
        (torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 3090"),
        (torch.cuda, "get_device_capability", lambda: (8, 6)),
        (report_card, "conditions", lambda: CONDITIONS),
        (report_card, "use_recordable_stream", lambda: None),
        (card_kernels, "warm_up", lambda: None),
        (report_card, "watched", lambda: contextlib.nullcontext(Load([1600.0, 1700.0]))),
        (card_kernels, "milliseconds", lambda build: next(floors) / SHARE),
        (ceilings, "measure", lambda: copy),
    ):
        monkeypatch.setattr(owner, name, value)
    return card


def made_up_step(gpu, reached, attention, say):
    assert attention == "auto"
    assert reached == efficiency(gpu)
    say("option a")
    load = Load([1700.0, 1710.0, 1690.0], [340.0, 350.0], [])
    step = replace(
        STEP,
        steps=60,
        tokens_per_second=24_000.0,
        tokens_per_second_p10=23_900.0,
        tokens_per_second_p90=24_100.0,
        peak_bytes=15 * GIB,
        projected_low=21e3,
        projected=24_001.0,
        projected_high=28e3,
    )
    return step, load


def test_both_files_are_written_and_the_plan_reads_them(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report_card, "measure_step", made_up_step)
    main(["--out", str(tmp_path / "card")])
    card = ReportCard.read(tmp_path / "card" / "report_card.json")
    assert card.device.load_clock_mhz == 1700
    assert card.device.power_limit_w is None
    assert {round(rate.tflops / gpu.bf16_tflops, 6) for rate in card.matmuls} == {SHARE}
    assert all(math.isclose(kernel.measured_ms * SHARE, kernel.floor_ms) for kernel in card.kernels)
    page = (tmp_path / "card" / "report_card.md").read_text()
    for line in (
        "| power limit | not said |",
        "| clock while training | 1,700 MHz (1,690 to 1,710) |",
        "| temperature while training | not said |",
        "| with | recompute selective, micro-batch 24, attention triton |",
        "| projected tokens/s | 24,001 (+0.0%), between 21,000 and 28,000: measured inside |",
        "| memory peak | 15.00 GiB, projected 16.00 (+6.7%) |",
        "A copy of 1 GiB: 749 GB/s, 80% of 936.",
        "| clock in matmuls of 8192^3 | 1,650 MHz (1,600 to 1,700) |",
        "| bf16 matmul, m x k x n | TFLOP/s | of 71.2 | predicted | error |",
        # 66.4 TFLOP/s x 1,024 / (1,024 + 95), and a gap of 3.3 us.
        "| 24576 x 1024 x 1536 | 57.0 | 80% | 60.6 | +6% |",
        "| router forward | 24576 x 768 | 0.051 | 0.041 | 80% | none |  |",
    ):
        assert line in page
    # 47 TFLOP/s at T 1,024.
    assert "| 1024 | 64 | forward | 57.0 | 80% | 47.0 | -17% |" in page
    rows = [kernel for kernel in card.kernels if kernel.kind == "matmul_grouped"]
    assert len(rows) == 3
    predicted, measured = (
        sum(getattr(row, name) for row in rows) for name in ("predicted_ms", "measured_ms")
    )
    assert f", grouped {predicted / measured - 1:+.0%}." in page
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("[") for line in lines) > len(card.kernels) + len(card.matmuls)

    plan(["--option", "a", "--report-card", str(tmp_path / "card" / "report_card.json")])
    assert "24,000" in capsys.readouterr().out


def test_a_folder_in_the_way_is_found_before_anything_is_measured(gpu, monkeypatch, tmp_path):
    (tmp_path / "report_card.json").mkdir()
    monkeypatch.setattr(report_card, "measure", None)
    with pytest.raises(UserError, match=r"^--out .*report_card\.json is a folder; name a file"):
        main(["--out", str(tmp_path)])


def test_a_card_that_option_a_does_not_fit(gpu, monkeypatch, tmp_path):
    def measure_step(*_):
        raise UserError("it takes 15.5 GiB of 8.0")

    monkeypatch.setattr(report_card, "measure_step", measure_step)
    main(["--out", str(tmp_path)])
    assert ReportCard.read(tmp_path / "report_card.json").step is None
    page = (tmp_path / "report_card.md").read_text()
    assert "Option a does not train here: it takes 15.5 GiB of 8.0" in page
    # What its kernels were measured at.
    assert ReportCard.read(tmp_path / "report_card.json").device.load_clock_mhz == 1650


def test_a_gpu_that_is_limited_is_held_against_the_speed_at_its_limit(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(report_card, "conditions", lambda: CONDITIONS | {"power_limit_w": "280.00"})

    def measure_step(gpu, reached, *_):
        assert reached == efficiency(gpu).at_power(gpu, 280)
        raise UserError("no text")

    monkeypatch.setattr(report_card, "measure_step", measure_step)
    main(["--out", str(tmp_path)])
    page = (tmp_path / "report_card.md").read_text()
    assert "The GPU is limited to 280 W, where such cards are sold with 350: " in page
    # 93% of 66.4 TFLOP/s x 1,024 / (1,024 + 95).
    assert "| 24576 x 1024 x 5632 | 57.0 | 80% | 56.4 | -1% |" in page


def test_a_gpu_that_no_table_has(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Unheard-of 1")
    monkeypatch.setattr(report_card, "measure_step", made_up_step)
    main(["--out", str(tmp_path)])
    assert ReportCard.read(tmp_path / "report_card.json").device.gpu == "Unheard-of 1"
    page = (tmp_path / "report_card.md").read_text()
    assert "Hamner's table lacks this GPU: its peak is taken to be the fastest matmul" in page
    assert "| bf16 matmul, m x k x n | TFLOP/s | of 57.0 | predicted | error |" in page


@pytest.mark.parametrize(
    ("flags", "has_gpu", "message"),
    [
        ([], False, "no CUDA GPU found: a report card is measured on the GPU it is about"),
        (["--out", "/dev/null/card"], True, "--out /dev/null/card cannot be written: Not a"),
    ],
)
def test_bad_input(gpu, flags, has_gpu, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(UserError, match=f"^{message}"):
        main(flags)
    assert not list(tmp_path.iterdir())


def test_every_kernel_has_work_and_a_kind_of_the_step_model():
    names = set()
    for name, shape, build, op in card_kernels.kernels():
        assert callable(build)
        assert shape
        assert not op.kind or op.kind.partition("_")[0] in CATEGORIES
        assert op.cost.flops or op.cost.bytes
        names.add(name)
    assert len(names) == 16


def test_step_is_timed_beside_its_projection(monkeypatch, tmp_path):
    data = str(write_predictable(tmp_path / "text.jsonl"))
    monkeypatch.setattr(card_step, "STEPS", 6)
    monkeypatch.setattr(card_step, "STEPS_SHOWN", 3)
    monkeypatch.setattr(card_step, "SECONDS", 0.01)
    monkeypatch.setattr(card_step, "nvidia_smi", lambda *fields: ["1500", "[N/A]", "66"])
    monkeypatch.setattr(card_step, "for_option", lambda _: minute_config(data))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    lines = []
    card = GPUS["rtx-3090"]
    reached = efficiency(card).at_clock(card, 1500)
    step, load = card_step.measure_step(card, reached, "sdpa", lines.append)
    assert (step.recompute, step.micro_batch_size, step.attention) == ("none", 2, "sdpa")
    prediction = predict(minute_config(data), card, (NONE,), 2, reached=reached)
    assert step.projected == prediction.tokens_per_second
    assert (step.steps, step.peak_bytes) == (6, 7)
    assert step.tokens_per_second_p10 <= step.tokens_per_second <= step.tokens_per_second_p90
    assert step.projected_low < step.projected < step.projected_high
    assert [line.partition(",")[0] for line in lines[1:]] == [
        "option a: step 3 of 6",
        "option a: step 6 of 6",
    ]
    assert set(load.clock_mhz) == {1500.0}
    assert not load.power_w
    assert spread(load.temperature_c, "C") == "66 C (66 to 66)"


def minute_config(data):
    config = replace(for_option("tiny"), data=(data,))
    model = replace(config.model, hidden_size=32, num_layers=1, expert_intermediate_size=32)
    return replace(config, model=model, device="cpu", batch_size=2, seq_len=32)


def test_a_gpu_is_watched_until_the_work_is_done(monkeypatch):
    monkeypatch.setattr(card_step, "SECONDS", 0.01)
    monkeypatch.setattr(card_step, "nvidia_smi", lambda *fields: None)
    with watched() as load:
        time.sleep(0.05)
    assert load == Load()
