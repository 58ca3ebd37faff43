"""Times are made up, and option a is a minute model; the rest is as on a GPU."""

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
from hamner.plan.report_card import ReportCard, StepMeasurement
from hamner.plan.step_time import CATEGORIES
from tests.corpus import write_predictable

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
        + [1e3 * cost.floor_seconds(card, "bf16") for *_, cost in card_kernels.kernels()]
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
        (card_kernels, "milliseconds", lambda build: next(floors) / SHARE),
        (ceilings, "measure", lambda: copy),
    ):
        monkeypatch.setattr(owner, name, value)
    return card


def made_up_step(gpu, attention, say):
    assert attention == "auto"
    say("option a")
    load = Load([1700.0, 1710.0, 1690.0], [340.0, 350.0], [])
    return StepMeasurement(
        60, 24_000.0, 23_900.0, 24_100.0, 15 * GIB, 21e3, 25e3, 28e3, 16 * GIB
    ), load


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
        "| projected | 25,000 (+4.2%), between 21,000 and 28,000: measured inside |",
        "| memory peak | 15.00 GiB, projected 16.00 (+6.7%) |",
        "A copy of 1 GiB: 749 GB/s, 80% of 936.",
    ):
        assert line in page
    assert "| 24576 x 1024 x 1536 | 57.0 | 80% | " in page
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("[") for line in lines) > len(card.kernels) + len(card.matmuls)

    plan(["--option", "a", "--report-card", str(tmp_path / "card" / "report_card.json")])
    assert "24,000" in capsys.readouterr().out


def test_a_card_that_option_a_does_not_fit(gpu, monkeypatch, tmp_path):
    def measure_step(*_):
        raise UserError("it takes 15.5 GiB of 8.0")

    monkeypatch.setattr(report_card, "measure_step", measure_step)
    main(["--out", str(tmp_path)])
    assert ReportCard.read(tmp_path / "report_card.json").step is None
    page = (tmp_path / "report_card.md").read_text()
    assert "Option a does not train here: it takes 15.5 GiB of 8.0" in page


def test_a_gpu_that_no_table_has(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Unheard-of 1")
    monkeypatch.setattr(report_card, "measure_step", made_up_step)
    main(["--out", str(tmp_path)])
    assert ReportCard.read(tmp_path / "report_card.json").device.gpu == "Unheard-of 1"


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
    for name, shape, kind, build, cost in card_kernels.kernels():
        assert callable(build)
        assert shape
        assert not kind or kind.partition("_")[0] in CATEGORIES
        assert cost.flops or cost.bytes
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
    step, load = card_step.measure_step(GPUS["rtx-3090"], "sdpa", lines.append)
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
