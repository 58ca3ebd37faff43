"""The pictures of a run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from hamner.checkpoint.run_folder import RunFolder, append_record
from hamner.config.options import OPTIONS
from hamner.config.train import CONFIG_FILE, FineTuning, TrainConfig
from hamner.errors import UserError
from hamner.plot import run as pictures
from hamner.plot.__main__ import PlotConfig, main, plot
from hamner.plot.figure import MAX_POINTS, thin
from hamner.plot.log import MAX_ROUTED, RunLog, read_log


def record(step: int, **values) -> dict:
    return {
        "step": step,
        "tokens": 100 * step,
        "loss": 8.0 - step,
        "seconds": 2.0 * step,
        "tokens_per_second": 5.0,
    } | values


def folder_of(path: Path, records: list[dict], config: TrainConfig | None = None) -> RunFolder:
    """A run's folder with these records, and its configuration if it has one."""
    run = RunFolder(path)
    path.mkdir(exist_ok=True)
    run.metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    if config:
        (path / CONFIG_FILE).write_text(json.dumps(config.to_json()))
    return run


def log_of(path: Path, records: list[dict]) -> RunLog:
    return read_log(folder_of(path, records).metrics)


def axes():
    return Figure().subplots()


def test_validation_is_drawn_where_it_was_made(tmp_path):
    """Each record repeats the latest evaluation."""
    records = [
        record(1),
        record(2, val_loss=6.0, val_step=2, spikes=[{"tokens": 150, "loss": 9.5}, {"loss": 1}]),
        record(3, val_loss=6.0, val_step=2, skipped_steps=1),
        record(4, val_loss=4.5, val_step=4, skipped_steps=1),
        record(5, val_loss=4.5, val_step=4, skipped_steps=3),
    ]
    drawn = axes()
    pictures._draw_loss(drawn, log_of(tmp_path, records), None)
    training, validation, spike, *skipped = drawn.lines
    assert list(training.get_xdata()) == [100, 200, 300, 400, 500]
    assert list(validation.get_xdata()) == [200, 400]
    assert list(validation.get_ydata()) == [6.0, 4.5]
    assert spike.get_xydata().tolist() == [[150, 9.5]]
    assert [line.get_xdata()[0] for line in skipped] == [300, 500]


def test_steps_that_a_restart_repeated_are_drawn_once(tmp_path):
    spike = {"spikes": [{"tokens": 390, "loss": 9.0}]}
    router = {"router": {"load": [[0.5, 0.5]], "entropy": [0.6]}}
    first = [record(1, **router), record(2), record(3), record(4, **spike, **router)]
    log = log_of(tmp_path, [*first, record(3, loss=1.5), record(5, loss=1.0)])
    assert log["step"].tolist() == [1, 2, 3, 5]
    assert log["loss"].tolist() == [7.0, 6.0, 1.5, 1.0]
    assert len(log.spikes) == 0
    assert [tokens for tokens, _ in log.routed] == [100]


def test_a_long_log_is_drawn_of_few_points(tmp_path):
    x, y = np.arange(100_000.0), np.sin(np.arange(100_000.0))
    y[7], y[50_000] = math.nan, 9.0
    at, mean, low, high = thin(x, y)
    assert len(at) == len(mean) == MAX_POINTS
    assert (high.max(), low.min()) == (9.0, pytest.approx(-1.0, abs=1e-3))
    assert at.mean() == pytest.approx(50_000, rel=1e-3)
    assert (np.diff(at) > 0).all()
    router = {"load": [[0.5, 0.5]], "entropy": [0.6]}
    log = log_of(tmp_path, [record(step, router=router) for step in range(1, 3 * MAX_ROUTED)])
    assert MAX_ROUTED // 2 <= len(log.routed) <= MAX_ROUTED
    assert (np.diff([tokens for tokens, _ in log.routed]) == 400).all()


OPTION = replace(OPTIONS["a"], tokens=2_000_000_000)


def falling(steps: int) -> list[dict]:
    """Readings that follow a law exactly, 1M tokens apart."""
    return [
        record(step, tokens=1e6 * step, loss=2.0 + 30 * (1e6 * step) ** -0.15, lr=1e-4)
        for step in range(1, steps + 1)
    ]


def test_the_expected_loss_holds_the_law_to_the_end_of_the_run(tmp_path):
    run = folder_of(tmp_path, falling(500), OPTION)
    expected = pictures.expect(run, read_log(run.metrics))
    assert expected.tokens[-1] == 1e9  # twice what was seen
    loss, low, high = expected.at(2e9)
    assert low < 2.0 + 30 * 2e9**-0.15 < high
    assert high - low < 0.3
    assert str(expected).startswith(f"expected: {loss:.2f} at 2B tokens, {low:.2f} to {high:.2f}")
    drawn = axes()
    pictures._draw_loss(drawn, read_log(run.metrics), expected)
    assert drawn.lines[0].get_label() == str(expected)
    (band,) = drawn.collections
    assert band.get_paths()[0].contains_point((1e9, expected.at(1e9)[0]))
    # The first readings are far above all that follows.
    assert drawn.get_ylim()[1] < 2.0 + 30 * 1e6**-0.15


