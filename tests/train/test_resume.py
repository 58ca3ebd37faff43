"""What may change between two starts of a run, and what may not."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from hamner.checkpoint import format as checkpoint
from hamner.config.train import TrainConfig
from hamner.data.tokenizer import load_tokenizer, train_tokenizer
from hamner.errors import UserError
from hamner.train.loop import train
from hamner.train.schedule import Schedule
from tests.corpus import write_predictable
from tests.train.loaders import Wrapped, opened_by
from tests.train.test_loop import assert_equal_weights, metrics, small_config


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return small_config(tmp_path)


@pytest.fixture
def whole(config):
    """The run that never stops."""
    return train(replace(config, run_dir=config.run_dir.with_name("whole"), log_every=1))


@pytest.fixture
def stopped(config):
    """The same, stopped after half; its config to resume with."""
    train(replace(config, log_every=1, stop_after=10))
    return replace(config, log_every=1, resume=True)


def test_the_newest_whole_checkpoint_is_taken_and_the_damage_said(config, whole, capsys):
    train(replace(config, log_every=1, save_every=4, stop_after=10))
    *_, older, newest = checkpoint.find(config.run_dir / "checkpoints")
    weights = newest.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    resumed = train(replace(config, log_every=1, save_every=4, resume=True))
    shown = capsys.readouterr().out
    assert f"WARNING: passed over a newer checkpoint: {weights} has" in shown
    assert "it was cut short" in shown
    assert f"from {older.path}" in shown
    assert_equal_weights(whole, resumed)
    assert metrics(config.run_dir) == metrics(config.run_dir.with_name("whole"))
    names = {path.name for path in (config.run_dir / "checkpoints").iterdir()}
    assert "damaged_step_00000010" in names


def test_a_run_whose_checkpoints_are_away_is_not_started_over(config, capsys):
    train(replace(config, log_every=1, save_every=4, stop_after=6))
    folder, log = config.run_dir / "checkpoints", config.run_dir / "metrics.jsonl"
    before = log.read_bytes()
    folder.rename(config.run_dir / "elsewhere")
    folder.symlink_to("not_mounted")
    again = replace(config, log_every=1, save_every=4, resume=True, stop_after=1)
    with pytest.raises(UserError, match="checkpoints is not there, though every run has it: bring"):
        train(again)
    assert log.read_bytes() == before
    # Or killed before a save was whole.
    folder.unlink()
    folder.mkdir()
    capsys.readouterr()
    assert train(again).step == 1
    assert len(metrics(config.run_dir)) == 1
    assert (config.run_dir / "metrics.jsonl.before").read_bytes() == before
    said = " ".join(capsys.readouterr().out.split())
    assert "has no checkpoint, though" in said and "reached step 6: the run starts over" in said


def test_a_refused_resume_touches_nothing(config):
    train(replace(config, log_every=1, save_every=4, stop_after=10))
    folder = config.run_dir / "checkpoints"
    newest = checkpoint.find(folder)[-1]
    (newest.path / "state.json").write_text("{}")
    before = sorted(folder.iterdir()), (config.run_dir / "metrics.jsonl").read_bytes()
    other = replace(config.model, rope_theta=5e5)
    with pytest.raises(UserError, match="--rope-theta"):
        train(replace(config, model=other, resume=True))
    assert (sorted(folder.iterdir()), (config.run_dir / "metrics.jsonl").read_bytes()) == before


def test_no_whole_checkpoint_is_an_error_that_touches_nothing(stopped):
    folder = stopped.run_dir / "checkpoints"
    (saved,) = checkpoint.find(folder)
    (saved.path / "manifest.json").write_text("{}")
    before = (stopped.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole: .*manifest\.json"):
        train(stopped)
    assert [path.name for path in folder.iterdir()] == ["step_00000010"]
    assert (stopped.run_dir / "metrics.jsonl").read_bytes() == before


def test_a_start_that_died_before_its_first_save_leaves_no_row_twice(config, whole):
    train(replace(config, log_every=1, stop_after=3))
    (saved,) = checkpoint.find(config.run_dir / "checkpoints")
    saved.path.rename(saved.path.with_name(".saving_00000003"))
    resumed = train(replace(config, log_every=1, resume=True))
    assert_equal_weights(whole, resumed)
    assert metrics(config.run_dir) == metrics(config.run_dir.with_name("whole"))


@pytest.mark.parametrize("changes", [{"recompute": "full:1"}, {"compile": True}])
def test_same_arithmetic_may_change_without_a_trace(stopped, whole, changes, monkeypatch):
    # Inductor takes a minute and rounds otherwise; what is tested is the wrapping.
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real_compile(model, backend="eager"))
    resumed = train(replace(stopped, **changes))
    assert_equal_weights(whole, resumed)  # names too: no _orig_mod prefix
    assert metrics(stopped.run_dir) == metrics(stopped.run_dir.with_name("whole"))


def test_a_compiled_run_resumes_uncompiled(config, whole, monkeypatch):
    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real_compile(model, backend="eager"))
    train(replace(config, compile=True, stop_after=10))
    assert_equal_weights(whole, train(replace(config, resume=True)))


def test_micro_batch_may_change(stopped, whole):
    resumed = train(replace(stopped, micro_batch_size=2))
    assert resumed.tokens == whole.tokens
    assert abs(resumed.val_loss - whole.val_loss) < 1e-3


def test_recompute_permission_and_router_weights_are_not_the_model(stopped):
    model = replace(stopped.model, gradient_checkpointing=False, router_aux_loss_coef=0.5)
    assert train(replace(stopped, model=model)).step == 20


@pytest.mark.parametrize(("batch_size", "seq_len"), [(4, 64), (16, 64), (8, 32)])
def test_batch_and_length_may_change(stopped, whole, batch_size, seq_len):
    """Counters, schedule and length go by tokens: those that were set at the start."""
    changed = replace(stopped, batch_size=batch_size, seq_len=seq_len)
    resumed = train(changed)
    assert resumed.tokens == whole.tokens == 20 * 8 * 64
    assert resumed.step == 10 + 10 * 8 * 64 // changed.tokens_per_step
    before = {r["tokens"]: r["lr"] for r in metrics(stopped.run_dir.with_name("whole"))}
    after = {r["tokens"]: r["lr"] for r in metrics(stopped.run_dir)}
    common = before.keys() & after.keys()
    assert len(common) >= 15
    assert all(before[tokens] == after[tokens] for tokens in common)


def test_a_second_resume_keeps_the_schedule(stopped, whole):
    halved = replace(stopped, batch_size=4)
    train(replace(halved, stop_after=4))
    assert train(halved).tokens == whole.tokens


def test_a_new_length_counts_anew(stopped):
    assert train(replace(stopped, steps=25)).step == 25


def test_schedule_flags_that_changed_count_anew(config):
    saved = Schedule(config)
    saved.warmup_tokens, saved.total_tokens = 500, 9_000
    state = saved.state_dict()

    def resumed(changed) -> tuple[int, int]:
        schedule = Schedule(changed)
        schedule.warmup_tokens, schedule.total_tokens = 1_000, 18_000
        schedule.load_state_dict(state)
        return schedule.warmup_tokens, schedule.total_tokens

    assert resumed(config) == (500, 9_000)
    assert resumed(replace(config, warmup_steps=7)) == (1_000, 9_000)
    assert resumed(replace(config, steps=None, tokens=1e6)) == (500, 18_000)


def tokens_seen(config, steps: int) -> list[int]:
    """The inputs of the next steps, in order, saved as a run's position."""
    seen: list[int] = []

    class Watched(Wrapped):
        def next_batch(self, is_stopped):
            batch = self.loader.next_batch(is_stopped)
            seen.extend(batch.inputs.flatten().tolist())
            return batch

    train(replace(config, stop_after=steps), open_data=opened_by(Watched))
    return seen


