"""The comparison of several GPUs with one: run small on the CPU, and its tables."""

import itertools
import json
import signal
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from bench import launch, moves, scaling
from bench.scaling import Scaling, main, plan
from bench.scaling_job import Row, measure
from bench.scaling_report import describe
from hamner.errors import UserError
from hamner.parallel.engines import Engine
from hamner.parallel.processes import SingleProcess
from tests import forked
from tests.corpus import write_predictable
from tests.parallel.jobs import run_job, run_module, said
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


def launch_forked(command, count, output, *, limit, meanwhile=lambda: None, **_) -> str | None:
    """What torchrun would start is forked with torch loaded: see `bench.launch.launch`."""
    folder = output.with_suffix("")
    codes = run_job(run_module, count, folder / "ranks", command, timeout=100)
    output.write_text(said(folder / "ranks", count))
    meanwhile()
    return launch.reason(output, max(codes, key=abs)) if any(codes) else None


def test_four_have_the_losses_of_one_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "launch", launch_forked)
    monkeypatch.setattr(scaling, "COMPARED_LOSSES", 4)
    settings = Scaling(
        tmp_path / "out", options=("tiny",), steps=2, gpus=(4,), moves=False, transports=()
    )
    one_layer = [*flags(tmp_path), "--num-layers", "1"]
    assert main(settings, one_layer) == 0, capsys.readouterr().out
    results = scaling.read(settings.output)
    references = {r["micro_batches"]: r["losses"] for r in results if r["engine"] == "one"}
    several = [r for r in results if r["gpus"] > 1]
    assert [(r["gpus"], r["engine"]) for r in several] == [(4, "ddp"), (4, "fsdp")]
    for r in several:
        assert len(r["losses"]) == 4
        assert r["losses"] == pytest.approx(references[r["gpus"]], rel=1e-6)
        assert (settings.output / f"tiny-{r['engine']}-{r['gpus']}.trace.json.gz").exists()
    assert (settings.output / "scaling.png").read_bytes().startswith(b"\x89PNG")
    written = (settings.output / "report.md").read_text()
    monkeypatch.delattr(launch, "launch")  # what is there is not measured again
    assert main(settings, one_layer) == 0
    assert scaling.read(settings.output) == results
    assert (settings.output / "report.md").read_text() == written


def test_a_gradient_that_is_wrong_in_one_process_shows_in_the_losses(monkeypatch, tmp_path):
    """As it is twice as large in one of two: the losses are over ten times as far apart as rounding
    took those of GPUs, 0.0002 at most."""
    real_backward, calls = Engine.backward, itertools.count()
    flags = ["--option", "tiny", "--device", "cpu", "--num-layers", "1", "--batch-size", "2"]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics.values())[:40_000])
    flags += ["--seq-len", "64", "--vocab-size", "1024", "--data", str(text)]
    row = Row("tiny", "one", 1, 2, micro_batches=2, losses=scaling.COMPARED_LOSSES)

    def losses() -> list[float]:
        return measure(row, flags, SingleProcess(), tmp_path)["losses"]

    right = losses()
    monkeypatch.setattr(
        Engine, "backward", lambda self, loss: real_backward(self, loss * (1 + next(calls) % 2))
    )
    assert max(abs(a - b) for a, b in zip(right, losses(), strict=True)) > 0.003


def test_runs_are_killed_and_resumed_on_another_number(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "launch", launch_forked)
    for name, value in {"STEPS": 8, "SAVE_EVERY": 3, "KILL_STEP": 5}.items():
        monkeypatch.setattr(moves, name, value)
    monkeypatch.setattr(scaling, "plan", lambda settings: [])
    settings = Scaling(tmp_path / "out", options=("tiny",), gpus=(2,), transports=())
    assert main(settings, flags(tmp_path)) == 0, capsys.readouterr().out
    killed_on_two, killed_on_one = moves.read(settings.output)
    assert (killed_on_two["before"], killed_on_two["after"]) == (2, 1)
    assert (killed_on_one["before"], killed_on_one["after"]) == (1, 2)
    for result in (killed_on_two, killed_on_one):
        assert result["resumed_from"] == 3
        assert result["apart"] < 1e-5
    assert killed_on_two["sentence"].startswith("error: rank 1 on ")
    assert "is dead" in killed_on_two["sentence"]
    assert "exit code -9" in killed_on_one["sentence"]
    assert "killed on" in (settings.output / "report.md").read_text()
    assert not list(settings.output.glob("*/checkpoints"))


def test_a_row_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    settings = Scaling(
        tmp_path / "out", options=("tiny", "a"), gpus=(2,), moves=False, transports=()
    )
    results = settings.output / "results.jsonl"

    def launch_rows(command, *_, **__):
        """The second row of three that are left always fails."""
        for row in json.loads(Path(command[-1]).read_text())["rows"]:
            if (row["option"], row["engine"]) == ("tiny", "fsdp"):
                return "out of memory"
            with results.open("a") as file:
                file.write(json.dumps(result(Row(**row), 100.0)) + "\n")
        return None

    monkeypatch.setattr(launch, "launch", launch_rows)
    assert main(settings, []) == 1
    assert len(scaling.read(settings.output)) == 7
    report = (settings.output / "report.md").read_text()
    assert "Not measured: tiny, fsdp on 2, links, 1x, 25 MiB: out of memory." in report


