"""In a job one process dies, hangs, raises or is interrupted."""

import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hamner.checkpoint import format as checkpoint
from hamner.config.train import TrainConfig
from hamner.errors import EXIT_BAD_INPUT, EXIT_FAILED
from hamner.parallel.ranks import Rank
from hamner.train.loop import train
from hamner.train.step import ignore_phase
from tests import forked
from tests.corpus import write_predictable
from tests.parallel import faults
from tests.parallel.jobs import enter, run_job, said
from tests.train.test_loop import metrics, small_config
from tests.train.test_main import SMALL

pytestmark = [pytest.mark.xdist_group("parallel"), pytest.mark.timeout(300)]

FAULT_STEP = 5
SECONDS = 20
"""within which a job of this machine must have ended; --hang-minutes is a part of it"""


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return replace(
        small_config(tmp_path), log_every=1, eval_every=0, save_every=2, hang_minutes=4 / 60
    )


def train_with_fault(ports: list[int], config: TrainConfig, where: str, fault: str) -> None:
    """The function is the body of a process; rank 1 has the fault."""
    enter(ports)
    on_phase = ignore_phase
    if Rank.read().global_rank == 1:
        on_phase = getattr(faults, where)(FAULT_STEP, getattr(faults, fault))
    result = train(config, on_phase=on_phase)
    print("INTERRUPTED" if result.interrupted else "DONE", result.step)


@pytest.mark.parametrize(
    ("where", "fault", "cause"),
    [
        ("in_step", "die", r"rank 1 on \S+ is dead \(killed, .*\); rank 0 was in step [56];"),
        (
            "before_step",
            "hang",
            r"no step for 0\.06\d* minutes: rank 1 on \S+ is at train/loop\.py:\d+ .* in step 5;",
        ),
        (
            "before_step",
            "fail",
            r"rank 1 on \S+: ValueError: a broken card \(traceback in .*rank_1",
        ),
    ],
)
def test_one_process_ends_the_job_with_one_message(where, fault, cause, config, tmp_path):
    started = time.monotonic()
    codes = run_job(train_with_fault, 2, tmp_path / "out", config, where, fault)
    assert time.monotonic() - started < SECONDS
    assert 0 not in codes
    errors = [line for line in said(tmp_path / "out", 2).splitlines() if "error:" in line]
    assert len(errors) == 1, errors
    assert re.match(f"error: {cause}", errors[0]), errors
    assert "Traceback" not in said(tmp_path / "out", 2)
    assert ("Traceback" in (config.run_dir / "logs" / "rank_1.txt").read_text()) == (
        fault == "fail"
    )
    saved = checkpoint.find(config.run_dir / "checkpoints")
    for each in saved:
        each.verify()
    assert saved[-1].step >= 2  # that of step 4 may have been under way
    if fault == "hang":
        stacks = (config.run_dir / "logs" / "stacks_1.txt").read_text()
        assert "faults.py" in stacks


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_at_one_step(engine, config, tmp_path):
    config = replace(config, parallel=engine)
    job = (train_with_fault, 2, tmp_path / "out", config, "in_step", "be_interrupted")
    assert run_job(*job) == [0, 0]
    for rank in range(2):
        printed = (tmp_path / "out" / f"rank_{rank}.txt").read_text()
        assert f"INTERRUPTED {FAULT_STEP}" in printed
        # Rank 0 speaks; what each has said is in its log.
        assert ("interrupted at step" in printed) == (rank == 0)
        assert ("loss" in printed) == (rank == 0)
        assert "step 3 | loss" in (config.run_dir / "logs" / f"rank_{rank}.txt").read_text()
    assert checkpoint.find(config.run_dir / "checkpoints")[-1].step == FAULT_STEP


def train_with_lost_save(ports: list[int], config: TrainConfig) -> None:
    """The function is the body of a process; rank 1 dies in the second save."""
    enter(ports)
    if Rank.read().global_rank == 1:
        faults.in_part_of_second_save(faults.die)
    train(config)


