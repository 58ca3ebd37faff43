"""What is compiled before the first row: which rows, by whom, and what is said of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import compile_ahead
from bench.compile_ahead import Claims, describe, few_layers, group_of, groups_of
from hamner.config.options import for_option
from tests import forked

ROOT = Path(__file__).parents[2]


def row(test: str, file: str = "test_x.py", *, needs_gpu: bool = True, **parameters):
    """A row as pytest collects it."""
    return SimpleNamespace(
        path=Path(file),
        originalname=test,
        nodeid=f"{file}::{test}[{'-'.join(map(str, parameters.values()))}]",
        callspec=SimpleNamespace(params=parameters),
        get_closest_marker=lambda name: needs_gpu if name == "needs_gpu" and needs_gpu else None,
        config=SimpleNamespace(rootpath=ROOT),
    )


def test_rows_that_compile_the_same_are_one_group():
    rows = [
        row("test_op", name="rope", direction=direction, implementation="hamner")
        for direction in ("forward", "backward")
    ]
    assert group_of(rows[0]) == group_of(rows[1])
    assert group_of(rows[0]) != group_of(row("test_op", name="rope", implementation="compiled"))
    policies = [row("test_option", option="a", policy=policy) for policy in ("none", "full")]
    assert list(groups_of(policies).values()) == [policies]


@pytest.mark.parametrize("name", ["eager", "sdpa-cudnn", "flash-attn"])
def test_what_comes_compiled_is_left_out(name):
    assert groups_of([row("test_op", implementation=name)]) == {}


def test_rows_of_the_cpu_are_left_out():
    assert groups_of([row("test_loader", source="shards", needs_gpu=False)]) == {}


def test_the_longest_first():
    names = ["rope", "hamner", "compiled, memory budget 0.5", "compiled"]
    rows = [
        row("test_op", implementation="hamner"),
        *(row("test_trainer", option="a", trainer=name) for name in names[1:]),
    ]
    ordered = [group[-1] for group in groups_of(rows)]
    assert ordered == [
        "trainer=compiled",
        "trainer=compiled, memory budget 0.5",
        "trainer=hamner",
        "implementation=hamner",
    ]


def test_a_group_has_one_taker(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take(("x", "option=a")) and not second.take(("x", "option=a"))
    assert second.take(("x", "option=b")) and not first.take(("x", "option=b"))
    assert first.take(("x", "option=a"))  # its next row


def test_groups_whose_names_differ_in_punctuation_are_two(tmp_path):
    claims = Claims(tmp_path)
    assert claims.take(("x", "memory budget 0.5")) and claims.take(("x", "memory budget 0-5"))


def test_few_layers_keep_everything_else():
    config = for_option("a")
    few = few_layers(config)
    assert few.model.num_layers == compile_ahead.LAYERS
    assert few.model.hidden_size == config.model.hidden_size
    assert few.tokens_per_step == config.tokens_per_step


@pytest.fixture
def own_caches(monkeypatch, tmp_path):
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compile_ahead, "WORTH_IT", 1)


def test_a_pool_runs_the_rows_and_what_failed_is_told(own_caches, monkeypatch):
    if not torch.cuda.is_available():  # a forked process has compiled kernels, see test_suite.py
        monkeypatch.setattr(compile_ahead, "subprocess", forked)
    file, calls = "bench/test_dense_kernels.py", []
    rows = [
        row("test_rope", file, direction="backward", implementation="hamner"),
        row("test_rope", file, direction="backward", implementation="compiled"),
    ]
    compiled = compile_ahead.run(rows, ["--smoke"], lambda: calls.append("meanwhile"))
    assert compiled["failed"] == [] and compiled["rows"] == 2 and calls == ["meanwhile"]
    assert describe(compiled).startswith("compiled ahead: 0 kernels and 0 graphs of 2 rows in ")
    rows[0].nodeid = "bench/test_nobody.py::test_rope"
    compiled = compile_ahead.run(rows[:1], ["--smoke"], lambda: None)
    assert "exit code 4" in compiled["failed"][0]
    assert "; 1 failed there: process 0: exit code 4" in describe(compiled)


def test_what_was_measured_beside_others_is_forgotten(own_caches, monkeypatch):
    cache = compile_ahead.inductor_cache()
    monkeypatch.setattr(compile_ahead, "pool", lambda *_args, **_how: NoProcesses())
    (cache / "before.best_config").touch()
    rows = [row("test_op", implementation="hamner")]
    compile_ahead.run(rows, [], lambda: (cache / "during.best_config").touch())
    assert [file.name for file in cache.glob("*.best_config")] == ["before.best_config"]


class NoProcesses:
    def __enter__(self) -> list:
        return []

    def __exit__(self, *_error) -> None:
        pass


def test_it_is_left_out_where_it_is_not_worth_it():
    assert compile_ahead.run([row("test_op", implementation="hamner")], [], pytest.fail) == {}


def test_a_row_that_fails_is_told_in_a_line(tmp_path):
    Claims(tmp_path).fail("test_x[a]", "OutOfMemoryError: CUDA\nout of memory. " + "x" * 1000)
    (line,) = Claims(tmp_path).failed()
    assert line.startswith("test_x[a]: OutOfMemoryError: CUDA out of memory. x") and len(line) < 250