def test_a_job_that_fails_after_its_last_row_is_named(tmp_path, monkeypatch):
    """Communicators may fail to close: the rows are there all the same."""
    settings = Scaling(tmp_path / "out", options=("tiny",), gpus=(2,), moves=False, transports=())

    def launch_rows(command, *_, **__):
        with (settings.output / "results.jsonl").open("a") as file:
            for row in json.loads(Path(command[-1]).read_text())["rows"]:
                file.write(json.dumps(result(Row(**row), 100.0)) + "\n")
        return launch.TOO_LONG

    monkeypatch.setattr(launch, "launch", launch_rows)
    assert main(settings, []) == 1
    report = (settings.output / "report.md").read_text()
    assert f"Not measured: the end of job links-2-0: {launch.TOO_LONG}." in report
    assert "ddp" in report
    assert main(settings, []) == 0


def timeit(statement: str) -> list[str]:
    """The command runs a statement once, in a module without torch."""
    return ["timeit", "-n", "1", "-r", "1", "-s", "import os, time", statement]


def launched(command: list[str], count: int, output: Path, seconds: float = 100) -> str | None:
    return launch.launch(command, count, output, limit=time.monotonic() + seconds)


def test_torchrun_starts_a_module_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "subprocess", forked)
    output = tmp_path / "said.txt"
    assert launched(timeit("print('rank', os.environ['RANK'])"), 2, output) is None
    assert {"rank 0", "rank 1"} <= set(output.read_text().splitlines())
    fail = timeit(
        "print('error: no luck', flush=True) or os._exit(1) if os.environ['RANK'] == '1' else "
        "time.sleep(60)"
    )
    assert launched(fail, 2, output) == "error: no luck"


def test_what_takes_too_long_is_ended(tmp_path):
    output = tmp_path / "said.txt"
    assert launched(timeit("time.sleep(60)"), 1, output, 0.2) == launch.TOO_LONG
    assert launched(timeit("os._exit(7)"), 1, output) == f"exit code 7, see {output}"


def test_an_interrupt_ends_what_was_launched(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        launch.subprocess,
        "Popen",
        lambda *args, real=subprocess.Popen, **options: (
            started.append(real(*args, **options)) or started[-1]
        ),
    )

    def interrupt() -> None:
        raise KeyboardInterrupt

    limit = time.monotonic() + 100
    with pytest.raises(KeyboardInterrupt):
        launch.launch(
            timeit("time.sleep(60)"), 1, tmp_path / "said.txt", limit=limit, meanwhile=interrupt
        )
    assert started[0].returncode == -signal.SIGTERM


def test_tables(tmp_path):
    one, reference = Row("a", "one", 1, 30), Row("a", "one", 1, 2, micro_batches=2, losses=2)
    ddp = Row("a", "ddp", 2, 30, losses=2)
    slow = Row("a", "ddp", 2, 10, micro_batches=4, transport="sockets")
    text = describe(
        [
            result(one, 100.0),
            result(reference, 200.0, [8.0, 7.5]),
            result(ddp, 102.0, [8.0, 7.502], communication_ms=3.92, exposed_ms=0.561),
            result(slow, 600.0, bus_gbs=1.25),
        ],
        [
            asdict(moves.Move("a", 2, 1))
            | {"resumed_from": 8, "steps": 20, "apart": 2e-4, "apart_after": 1e-4}
        ],
        {},
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    speeds = "481,882", "477,204-486,653"
    assert ["a", "2", "ddp", "yes", *speeds, "15.7", "1.961", "0.00200", "3.92", "0.56"] in rows
    assert ["a", "2", "1", "8", "20", "0.00020", "0.00010"] in rows
    assert ["sockets", "1.2", "a", "4", "25", "600.0", "327,680", "1.333"] in rows
    assert "Conditions: gpu X." in text


def test_the_plan_has_every_row_once_and_links_apart():
    jobs = plan(Scaling(gpus=(4, 8)))
    names = [row.name for job in jobs for row in job]
    assert len(names) == len(set(names))
    assert all(len({(row.transport, row.gpus) for row in job}) == 1 for job in jobs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpus": (1, 4)}, "--gpus is 1 4"),
        ({"gpus": (4, 4)}, "--gpus 4 4 names one twice"),
        ({"transports": ("pigeons",)}, "pigeons is not one of"),
        ({"options": ()}, "--options is empty"),
        ({"steps": 1}, "--steps 1 has no deciles"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Scaling(**{"gpus": (2,), **wrong})


def test_flags_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
    settings = Scaling(tmp_path / "out", options=("tiny",), gpus=(4,))
    with pytest.raises(UserError, match="--batch-size 0 must be above 0"):
        main(settings, ["--batch-size", "0"])
    with pytest.raises(UserError, match="--option nope is not one of"):
        main(replace(settings, slow_option="nope"), [])
    for name, found in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    with pytest.raises(UserError, match="--gpus 4: this machine has 2"):
        main(settings, [])
    assert not settings.output.exists()
