"""The command that kills a training: it meets the phases it is asked for, and finds differences."""

import json

import pytest

from bench import kills
from bench.kills import PHASES, Kills, main
from bench.restarts import is_same
from tests.corpus import write_predictable
from tests.test_train_command import SMALL


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    data = write_predictable(tmp_path_factory.mktemp("data") / "data.jsonl")
    return [*SMALL, "--data", str(data)]


def test_each_phase_is_killed_and_the_runs_are_the_same(flags, tmp_path, capsys):
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


def test_another_run_is_found_out(flags, tmp_path, capsys):
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
