"""What a run does when steps, data, disks or checkpoints go bad under it."""

import contextlib
import json
import math
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint import writer
from hamner.config.train import TrainConfig
from hamner.errors import EXIT_BAD_STEPS, UserError
from hamner.train import health, loop, saves
from hamner.train.log import AsyncCopy
from hamner.train.loop import TrainingLoop, train
from hamner.train.replay import replay
from tests.corpus import write_predictable
from tests.train.loaders import Wrapped, opened_by
from tests.train.test_loop import assert_equal_weights, metrics, small_config

OVERFLOW = "z"
"""a character whose embedding is infinite"""


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return small_config(tmp_path)


def write_overflowing(path: Path, share: int) -> Path:
    """The predictable text, with OVERFLOW in every `share`-th document."""
    lines = write_predictable(path).read_text().splitlines()
    with path.open("w") as file:
        for number, line in enumerate(lines):
            text = json.loads(line)["text"]
            if number % share == 0:
                text = text[:50] + OVERFLOW + text[51:]
            file.write(json.dumps({"text": text}) + "\n")
    return path


def overflowing_trainer(config: TrainConfig, share: int) -> TrainingLoop:
    """A run in which batches with OVERFLOW have no finite loss."""
    data = write_overflowing(config.run_dir.parent / "overflowing.jsonl", share)
    settings = replace(
        config,
        data=(str(data),),
        log_every=1,
        save_every=4,
        keep=0,
        eval_every=0,
        val_fraction=0.0,
        # Apart from the head, or every logit would be infinite.
        model=replace(config.model, tie_word_embeddings=False),
    )
    made = TrainingLoop(settings)
    (token,) = made.tokenizer.encode(OVERFLOW)
    made.step.model.embed.weight.data[token] = math.inf
    return made


def run_to_end(made: TrainingLoop):
    try:
        return made.run_to_end()
    finally:
        made.close()


def test_bad_steps_are_skipped_counted_shown_and_kept(config, capsys):
    made = overflowing_trainer(config, share=8)
    result = run_to_end(made)
    assert result.step == 20
    assert result.diagnosis is None
    assert result.exit_code == 0
    records = metrics(config.run_dir)
    counts = [0, *(record["skipped_steps"] for record in records)]
    bad = [step for step, (a, b) in enumerate(zip(counts, counts[1:], strict=False), 1) if b > a]
    assert 0 < len(bad) < 15
    assert [r["step"] for r in records if r["loss"] is None] == bad
    assert all(math.isfinite(r["loss"]) for r in records if r["step"] not in bad)
    assert "NaN" not in (config.run_dir / "metrics.jsonl").read_text()
    kept = sorted((config.run_dir / "bad_steps").iterdir())
    assert [path.name for path in kept] == [f"step_{step:08d}.safetensors" for step in bad]
    # Only what was infinite from the start is not finite at the end.
    assert health.not_finite(made.step.optimizer.parameters) == ["embed.weight"]
    shown = capsys.readouterr().out
    assert f"WARNING: step {bad[0]} skipped: loss nan" in shown
    assert f"skipped {len(bad)}" in shown
    assert "\n--val-fraction 0: no evaluation\n" in shown
    (token,) = made.tokenizer.encode(OVERFLOW)
    for path in kept:
        assert (health.read(path).batch.inputs == token).any()


def test_replay_names_the_first_module_and_row(config):
    made = overflowing_trainer(config, share=8)
    run_to_end(made)
    (token,) = made.tokenizer.encode(OVERFLOW)
    path = max((config.run_dir / "bad_steps").iterdir())
    settings = replace(TrainConfig.read(config.run_dir / "config.json"), replay=path)
    found = replay(settings)
    rows = (found.reading.batch.inputs == token).any(dim=1).nonzero().flatten().tolist()
    assert [row for row, loss in enumerate(found.losses) if not math.isfinite(loss)] == rows
    assert found.worst_row == rows[0]
    assert found.first_module == "embed"
    assert found.gradients
    assert OVERFLOW in found.excerpt
    saves = checkpoint.find(made.run.checkpoints)
    older = [saved for saved in saves if saved.step < found.reading.step]
    assert found.weights == f"the weights of {older[-1].path}"
    for saved in older:  # as retention does
        shutil.rmtree(saved.path)
    assert replay(settings).weights == f"the weights of {saves[len(older)].path}"
    assert f"rows without a finite loss: {', '.join(map(str, rows))}" in str(found)