def test_no_token_is_repeated_or_skipped_when_the_batch_changes(config):
    once = tokens_seen(replace(config, run_dir=config.run_dir.with_name("once")), 18)
    parts = tokens_seen(config, 6)
    parts += tokens_seen(replace(config, resume=True, batch_size=4), 10)
    parts += tokens_seen(replace(config, resume=True, batch_size=14), 4)
    assert parts == once[: len(parts)]
    assert len(parts) == 64 * (6 * 8 + 10 * 4 + 4 * 14)


def test_every_difference_of_the_model_is_spelled_out(stopped):
    other = replace(stopped.model, expert_intermediate_size=160, rope_theta=5e5)
    with pytest.raises(UserError) as raised:
        train(replace(stopped, model=other))
    assert "--expert-intermediate-size 160 is not the 128" in str(raised.value)
    assert "--rope-theta 500000.0 is not the 10000.0" in str(raised.value)


def test_another_optimizer_is_refused_with_what_would_be_lost(stopped):
    with pytest.raises(UserError, match="muon is not the adamw that .*: both moments of every"):
        train(replace(stopped, optimizer="muon"))
    config = replace(stopped, run_dir=stopped.run_dir.with_name("muon"), optimizer="muon")
    train(replace(config, resume=False, stop_after=2))
    with pytest.raises(UserError, match="adamw is not the muon that .*: the momentum of every"):
        train(replace(config, optimizer="adamw"))


