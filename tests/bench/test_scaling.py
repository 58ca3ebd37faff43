"""The comparison of several GPUs with one: run small on the CPU, and its tables."""

import itertools
import json
import math
import signal
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from bench import launch, moves, scaling
from bench.conditions import conditions
from bench.scaling import Scaling, main, plan
from bench.scaling_job import Row, measure, parts
from bench.scaling_report import describe
from hamner.checkpoint import format as checkpoint
from hamner.data import builtin
from hamner.errors import UserError
from hamner.parallel.engines import Engine
from hamner.parallel.processes import SingleProcess
from hamner.profile.summary import summarize
from hamner.profile.trace import read_trace
from tests import forked
from tests.corpus import write_predictable
from tests.parallel.jobs import run_job, run_module, said
from tests.train.test_main import SMALL

PROFILES = Path(__file__).parents[2] / "profiles"

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
        "grad_norms": [2 * loss for loss in losses],
        "data_ms": 0.25,
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
    """They read shards that were prepared of the built-in corpus, which is a short one here."""
    monkeypatch.setattr(builtin, "builtin_documents", lambda: tuple(topics.values())[:99])
    monkeypatch.setattr(launch, "launch", launch_forked)
    monkeypatch.setattr(scaling, "COMPARED_LOSSES", 4)
    settings = Scaling(
        tmp_path / "out", options=("tiny",), steps=2, gpus=(4,), moves=False, transports=()
    )
    one_layer = [*SMALL[2:], "--batch-size", "2", "--num-layers", "1"]
    assert main(settings, one_layer) == 0, capsys.readouterr().out
    results = scaling.read(settings.output)
    references = {r["micro_batches"]: r for r in results if r["losses"] and r["engine"] == "one"}
    several = [r for r in results if r["gpus"] > 1]
    assert {r["data"] for r in results} == {f"shards:{settings.output / 'shards-261'}"}
    assert all(0 < r["data_ms"] < r["p90_ms"] for r in results)
    assert [(r["gpus"], r["engine"]) for r in several] == [(4, "ddp"), (4, "fsdp")]
    for r in several:
        for name in ("losses", "grad_norms"):
            assert len(r[name]) == 4
            assert r[name] == pytest.approx(references[r["gpus"]][name], rel=1e-6)
        assert (settings.output / f"tiny-{r['engine']}-{r['gpus']}.trace.json.gz").exists()
    assert (settings.output / "scaling.png").read_bytes().startswith(b"\x89PNG")
    written = (settings.output / "report.md").read_text()
    monkeypatch.delattr(launch, "launch")  # what is there is not measured again
    assert main(settings, one_layer) == 0
    assert scaling.read(settings.output) == results
    assert (settings.output / "report.md").read_text() == written
    assert "ms a step more than one GPU" in written


@pytest.mark.parametrize(
    ("factors", "losses_apart", "norms_apart"),
    [((1, 2), (0.003, 0.1), 0.2), ((2, 2), (0, 2e-4), 0.99)],
)
def test_a_gradient_that_is_wrong_shows(factors, losses_apart, norms_apart, monkeypatch, tmp_path):
    """As it is twice as large in one of two, the losses are over ten times as far apart as rounding
    took those of GPUs, 0.0002 at most. As it is in both, which AdamW and clipping take out again,
    only the norms are."""
    real_backward, calls = Engine.backward, itertools.cycle(factors)
    flags = ["--option", "tiny", "--device", "cpu", "--num-layers", "1", "--batch-size", "2"]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics.values())[:40_000])
    flags += ["--seq-len", "64", "--vocab-size", "1024", "--data", str(text)]
    row = Row("tiny", "one", 1, 2, micro_batches=2, losses=scaling.COMPARED_LOSSES)

    right = measure(row, flags, SingleProcess(), tmp_path)
    monkeypatch.setattr(
        Engine, "backward", lambda self, loss: real_backward(self, loss * next(calls))
    )
    wrong = measure(row, flags, SingleProcess(), tmp_path)
    pairs = zip(right["losses"], wrong["losses"], strict=True)
    assert losses_apart[0] <= max(abs(a - b) for a, b in pairs) <= losses_apart[1]
    pairs = zip(right["grad_norms"], wrong["grad_norms"], strict=True)
    assert max(abs(b / a - 1) for a, b in pairs) > norms_apart


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
        assert result["norms_apart"] < 1e-4
        folder = settings.output / f"tiny-{result['before']}-to-{result['after']}"
        assert min(record["lr"] for record in moves.records(folder).values()) > 5e-5
    assert killed_on_two["sentence"].startswith("error: rank 1 on ")
    assert "is dead" in killed_on_two["sentence"]
    assert "exit code -9" in killed_on_one["sentence"]
    assert "killed on" in (settings.output / "report.md").read_text()
    assert not list(settings.output.glob("*/checkpoints"))


