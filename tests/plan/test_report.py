"""The document: whole, true to the plan, and never half-written."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from hamner.errors import UserError
from hamner.files import TEMPORARY
from hamner.plan import report
from hamner.plan.__main__ import PlanConfig, analyse
from hamner.plan.report import (
    TITLE,
    document,
    memory_table,
    options_table,
    step_times,
    write_report,
)


@pytest.fixture(scope="module")
def analysis():
    return analyse(PlanConfig(option="a"))


@pytest.fixture(scope="module")
def analysis_with_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "log.csv"
    tokens = np.linspace(1e7, 1e9, 60)
    rows = (f"{i},{2.6 + 2085.43 / t**0.3658},{t}\n" for i, t in enumerate(tokens))
    path.write_text("step,loss,tokens_total\n" + "".join(rows))
    return analyse(PlanConfig(option="current", metrics=path))


def cells(table: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows}


def test_memory_table_adds_up(analysis):
    rows = cells(memory_table(analysis.plan))
    kinds = ("weights", "optimizer", "activations", "loss, or gradients")
    for column, total in enumerate(rows["total"]):
        parts = sum(float(rows[kind][column]) for kind in kinds)
        assert float(total) == pytest.approx(parts, abs=0.03)
        fits = "yes" if float(total) <= 22 else "no"
        assert rows["within 22.0 GiB"][column] == fits
    assert sum("(chosen)" in name for name in rows["GiB"]) == 1


def test_memory_table_shows_a_mix_that_auto_chose():
    plan = analyse(PlanConfig(option="a", vram_budget=12)).plan
    header = cells(memory_table(plan))["GiB"]
    assert header[:3] == ["none", "selective", "full"]
    assert re.fullmatch(r"full:\d+ \(chosen\)", header[3])


def test_step_times_name_what_takes_time(analysis):
    text = step_times(analysis.plan)
    assert "matmul" in text
    assert "routing" not in text
    spent = [float(number) for number in re.findall(r"[a-z] ([\d.]+)[,.]", text.split(":")[1])]
    assert sum(spent) == pytest.approx(analysis.plan.prediction.step_ms, abs=0.5)


def test_document_has_every_section(analysis):
    text = document(analysis, "plan_files")
    titles = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert titles == [
        "The problem",
        "Evidence",
        "Hardware budget",
        "Options",
        "Recommendation",
        "Training plan",
        "What this rests on",
    ]
    assert (
        "Against the 46 runs measured so far the model is -5% to +3% off, on this card -5%." in text
    )
    assert "Train **a** (320.9M parameters): " in text
    assert "## Training plan\n\nOf option a:\n" in text
    assert "\n\n\n" not in text


def test_document_for_several_gpus():
    text = document(analyse(PlanConfig(gpus=2, nodes=2, batch_size=96)), "plan_files")
    assert "option a on 2 nodes of 2 x RTX 3090" in text
    assert "24 GiB, of which the run may take 22.0 GiB of each." in text
    assert "Communication, projected: each GPU sends" in text
    assert (
        "`torchrun --nnodes 2 --nproc-per-node 2 -m hamner.train --option a --batch-size 96 "
        "--tokens 10000000000 --vram-budget 22`"
    ) in text
    assert "\n\n\n" not in text


def test_the_command_shards_what_the_plan_shards():
    for flags in ({"parallel": "fsdp"}, {"vram_budget": 4.0, "gpus": 4}):
        text = document(analyse(PlanConfig(**{"gpus": 2} | flags)), "plan_files")
        assert " -m hamner.train --option a --tokens 10000000000 --parallel fsdp --vram-" in text


def test_memory_table_of_several_gpus_adds_up():
    rows = cells(memory_table(analyse(PlanConfig(gpus=2, parallel="fsdp")).plan))
    kinds = ("weights", "optimizer", "activations", "communication", "loss, or gradients")
    for column, total in enumerate(rows["total"]):
        parts = sum(float(rows[kind][column]) for kind in kinds)
        assert float(total) == pytest.approx(parts, abs=0.03)


def test_report_and_its_plots(tmp_path, analysis_with_run):
    path = tmp_path / "plan.md"
    write_report(path, analysis_with_run)
    text = path.read_text()
    images = re.findall(r"!\[.+\]\((.+)\)", text)
    assert sorted(images) == [f"plan_files/{name}.png" for name in ("loss", "memory", "run")]
    for image in images:
        assert (tmp_path / image).read_bytes().startswith(b"\x89PNG")
    assert "The run so far" in text
    # Nothing temporary stays behind.
    assert {p.name for p in tmp_path.iterdir()} == {"plan.md", "plan_files"}
    assert len(list((tmp_path / "plan_files").iterdir())) == 3


def test_report_is_replaced_whole_or_not_at_all(tmp_path, analysis, monkeypatch):
    path = tmp_path / "plan.md"
    path.write_text(old := f"{TITLE}a")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match=r"plan\.md cannot be written: No space left on device"):
        write_report(path, analysis)
    assert path.read_text() == old
    assert {p.suffix for p in (tmp_path / "plan_files").iterdir()} <= {TEMPORARY}


def test_folder_that_cannot_take_a_report(tmp_path, analysis):
    with pytest.raises(UserError, match=r"the folder .*gone does not exist; create it"):
        write_report(tmp_path / "gone" / "plan.md", analysis)
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        write_report(tmp_path, analysis)
    os.mkfifo(tmp_path / "pipe.md")
    with pytest.raises(UserError, match=r"pipe\.md is a pipe or a device; name a file"):
        write_report(tmp_path / "pipe.md", analysis)
    (tmp_path / "plan_files").write_text("in the way")
    with pytest.raises(UserError, match=r"plan\.md cannot be written: File exists"):
        write_report(tmp_path / "plan.md", analysis)


def test_option_that_cannot_reach_the_loss(analysis, monkeypatch):
    monkeypatch.setattr(report, "COHERENT_LOSS", 2.0)
    rows = cells(report.coherence_table(analysis))
    assert rows["current"] == ["never", "", "model too small"]


def test_a_model_the_law_does_not_know():
    """Option tiny: the law would put it above the loss of guessing."""
    rows = cells(options_table([analyse(PlanConfig(option="tiny")).plan]))
    assert rows["tokens"] == ["1.1M"]
    assert rows["loss by the published law"] == ["too small for the law"]
    assert "perplexity by it" not in rows


def test_a_short_run_has_its_length_in_a_unit_of_its_length():
    plan = analyse(PlanConfig(option="tiny", tokens=20_480)).plan
    rows = cells(options_table([plan]))
    assert rows["tokens"] == ["20.5K"]
    assert float(rows["hours (projected)"][0]) > 0
    assert float(rows["days (projected)"][0]) > 0
    assert " seconds. Each cause" in report.speed_interval(plan)
    day = analyse(PlanConfig(tokens=1e9)).plan
    assert " hours. Each cause" in report.speed_interval(day)
    assert " days. Each cause" in report.speed_interval(analyse(PlanConfig()).plan)
