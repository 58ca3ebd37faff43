"""The comparison of several GPUs with one: run small on the CPU, and its tables."""

import json
from dataclasses import asdict

import pytest

from bench import scaling
from bench.scaling import Scaling, describe, main, plan
from bench.scaling_job import Row
from hamner.errors import UserError
from tests import forked
from tests.corpus import write_predictable
from tests.train.test_main import SMALL

pytestmark = pytest.mark.xdist_group("parallel")


def flags(tmp_path) -> list[str]:
    data = write_predictable(tmp_path / "data.jsonl")
    small = SMALL[2:]  # without --option
    return [*small, "--batch-size", "2", "--data", str(data)]


def result(row: Row, milliseconds: float, losses=(), **more) -> dict:
    tokens = 1024 * 24 * row.gpus * row.micro_batches
    return {
        **asdict(row),
        "tokens_per_step": tokens,
        "p10_ms": milliseconds - 1,
        "p50_ms": milliseconds,
        "p90_ms": milliseconds + 1,
        "peak_gib": 15.7,
        "cuda_graph": True,
        "losses": list(losses),
        "bus_gbs": None,
        "conditions": {"gpu": "X", "sm_clock_mhz": "1"},
        **more,
    }


def test_small_rows_are_measured_once_and_have_the_losses_of_one_process(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(scaling, "subprocess", forked)
    settings = Scaling(tmp_path / "out", options=("tiny",), steps=2, gpus=2, transports=())
    assert main(settings, flags(tmp_path)) == 0, capsys.readouterr().out
    results = scaling.read(settings.output)
    names = [(r["engine"], r["micro_batches"]) for r in results]
    assert names == [("one", 1), ("one", 2), ("ddp", 1), ("fsdp", 1)]
    reference, ddp, fsdp = (r["losses"] for r in results[1:])
    assert len(reference) == scaling.COMPARED_LOSSES
    assert ddp == pytest.approx(reference, rel=1e-6)
    assert fsdp == pytest.approx(reference, rel=1e-6)
    written = (settings.output / "report.md").read_text()
    assert main(settings, flags(tmp_path)) == 0
    assert len(scaling.read(settings.output)) == 4
    assert (settings.output / "report.md").read_text() == written


def test_a_row_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    settings = Scaling(tmp_path / "out", options=("tiny", "a"), gpus=2, transports=())
    results = settings.output / "results.jsonl"

    def run_job(name, rows, **_):
        """The second row of three that are left always fails."""
        for row in rows:
            if (row.option, row.engine) == ("tiny", "fsdp"):
                return "out of memory"
            with results.open("a") as file:
                file.write(json.dumps(result(row, 100.0)) + "\n")
        return None

    monkeypatch.setattr(scaling, "run_job", run_job)
    assert main(settings, []) == 1
    assert len(scaling.read(settings.output)) == 7
    report = (settings.output / "report.md").read_text()
    assert "Not measured: tiny, fsdp on 2, links, 1x, 25 MiB: out of memory." in report


def test_tables(tmp_path):
    one, reference = Row("a", "one", 1, 30), Row("a", "one", 1, 2, micro_batches=2, losses=2)
    ddp = Row("a", "ddp", 2, 30, losses=2)
    slow = Row("a", "ddp", 2, 10, micro_batches=4, transport="sockets")
    text = describe(
        [
            result(one, 100.0),
            result(reference, 200.0, [8.0, 7.5]),
            result(ddp, 102.0, [8.0, 7.502]),
            result(slow, 600.0, bus_gbs=1.25),
        ],
        {},
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    speeds = "481,882", "477,204-486,653"
    assert ["a", "2", "ddp", "yes", *speeds, "15.7", "1.961", "0.00200"] in rows
    assert ["sockets", "1.2", "a", "4", "25", "600.0", "327,680", "1.333"] in rows
    assert "Conditions: gpu X." in text


def test_the_plan_has_every_row_once_and_links_apart():
    jobs = plan(Scaling(gpus=2))
    names = [row.name for job in jobs for row in job]
    assert len(names) == len(set(names))
    assert all(len({(row.transport, row.gpus) for row in job}) == 1 for job in jobs)


@pytest.mark.parametrize("wrong", [{"gpus": 1}, {"gpus": 2, "transports": ("pigeons",)}])
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(UserError, match="--gpus is 1|pigeons is not one of"):
        Scaling(**wrong)