@pytest.mark.parametrize(
    ("records", "config"),
    [
        (falling(10), OPTION),
        (falling(500), None),
        (falling(500), replace(OPTION, sft=FineTuning())),
        ([r | {"loss": 3.0} for r in falling(500)], OPTION),
    ],
    ids=["too short", "no config", "fine-tuning", "not falling"],
)
def test_nothing_is_expected_where_no_law_fits(tmp_path, records, config):
    run = folder_of(tmp_path, records, config)
    assert pictures.expect(run, read_log(run.metrics)) is None
    assert pictures.draw_run(run)


def test_what_was_projected_is_drawn_with_its_interval(tmp_path):
    run = folder_of(tmp_path, [record(1), record(2)])
    assert pictures._read_plan(run) == {}
    row = {"step": 100, "projected": {"tokens_per_second": 6.0, "peak_gib": 4.0}}
    append_record(run.plan, row)
    assert pictures._read_plan(run)["tokens_per_second"] == (6.0, 6.0, 6.0)
    row["projected"] |= {"tokens_per_second_interval": [5.0, 8.0], "peak_gib_interval": "?"}
    append_record(run.plan, row)
    append_record(run.plan, {"step": 1, "projected": [1]})
    planned = pictures._read_plan(run)
    assert planned == {"tokens_per_second": (5.0, 6.0, 8.0), "peak_gib": (4.0, 4.0, 4.0)}
    for name, bands in (("tokens_per_second", 1), ("peak_gib", 0)):
        drawn = axes()
        log = read_log(run.metrics)
        pictures._draw_measured(drawn, log, "tokens_per_second", "", planned=planned[name])
        assert [line.get_ydata()[0] for line in drawn.lines] == [5.0, planned[name][1]]
        assert len(drawn.patches) == bands


def routed(step: int, load: object, entropy: object) -> dict:
    return record(step, router={"load": load, "entropy": entropy})


def test_routers_are_drawn_by_layer_in_fair_shares(tmp_path):
    records = [
        routed(1, [[0.5, 0.5], [0.9, 0.1]], [0.69, 0.3]),
        routed(2, [[0.6, 0.4], [0.8, 0.2]], [0.68, 0.4]),
    ]
    log = log_of(tmp_path, records)
    load, entropy = Figure().subplots(2)
    pictures._draw_expert_load(load, log.routed)
    pictures._draw_router_entropy(entropy, log.routed)
    *drawn, fair = [list(line.get_ydata()) for line in load.lines]
    assert drawn == [[1.0, 1.2], [1.0, 0.8], [1.8, 1.6], [0.2, 0.4]]
    assert fair == [1.0, 1.0]
    assert list(load.lines[0].get_xdata()) == [100, 200]
    assert [list(line.get_ydata()) for line in entropy.lines] == [[0.69, 0.68], [0.3, 0.4]]


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_routers_are_drawn_only_for_mixtures(tmp_path):
    strange = (
        ("much", [1.0]),
        ([], []),
        ([[]], [1.0]),
        ([[0.5, "half"]], [1.0]),
        ([[0.5, 0.5]], []),
        ([0.5], [1.0]),
    )
    run = folder_of(tmp_path, [record(1), *(routed(2, *pair) for pair in strange)])
    assert names(pictures.draw_run(run)) == ["loss.png", "throughput.png"]
    append_record(run.metrics, routed(3, [[0.5, 0.5], [0.9, 0.1]], [0.6, 0.3]))
    append_record(run.metrics, routed(4, [[0.5, 0.5]], [0.6]))
    assert names(pictures.draw_run(run)) == ["loss.png", "throughput.png", "router.png"]


def test_vram_is_drawn_only_with_a_gpu(tmp_path):
    run = folder_of(tmp_path, [record(1, peak_vram_gib=None)])
    assert names(pictures.draw_run(run)) == ["loss.png", "throughput.png"]
    append_record(run.metrics, record(2, peak_vram_gib=3.5))
    assert names(pictures.draw_run(run)) == ["loss.png", "throughput.png", "vram.png"]
    assert {path.name for path in run.plots.iterdir()} == {"loss.png", "throughput.png", "vram.png"}


def test_the_command_draws_one_run_where_training_does(tmp_path, capsys):
    run = folder_of(tmp_path / "mine", [record(1), record(2)])
    main([str(run.path)])
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {run.plots / 'loss.png'}"
    assert (run.plots / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_logged_step_has_nothing_to_draw(tmp_path):
    """As one that is interrupted before its first log line: training says no warning of it."""
    (tmp_path / "config.json").write_text("{}")
    (line,) = plot(PlotConfig((tmp_path,)))
    assert line == f"nothing to draw: {tmp_path} has not logged a step yet"
    with pytest.raises(UserError, match=r"nothing to compare: .* has not logged a step yet"):
        plot(PlotConfig((tmp_path, tmp_path)))


def test_what_is_no_run_is_refused(tmp_path):
    folder_of(tmp_path / "empty", [])
    (tmp_path / "folder").mkdir()
    for paths, output, named in (
        (["folder"], None, "folder is no run's folder: it has no metrics.jsonl"),
        (["nowhere", "folder"], None, "nowhere is no run's folder"),
        (["empty"], None, "metrics.jsonl has no record with a step and tokens"),
        ([], None, "name a run's folder"),
        (["empty"], tmp_path / "x.jsonl", r"x.jsonl must end in .png, .svg, .pdf"),
    ):
        with pytest.raises(UserError, match=named):
            plot(PlotConfig(tuple(tmp_path / path for path in paths), output))