def test_five_bad_steps_in_a_row_stop_the_run(config, capsys):
    """The weights are those of before the first bad step, and are saved."""
    made = TrainingLoop(replace(config, log_every=0, eval_every=0))
    real_forward, calls = made.step.forward, []

    def overflow(*args):
        output = real_forward(*args)
        calls.append(args)
        if len(calls) in (2, 4) or len(calls) > 6:
            output = output._replace(loss=output.loss * math.inf)
        return output

    made.step.forward = overflow
    result = run_to_end(made)
    assert result.step == 11
    assert result.exit_code == 3
    assert "5 steps in a row had no finite loss or gradient (step 11: loss" in result.diagnosis
    assert "The weights are finite" in result.diagnosis
    assert result.diagnosis in capsys.readouterr().out
    assert made.log.skipped_steps == 7
    assert [saved.step for saved in checkpoint.find(made.run.checkpoints)] == [11]
    assert health.not_finite(made.step.optimizer.state_tensors()) == []


@pytest.mark.parametrize(("save_every", "saved"), [(4, [4, 6]), (7, [6])])
def test_a_non_finite_state_is_not_saved(config, monkeypatch, save_every, saved):
    """Not after the first bad step either, whose numbers come in late as on a GPU."""
    monkeypatch.setattr(AsyncCopy, "is_done", False)
    settings = replace(config, save_every=save_every)
    train(replace(settings, stop_after=6))
    made = TrainingLoop(replace(settings, resume=True))
    made.step.model.norm.weight.data[0] = math.nan
    result = run_to_end(made)
    assert result.step == 12
    assert "among them norm.weight" in result.diagnosis
    assert [found.step for found in checkpoint.find(made.run.checkpoints)] == saved
    assert result.checkpoint.name == "step_00000006"


@pytest.mark.parametrize("fails", [False, True])
def test_a_state_that_is_not_finite_is_never_saved(config, capsys, fails):
    """In a hang, at the end of a start or when data fail: bad steps are too few to end the run."""

    class Failing(Wrapped):
        def next_batch(self, is_stopped):
            self.batches += 1
            if self.batches == 4:
                made._report_hang(between_steps=True)
                if fails:
                    raise UserError("the source is gone")
            return self.loader.next_batch(is_stopped)

    made = TrainingLoop(replace(config, steps=5, stop_after=4, eval_every=0), opened_by(Failing))
    made.step.model.norm.weight.data[0] = math.nan
    with contextlib.suppress(UserError):
        run_to_end(made)
    assert checkpoint.find(made.run.checkpoints) == []
    said = capsys.readouterr().out
    assert "WARNING: the state is not finite in" in said
    assert ("stopped at step 4; never saved; continue" in said) != fails


def test_the_command_ends_with_its_own_code(config, monkeypatch, capsys):
    import hamner.train.__main__

    made = overflowing_trainer(config, share=1)
    monkeypatch.setattr(loop, "train", lambda _: run_to_end(made))
    assert hamner.train.__main__.main([]) == EXIT_BAD_STEPS
    # Nothing was saved, so the replay has the first weights, in which all is well.
    assert checkpoint.find(config.run_dir / "checkpoints") == []
    path = next((config.run_dir / "bad_steps").iterdir())
    assert hamner.train.__main__.main(["--replay", str(path)]) == 0
    assert "everything is finite this time" in capsys.readouterr().out


def test_spikes_are_in_the_metrics_and_the_plot(config, capsys):
    """One batch with its targets permuted, in a run that has settled and is resumed before the
    line that tells of it."""
    settings = replace(config, steps=60, log_every=9, eval_every=0)

    class Spoiling(Wrapped):
        def next_batch(self, is_stopped):
            batch = self.loader.next_batch(is_stopped)
            self.batches += 1
            if self.batches == 55:
                batch = replace(batch, targets=(batch.targets + 100) % 200)
            return batch

    made = TrainingLoop(replace(settings, stop_after=57), opened_by(Spoiling))
    run_to_end(made)
    train(replace(settings, resume=True))
    records = metrics(config.run_dir)
    assert [r["step"] for r in records if "spikes" in r] == [60]
    assert records[-1]["val_loss"] is None  # 0 is never, at the end too
    assert not made.run.samples.exists()
    (spike,) = records[-1]["spikes"]
    assert spike["step"] == 55
    assert spike["tokens"] == 55 * 8 * 64
    assert spike["z_score"] > 6
    assert "loss spike at step 55" in capsys.readouterr().out


