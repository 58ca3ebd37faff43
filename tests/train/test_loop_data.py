"""What the trainer does when its data fails, and where it keeps its validation rows."""

import gzip
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.options import OPTIONS
from hamner.config.train import TrainConfig
from hamner.data.loader import TrainLoader
from hamner.errors import UserError
from hamner.train.loop import TrainingLoop, train
from tests import forked
from tests.data.hub_server import HubServer


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A minute model on two files of text."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "ab":
        rows = [json.dumps(f"{name} says {'so ' * (i % 17)}{i}") + "\n" for i in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return TrainConfig(
        model=replace(
            OPTIONS["tiny"].model,
            hidden_size=64,
            num_layers=1,
            expert_intermediate_size=64,
            vocab_size=261,
            max_seq_len=64,
        ),
        option="tiny",
        data=(str(folder),),
        run_dir=tmp_path / "run",
        steps=60,
        batch_size=4,
        seq_len=32,
        warmup_steps=5,
        log_every=5,
        eval_every=0,
        save_every=0,
        sample_every=0,
        eval_tokens=512,
        val_fraction=0.1,
        device="cpu",
    )


def weights(result) -> bytes:
    return (result.checkpoint / checkpoint.MODEL_FILE).read_bytes()


def break_last_row(path) -> bytes:
    """Makes the last row no JSON, in as many bytes; returns what it was."""
    before = path.read_bytes()
    path.write_bytes(before[:-2] + b"\\\n")
    return before


def metrics(config) -> list[dict]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_when_the_only_source_fails_the_run_stops_saved(config):
    whole = train(config)
    steps = []
    for name in "ab":  # one of them comes second
        run_dir = config.run_dir.with_name(f"broken-{name}")
        stopped = replace(config, run_dir=run_dir)
        train(replace(stopped, stop_after=1))
        path = config.run_dir.parent / "data" / f"{name}.jsonl"
        good = break_last_row(path)
        with pytest.raises(UserError, match=f"{name}.jsonl, line 200: not JSON"):
            train(replace(stopped, resume=True))
        path.write_bytes(good)
        saved = checkpoint.find(run_dir / "checkpoints")[-1]
        saved.verify()
        steps.append(saved.step)
        assert weights(train(replace(stopped, resume=True))) == weights(whole)
    assert min(steps) == 1 < 10 < max(steps) < 60


def test_bad_rows_are_listed_and_may_go(config, capsys):
    """The run goes on exactly when the bad row is removed between two starts."""
    folder = Path(config.data[0])
    good = (folder / "b.jsonl").read_text().splitlines(keepends=True)
    (folder / "b.jsonl").write_text("".join([*good[:9], "null\n", *good[9:]]))
    config = replace(config, bad_rows=0.01, steps=16)
    whole = train(replace(config, run_dir=config.run_dir.with_name("whole")))
    train(replace(config, stop_after=8))
    (folder / "b.jsonl").write_text("".join(good))
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text() + '"one more"\n')
    with pytest.raises(UserError, match="--allow-data-change"):
        train(replace(config, resume=True))
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().removesuffix('"one more"\n'))
    capsys.readouterr()
    assert weights(train(replace(config, resume=True))) == weights(whole)
    bad = {str(folder / "b.jsonl"): {'"text" must be a string, not null': 1}}
    assert metrics(config)[0]["sources"][str(folder)]["bad_rows"] == bad
    assert "bad_rows" not in metrics(config)[-1]["sources"][str(folder)]
    train(replace(config, run_dir=config.run_dir.with_name("clean"), steps=1))
    assert "passed over" not in capsys.readouterr().out
    (folder / "b.jsonl").write_text("".join([*good, "null\n"]))
    train(replace(config, run_dir=config.run_dir.with_name("bad"), steps=1))
    assert 'b.jsonl: 1 "text" must be a string, not null\nthese rows are listed in ' in (
        capsys.readouterr().out
    )


def test_when_one_source_fails_the_run_goes_on_and_says_so(config, tmp_path, caplog):
    folder = Path(config.data[0])
    packed = folder / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((folder / "a.jsonl").read_bytes(), mtime=0))
    for name in "ab":
        (folder / f"{name}.jsonl").unlink()
    folder, other = str(folder), str(tmp_path / "other.jsonl")
    Path(other).write_text("".join(f'"other {i}"\n' for i in range(300)))
    config = replace(config, data=(f"{folder}=0.8", f"{other}=0.2"))
    train(replace(config, stop_after=1))
    packed.write_bytes(packed.read_bytes()[:-2] + b"??")
    result = train(replace(config, resume=True))
    assert result.step == 60
    records = metrics(config)
    assert [record["sources"][folder]["lost"] for record in records][-1]
    assert not any(record["sources"][other]["lost"] for record in records)
    tokens = [record["sources"][other]["tokens"] for record in records]
    assert tokens[-1] - tokens[-2] >= 5 * 4 * 32 - 20  # all of an interval, to within a document
    assert "TRAINING GOES ON WITHOUT IT" in caplog.text


def test_validation_rows_are_gathered_once(config, monkeypatch):
    train(replace(config, stop_after=2))
    stored = RunFolder(config.run_dir).validation
    assert stored.is_file()
    gathered = []
    real = TrainLoader.validation_rows
    monkeypatch.setattr(TrainLoader, "validation_rows", lambda *a: gathered.append(1) or real(*a))
    trainer = TrainingLoop(replace(config, resume=True))
    trainer.close()
    assert not gathered
    trainer = TrainingLoop(replace(config, resume=True, seq_len=16))
    trainer.close()
    assert gathered
    assert trainer.data.validation.inputs.shape == (32, 16)


def test_interrupt_does_not_wait_for_a_dead_stream(tmp_path):
    """The server answers no more: only the interrupt can end the run."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for i in range(4):
        rows = [json.dumps({"text": f"file {i} document {j} " + "x" * 99}) for j in range(50)]
        (folder / f"train-{i}.jsonl").write_text("\n".join(rows) + "\n")
    hub, run_dir = HubServer(folder), tmp_path / "run"
    model = ["--hidden-size", "64", "--num-layers", "1", "--vocab-size", "261"]
    lengths = ["--seq-len", "64", "--batch-size", "4", "--max-seq-len", "64", "--log-every", "1"]
    process = forked.Popen(
        [sys.executable, "-m", "hamner.train", "--option", "tiny", *model, *lengths]
        + ["--data", "hf:owner/name", "--val-fraction", "0", "--sample-every", "0"]
        + ["--device", "cpu", "--run-dir", str(run_dir), "--steps", "100000"],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")},
        text=True,
    )
    try:
        metrics = run_dir / "metrics.jsonl"
        process.wait_until(metrics.exists)
        hub.is_down = "times out"
        process.wait_until(lambda: hub.waiting and is_quiet(metrics))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        hub.close()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (saved,) = checkpoint.find(run_dir / "checkpoints")
    saved.verify()
    assert str(saved.path) in output


def is_quiet(path) -> bool:
    """Whether a file that grew until now does not grow for a second."""
    size = path.stat().st_size
    time.sleep(1)
    return path.stat().st_size == size
