"""The command that kills a training: it meets the phases it is asked for, and finds differences."""

import json
from pathlib import Path

import pytest

from bench import kills, restarts
from bench.kills import PHASES, Kills, main
from bench.restarts import is_same, make_output
from tests import forked
from tests.corpus import write_predictable
from tests.train.test_main import SMALL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    data = write_predictable(tmp_path_factory.mktemp("data") / "data.jsonl")
    return [*SMALL, "--data", str(data)]


@pytest.fixture
def forked_starts(monkeypatch):
    """Starts of a run are forked with torch loaded."""
    monkeypatch.setattr(restarts, "subprocess", forked)


def test_each_phase_is_killed_and_the_runs_are_the_same(flags, tmp_path, capsys, forked_starts):
    settings = Kills(kills=3, steps=20, output=tmp_path / "kills")
    assert main(settings, flags) == 0, capsys.readouterr().out
    result = json.loads((settings.output / "result.json").read_text())
    assert result["same"]
    met = [kill for kill in result["kills"] if any(kill["wanted"] in x for x in kill["inside"])]
    assert {kill["wanted"] for kill in met} == set(PHASES)
    assert all(kill["saved_step"] > 0 for kill in result["kills"][1:])
    assert "losses and gradient norms of 20 logged steps are the same: True" in (
        capsys.readouterr().out
    )


def test_another_run_is_found_out(flags, tmp_path, capsys, forked_starts):
    settings = Kills(kills=3, steps=8, output=tmp_path)
    runs = [kills.Run(settings, f"seed_{seed}", [*flags, "--seed", seed]) for seed in "01"]
    for run in runs:
        run.finish()
    assert not is_same(*runs)
    printed = capsys.readouterr().out
    assert "first difference, step 1:" in printed
    assert "weights and optimizer state are the same bit for bit: False" in printed


def test_a_run_that_fails_is_named(tmp_path):
    settings = Kills(kills=3, steps=8, output=tmp_path / "kills")
    with pytest.raises(SystemExit, match="did not come to its end, see .*undisturbed.txt"):
        main(settings, ["--no-such-flag"])


@pytest.mark.parametrize("harness", ["kills", "soak"])
def test_an_output_that_holds_something_else_stays(harness, tmp_path):
    """Named by mistake, a folder of somebody's work is not emptied."""
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "thesis.txt").write_text("three years")
    for output, fault in (
        (tmp_path, "it holds thesis.txt"),
        (tmp_path / "thesis.txt", "another folder"),
    ):
        result = forked.run_module(f"bench.{harness}", "--output", output, cwd=ROOT)
        assert result.returncode == 2, result.stderr
        assert f"--output {output}" in result.stderr and fault in result.stderr
        assert "Traceback" not in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "three years"
    assert (tmp_path / "undisturbed").is_dir()


def test_an_earlier_result_is_replaced(tmp_path):
    output = tmp_path / "new" / "kills"
    for _ in range(2):
        make_output(output, ("undisturbed", "killed"))
        assert not list(output.iterdir())
        (output / "killed").mkdir()
        (output / "killed_phases.txt").write_text("step 1")