def test_a_process_dies_while_all_save(config, tmp_path):
    """With FSDP2 the others wait for its part: they end too, and leave what was whole before."""
    config = replace(config, parallel="fsdp", keep=0)
    started = time.monotonic()
    codes = run_job(train_with_lost_save, 2, tmp_path / "out", config)
    assert time.monotonic() - started < SECONDS
    assert codes == [EXIT_FAILED, -9]
    (error,) = [line for line in said(tmp_path / "out", 2).splitlines() if "error:" in line]
    assert re.match(r"error: rank 1 on \S+ is dead .* the last checkpoint is whole", error), error
    (saved,) = checkpoint.find(config.run_dir / "checkpoints")
    saved.verify()
    train(replace(config, resume=True, parallel="auto", stop_after=config.steps - saved.step))
    assert [record["step"] for record in metrics(config.run_dir)] == list(range(1, 21))


def train_otherwise(
    ports: list[int], config: TrainConfig, changes: dict, environment: dict
) -> None:
    """The function is the body of a process; the last rank is started otherwise."""
    enter(ports)
    rank = Rank.read()
    if rank.global_rank == rank.world_size - 1:
        os.environ |= environment
        config = replace(config, **changes)
    train(config)


@pytest.mark.parametrize(
    ("changes", "environment", "cause"),
    [
        (
            {"lr": 0.5, "steps": 7},
            {},
            r"--steps 7 \(there 20\), --lr 0.5 \(there 0.005\);",
        ),
        # Rank 0 would take the job for one of two processes, and leave rows out.
        (
            {},
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            r"--nproc-per-node 1 \(there 3\);",
        ),
    ],
)
def test_a_process_that_was_started_otherwise_is_refused(
    changes, environment, cause, config, tmp_path
):
    job = (train_otherwise, 3, tmp_path / "out", config, changes, environment)
    assert run_job(*job) == [EXIT_BAD_INPUT] * 3
    (error,) = [line for line in said(tmp_path / "out", 3).splitlines() if "error:" in line]
    assert re.match(rf"error: rank 2 on \S+: started otherwise than rank 0: {cause}", error), error
    assert not config.run_dir.exists()


def train_in(ports: list[int], config: TrainConfig, folders: list[Path]) -> None:
    """The function is the body of a process, which finds the data in its own folder."""
    enter(ports)
    os.chdir(folders[Rank.read().global_rank])
    train(config)


def test_a_process_that_has_other_data_is_refused(config, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for documents, folder in enumerate(folders, 50):
        folder.mkdir()
        write_predictable(folder / "data.jsonl", documents)
    config = replace(config, data=("data.jsonl",))
    assert run_job(train_in, 2, tmp_path / "out", config, folders) == [EXIT_BAD_INPUT] * 2
    (error,) = [line for line in said(tmp_path / "out", 2).splitlines() if "error:" in line]
    assert re.match(r"error: rank 1 on \S+: --data is not here what rank 0 reads", error), error
    assert not config.run_dir.exists()


def test_torchrun_starts_a_failed_job_again(tmp_path):
    """A process is killed in a step, another in a save: the run is the one nobody killed."""
    data = write_predictable(tmp_path / "data.jsonl")
    args = [
        *(*SMALL, "--data", str(data), "--steps", "20", "--log-every", "1", "--eval-every", "0"),
        *("--save-every", "4", "--micro-batch-size", "4", "--parallel", "fsdp"),
    ]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    folder = tmp_path / "job"
    job = forked.run(
        [sys.executable, *launch, "--max-restarts", "2", "-m", "tests.parallel.faults", *args]
        + ["--run-dir", str(folder)],
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    assert job.returncode == 0, job.stderr
    resumed = re.findall(r"^resuming \S+ from (.*)$", job.stdout, re.MULTILINE)
    assert len(resumed) == 2, job.stdout
    # The save of step 4 may have been under way in step 7, and then again in step 8, which put its
    # save off by some steps; none from step 12 on was whole.
    assert resumed[0].startswith("the start") or resumed[0].endswith("step_00000004")
    assert int(resumed[1].rpartition("_")[2]) in range(8, 12)
    assert re.findall(r"^error: rank (\d) on \S+ is dead", job.stderr, re.MULTILINE) == ["1", "0"]
    assert not list((folder / "checkpoints").glob(".saving_*"))

    from hamner.train.__main__ import parse

    train(parse([*args, "--run-dir", str(tmp_path / "single")]))
    single, together = metrics(tmp_path / "single"), metrics(folder)
    assert [record["step"] for record in together] == list(range(1, 21))
    for expected, found in zip(single, together, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