def test_a_run_that_starts_over_has_not_been_resumed(tmp_path, monkeypatch):
    """Its losses are those of the run left in peace."""

    def train(command, count, said, **_) -> str | None:
        folder = Path(command[-1])
        step = folder / "checkpoints" / "step_00000008"
        step.mkdir(parents=True, exist_ok=True)
        (step / "manifest.json").write_text("{}")
        steps = [{"step": n, "loss": 1.0, "grad_norm": 1.0} for n in range(1, moves.STEPS + 1)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(s)}\n" for s in steps))
        said.write_text(f"resuming {folder} {goes_on}\n")
        return "error: killed" if command[0] == "bench.killed_train" else None

    monkeypatch.setattr(launch, "launch", train)
    monkeypatch.setattr(checkpoint, "find", lambda folder: list(folder.iterdir()))
    runs, move = moves.Moves(tmp_path, "tiny", 2, []), moves.Move("tiny", 2, 1)
    goes_on = "from the start: no checkpoint is there"
    reason = runs.measure(move, math.inf)
    assert reason == f"{tmp_path / 'tiny-2-to-1'} did not go on from a checkpoint"
    assert moves.read(tmp_path) == []
    goes_on = f"from {tmp_path}/tiny-2-to-1/checkpoints/step_00000008"
    assert runs.measure(move, math.inf) is None
    assert [found["resumed_from"] for found in moves.read(tmp_path)] == [8]


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
    assert main(settings, flags(tmp_path)) == 1
    assert len(scaling.read(settings.output)) == 9
    report = (settings.output / "report.md").read_text()
    assert "Not measured: tiny, fsdp on 2, links, 1x, 25 MiB: out of memory." in report


def test_rows_of_an_earlier_version_are_refused(tmp_path):
    settings = Scaling(tmp_path, options=("tiny",), gpus=(2,), moves=False, transports=())
    old = result(Row("tiny", "one", 1, 2), 100.0)
    del old["grad_norms"]
    (tmp_path / "results.jsonl").write_text(json.dumps(old) + "\n")
    with pytest.raises(UserError, match="results.jsonl has rows of an earlier version"):
        main(settings, flags(tmp_path))


