"""`pytest bench/` as a user runs it: a real process at a minute size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.report import ReportConfig, read_results, write_report
from tests import forked

ROOT = Path(__file__).parents[2]


def run(*args: str, from_nothing: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "--benchmark-only", "-p", "no:cacheprovider", *args]
    # It must not take itself for one of our workers, where benchmarks are off.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    # Where there is a GPU, a forked process has compiled kernels, which --smoke cannot interpret.
    start = subprocess.run if from_nothing or torch.cuda.is_available() else forked.run
    return start(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


def test_smoke_of_the_quick_rows(tmp_path):
    file = tmp_path / "results.json"
    modules = [
        f"bench/test_{name}.py"
        for name in (
            *("options", "trainers", "dense_kernels", "flash_attention", "moe_kernels"),
            *("int8_matmul", "muon"),
        )
    ]
    rows_file = tmp_path / "rows.jsonl"
    output = (f"--benchmark-json={file}", "--rows", str(rows_file))
    result = run("--smoke", "--quick", *output, *modules)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"]]
    assert {row["kind"] for row in rows} == {"option", "trainer", "kernel"}
    assert all({"commit", "torch", "triton"} <= row["conditions"].keys() for row in rows)
    for row in rows:
        if row["kind"] != "kernel":
            assert row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"]
            assert row["warm_up_seconds"] > 0
    assert all(row["row_seconds"] > 0 for row in rows)
    assert read_results(rows_file) == read_results(file)
    assert "| a " in result.stdout and "rms_norm forward" in result.stdout
    assert re.search(r"the suite took \d+ s, of them by file: .*dense_kernels \d", result.stdout)
    assert re.search(r"slowest rows, s: test_\w+\[.*\] \d+\.\d", result.stdout)
    assert "Rounds" not in result.stdout  # pytest-benchmark's table, a dozen columns wide
    assert write_report(ReportConfig(file, tmp_path / "out")).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_what_did_not_run():
    result = run("bench/test_checkpoint.py", "bench/test_trainers.py")
    assert result.returncode == 0, result.stdout + result.stderr
    line = r"no CUDA GPU here, so these rows did not run: \d+ of test_trainers"
    assert re.search(line, result.stdout)
    assert "checkpoint save: " in result.stdout


def test_a_budget_that_is_too_small_is_reported(tmp_path):
    file, rows = tmp_path / "results.json", tmp_path / "rows.jsonl"
    args = ("bench/test_options.py", "-k", "tiny-full", "--vram-budget", "0.001")
    result = run("--smoke", f"--benchmark-json={file}", "--rows", str(rows), *args)
    assert "tiny full: does not fit, needs 0.0 GiB of 0.0 GiB" in result.stdout
    assert [misfit["row"] for misfit in read_results(rows).misfits] == ["tiny full"]


def test_a_file_of_rows_that_cannot_be_written_is_refused_at_once(tmp_path):
    rows = str(tmp_path / "nowhere" / "rows.jsonl")
    result = run("--smoke", "--rows", rows, "bench/", from_nothing=True)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "rows.jsonl cannot be written: No such file" in result.stderr


def test_compiling_runs_each_row_and_times_none(tmp_path):
    """Of what another process has taken nothing is left."""
    files = ("bench/test_trainers.py", "bench/test_options.py", "-k", "tiny-full or a-compiled]")
    args = ("--smoke", "--compile-only", str(tmp_path), *files)
    for outcome in ("2 passed", "2 skipped"):
        result = run(*args)
        assert result.returncode == 0, result.stdout + result.stderr
        assert outcome in result.stdout
        assert "tokens/s" not in result.stdout and "the suite took" not in result.stdout