def test_data_that_fails_saves_first(config):
    class Failing(Wrapped):
        def next_batch(self, is_stopped):
            self.batches += 1
            if self.batches > 7:
                raise UserError("the source is gone")
            return self.loader.next_batch(is_stopped)

    made = TrainingLoop(config, opened_by(Failing))
    with pytest.raises(UserError, match="the source is gone"):
        run_to_end(made)
    assert [saved.step for saved in checkpoint.find(made.run.checkpoints)] == [7]


def test_a_save_that_failed_is_made_up_for(config, monkeypatch, capsys):
    """Without waiting for the next one that is due: with --save-every 8 of 20 steps, one fails."""
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.0)
    whole = train(replace(config, run_dir=config.run_dir.with_name("whole")))
    real_save, failures = checkpoint.save, []

    def fail_once(folder, step, **kwargs):
        if not failures:
            failures.append(step)
            raise OSError(28, os.strerror(28))
        return real_save(folder, step, **kwargs)

    monkeypatch.setattr(checkpoint, "save", fail_once)
    result = train(replace(config, save_every=8, keep=0))
    saved = [found.step for found in checkpoint.find(config.run_dir / "checkpoints")]
    assert failures == [8]
    assert 8 < saved[0] < 16
    assert {saved[-1], result.step} == {20}
    assert "step 8 could not be saved (No space left on device)" in capsys.readouterr().out
    assert_equal_weights(whole, result)


@pytest.mark.parametrize(
    ("changes", "number"),
    [({"keep": 2}, 3), ({"keep": 0}, 5), ({"keep": 9}, 5), ({"save_every": 0}, 1)],
)
def test_a_disk_that_is_too_small_is_said_at_the_start(
    config, monkeypatch, capsys, changes, number
):
    config = replace(config, **{"steps": 20, "save_every": 4, "stop_after": 1, **changes})
    for missing in (1, 0):
        with contextlib.closing(TrainingLoop(config)) as made:
            state = {**made.step.model.state_dict(), **made.step.optimizer.state_tensors()}
            size = sum(tensor.nbytes for tensor in state.values())
            usage = SimpleNamespace(free=number * size - missing)
            monkeypatch.setattr(saves.shutil, "disk_usage", lambda _, usage=usage: usage)
            made.run_to_end()
        warning = f"free, and {number} checkpoints of "
        assert capsys.readouterr().out.count(warning) == missing
        shutil.rmtree(config.run_dir)


def test_a_full_disk_delays_metrics_and_ends_no_run(config, monkeypatch, capsys):
    from hamner.checkpoint import run_folder

    real_append, calls = run_folder.append_record, []

    def fail_at_first(path, *records):
        calls.append(path)
        if len(calls) <= 3:
            raise OSError(28, os.strerror(28))
        real_append(path, *records)

    monkeypatch.setattr(run_folder, "append_record", fail_at_first)
    train(replace(config, log_every=2))
    assert [r["step"] for r in metrics(config.run_dir)] == list(range(2, 21, 2))
    assert "metrics.jsonl cannot be written (No space left on device)" in capsys.readouterr().out


def test_a_tracker_that_fails_ends_no_run(config, capsys):
    class Tracker:
        def report(self, record):
            raise ConnectionError("no route to host")

        def close(self):
            pass

    made = TrainingLoop(config)
    made.log.reporters.append(Tracker())
    assert run_to_end(made).step == 20
    assert "WARNING: Tracker failed: no route to host" in capsys.readouterr().out


def test_a_stalled_source_is_noticed_and_the_run_saved(config, capsys):
    """The next batch comes when the watchdog has saved: then the run goes on."""
    whole = train(replace(config, run_dir=config.run_dir.with_name("whole")))
    saved, beats = threading.Event(), set()

    def on_phase(phase, step):
        if phase == "saved":
            saved.set()
        elif (phase, step) == ("backward", 5):  # of half a step nothing is saved
            made._report_hang(between_steps=False)
        elif phase == "step done":
            beats.add(made.watchdog.beats)

    class Stalling(Wrapped):
        def next_batch(self, is_stopped):
            self.batches += 1
            if self.batches == 8:
                assert saved.wait(30)
            return self.loader.next_batch(is_stopped)

    stalled = replace(config, hang_minutes=0.3 / 60)
    made = TrainingLoop(stalled, opened_by(Stalling), on_phase=on_phase)
    result = run_to_end(made)
    assert [found.step for found in checkpoint.find(made.run.checkpoints)] == [7, 20]
    assert len(beats) == 20
    assert "no step for 0.005 minutes" in capsys.readouterr().out
    assert "in next_batch" in (config.run_dir / "stacks.txt").read_text()
    assert_equal_weights(whole, result)