def test_a_job_that_fails_after_its_last_row_is_named(tmp_path, monkeypatch):
    """Communicators may fail to close: the rows are there all the same."""
    settings = Scaling(tmp_path / "out", options=("tiny",), gpus=(2,), moves=False, transports=())

    def launch_rows(command, *_, **__):
        with (settings.output / "results.jsonl").open("a") as file:
            for row in json.loads(Path(command[-1]).read_text())["rows"]:
                file.write(json.dumps(result(Row(**row), 100.0)) + "\n")
        return launch.TOO_LONG

    monkeypatch.setattr(launch, "launch", launch_rows)
    assert main(settings, flags(tmp_path)) == 1
    report = (settings.output / "report.md").read_text()
    assert f"Not measured: the end of job links-2-0: {launch.TOO_LONG}." in report
    assert "ddp" in report
    assert main(settings, flags(tmp_path)) == 0


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
    ddp, other_reference = Row("a", "ddp", 2, 30, losses=2), replace(reference, micro_batches=4)
    slow = Row("a", "ddp", 2, 10, micro_batches=4, transport="sockets")
    messages = {"communication_ms": 3.92, "exposed_ms": 0.561, "bus_gbs": 302.0}
    times = {"step": 102.0, "matmul": 71.5, "messages, exposed": 0.561}
    text = describe(
        [
            result(one, 100.0, parts_ms={"step": 100.0, "matmul": 70.0, "norm": 6.0}),
            result(reference, 200.0, [8.0, 7.5]),
            result(other_reference, 400.0, [8.0, 7.5]),
            result(ddp, 102.0, [8.0, 7.502], **messages, parts_ms=times),
            result(replace(ddp, engine="fsdp"), 102.0, [8.0, 7.5], grad_norms=[16.0, 30.0]),
            result(replace(ddp, gpus=4), 102.0, [8.0, 7.5]),
            result(replace(one, again=True), 99.0),
            result(slow, 600.0, bus_gbs=1.25),
        ],
        [
            asdict(moves.Move("a", 2, 1))
            | {"resumed_from": 8, "steps": 20, "apart": 2e-4, "apart_after": 1e-4}
            | {"norms_apart": 2e-5}
        ],
        {},
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    speeds = "481,882", "477,204-486,653"
    measured = [*speeds, "15.7", "1.941-1.961", "", "0.00200", "0.027", "0.25", "3.92", "0.56"]
    assert ["a", "2", "ddp", "yes", "302.0", *measured] in rows
    fsdp, on_four = (row for row in rows if row[1:3] in (["2", "fsdp"], ["4", "ddp"]))
    assert fsdp[-5:-3] == ["0.00000", "100.000"]
    assert on_four[9] == "3.85"
    assert ["a", "2", "1", "8", "20", "0.00020", "0.00010", "0.002"] in rows
    assert ["sockets", "1.2", "a", "4", "25", "600.0", "327,680", "1.320-1.333"] in rows
    more = [["step", "+2.00"], ["matmul", "+1.50"], ["messages, exposed", "+0.56"]]
    more.append(["norm", "-6.00"])
    assert [row for row in rows if len(row) == 2][2:] == more
    assert "Conditions: gpu X." in text


def test_the_parts_of_a_trace_are_its_step():
    """What runs side by side counts twice: 0.3% here."""
    summary = summarize(read_trace(PROFILES / "two-gpus" / "trace.json.gz"))
    found = parts(summary)
    whole = found.pop("step")
    assert sum(found.values()) == pytest.approx(whole, rel=5e-3)
    assert found["matmul"] == summary.categories["matmul"]
    assert found["messages, exposed"] == summary.communication.exposed_ms > 0
    assert found["copies for messages"] == pytest.approx(0, abs=1e-3)  # it is DDP's
    assert "communication" not in found


def test_conditions_have_what_nccl_is_told(monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    found = conditions.__wrapped__()
    assert (found["nccl"], found["NCCL_P2P_DISABLE"]) == ("2.28.9", "1")


def test_defaults_are_all_gpus_and_half_of_eight_on_their_own_links():
    assert [scaling.numbers_to_compare(found) for found in (2, 4, 8)] == [(2,), (4,), (4, 8)]
    assert {row.transport for job in plan(Scaling(gpus=(2,))) for row in job} == {"links"}


def test_the_plan_has_every_row_once_and_links_apart():
    jobs = plan(Scaling(gpus=(4, 8), transports=("shm-1", "sockets")))
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
        main(replace(settings, slow_option="nope", transports=("shm",)), [])
    for name, found in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    with pytest.raises(UserError, match="--gpus 4: this machine has 2"):
        main(settings, [])
    assert not settings.output.exists()