def test_another_tokenizer_is_refused_even_if_other_data_is_allowed(stopped, tmp_path):
    path = tmp_path / "other.json"
    train_tokenizer(["zyx zyx zyx " * 50] * 5, vocab_size=261).save(path)
    own = load_tokenizer("builtin", 261)
    if load_tokenizer(str(path)).fingerprint == own.fingerprint:
        path.write_text(path.read_text().replace("<|endoftext|>", "<|end_of_text|>"))
    with pytest.raises(UserError, match="--tokenizer .*is not the one"):
        train(replace(stopped, tokenizer=str(path), allow_data_change=True))


def test_a_run_goes_on_with_the_tokenizer_in_its_folder(config, tmp_path):
    path = tmp_path / "mine.json"
    load_tokenizer(vocab_size=261).save(path)
    config = replace(config, tokenizer=str(path), steps=4)
    train(replace(config, stop_after=2))
    path.unlink()
    moved = config.run_dir.rename(tmp_path / "moved")
    assert train(replace(config, run_dir=moved, resume=True)).step == 4
    assert load_tokenizer(str(moved)).fingerprint == load_tokenizer(vocab_size=261).fingerprint


def test_other_data_is_refused_unless_insisted(stopped, tmp_path, capsys):
    other = write_predictable(tmp_path / "other.jsonl", documents=30)
    changed = replace(stopped, data=(str(other),))
    with pytest.raises(UserError, match=r"--data is not .*other\.jsonl.*--allow-data-change"):
        train(changed)
    resumed = train(replace(changed, allow_data_change=True))
    assert resumed.step == 20
    assert "WARNING: --allow-data-change: the data is read from its start" in (
        capsys.readouterr().out
    )
    # From here on the new data is the run's.
    assert train(replace(changed, steps=22)).step == 22


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "10"),
        ("step", True),
        ("tokens", -1),
        ("seconds", None),
        ("recent_losses", ["low"]),
        ("spikes", [{"step": 3}]),
        ("rng", []),
        ("schedule", {"warmup_steps": 3}),
        ("tokenizer", 7),
        ("int8_fallback", [["down"]]),
    ],
)
def test_a_state_of_the_wrong_kind_is_one_sentence(stopped, name, value):
    """Even with sums that fit: whoever edits a checkpoint by hand makes them anew."""
    (saved,) = checkpoint.find(stopped.run_dir / "checkpoints")
    path, manifest = saved.path / "state.json", saved.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    sums = json.loads(manifest.read_text())
    sums["files"]["state.json"] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(sums))
    with pytest.raises(UserError, match=r"state.json: \w+ (is missing or not|must be)"):
        train(stopped)
