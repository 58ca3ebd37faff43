"""The trainer end to end, on the CPU in fp32."""

import json
import os
import re
import threading
import time
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint import owner, writer
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.options import OPTIONS
from hamner.config.train import TrainConfig
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.files import read_records
from hamner.hardware import GPUS
from hamner.train import evaluation
from hamner.train.log import AsyncCopy
from hamner.train.loop import TrainingLoop, train
from tests.corpus import write_predictable

BYTES_ONLY = 261
"""vocabulary of the special tokens and the 256 bytes: one token a character"""


def small_config(tmp_path: Path) -> TrainConfig:
    """A minute model on predictable text."""
    data = write_predictable(tmp_path / "data.jsonl")
    return TrainConfig(
        model=replace(
            OPTIONS["tiny"].model,
            hidden_size=64,
            num_layers=2,
            expert_intermediate_size=128,
            vocab_size=BYTES_ONLY,
            max_seq_len=64,
        ),
        option="tiny",
        data=(str(data),),
        run_dir=tmp_path / "run",
        steps=20,
        batch_size=8,
        seq_len=64,
        lr=5e-3,
        warmup_steps=5,
        log_every=3,
        eval_every=10,
        save_every=0,
        sample_every=0,
        eval_tokens=1024,
        val_fraction=0.1,
        device="cpu",
    )


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return small_config(tmp_path)


def metrics(run_dir: Path) -> list[dict]:
    """Records without what the clock decides."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["tokens_per_second"], record["seconds"]
    return records


def weights(result) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name in (checkpoint.MODEL_FILE, checkpoint.OPTIMIZER_FILE)
        for key, tensor in load_file(result.checkpoint / name).items()
    }


def assert_equal_weights(first, second) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_learns_one_step_ahead_through_the_real_pipeline(config):
    """ln 2 = 0.69 is all there is to learn one step ahead; shifted twice it would stay at 1.39."""
    result = train(replace(config, steps=120))
    assert 0.6 < result.val_loss < 1.0


def test_run_folder_has_everything(config, with_pictures, monkeypatch):
    flushed = []
    monkeypatch.setattr("hamner.checkpoint.writer.flush", flushed.append)
    config = replace(config, eval_every=8, sample_every=8, save_every=10)
    result = train(config)
    run = config.run_dir
    assert result.step == 20
    assert result.tokens == 20 * 8 * 64
    assert not result.interrupted
    assert TrainConfig.read(run / "config.json") == config
    records = metrics(run)
    assert [r["step"] for r in records] == [3, 6, 8, 9, 12, 15, 16, 18, 20]
    assert [r["val_step"] for r in records] == [None, None, 8, 8, 8, 8, 16, 16, 20]
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["val_loss"] == result.val_loss
    assert set(records[0]) == {
        *("step", "tokens", "loss", "val_loss", "val_step", "lr", "grad_norm"),
        *("mfu", "peak_vram_gib", "skipped_steps", "sources"),
    }
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [8, 8, 8, 16, 16, 16, 20, 20, 20]
    assert {p.name for p in (run / "plots").iterdir()} == {"loss.png", "throughput.png"}
    assert [c.step for c in checkpoint.find(run / "checkpoints")] == [10, 20]
    # What it takes to use a checkpoint wherever it is copied to.
    for name in ("config.json", "tokenizer.json"):
        assert (result.checkpoint / name).read_bytes() == (run / name).read_bytes()
        assert name in (result.checkpoint / "manifest.json").read_text()
    # Before a checkpoint counts.
    assert set(flushed) == {run / "metrics.jsonl", run / "samples.jsonl"}
    assert result.checkpoint == run / "checkpoints" / "step_00000020"


def test_numbers_that_come_in_late_change_no_record(config, monkeypatch):
    """As on a GPU, whose numbers are a step behind; a save waits for the lines up to it."""
    saving = replace(config, log_every=1, save_every=5, run_dir=config.run_dir.with_name("late"))
    train(replace(saving, run_dir=config.run_dir))
    monkeypatch.setattr(AsyncCopy, "is_done", False)
    written, saved = {}, {}
    on_disk = threading.Event()
    on_disk.set()

    def on_phase(phase: str, step: int) -> None:
        if phase == "saved":
            on_disk.set()
        elif phase == "data":  # a save that is slow would delay the next one by a step
            assert on_disk.wait(30)

    trainer = TrainingLoop(saving, on_phase=on_phase)
    begin = trainer.saves.saver.begin

    def begin_save(*args, **kwargs):
        on_disk.clear()
        begin(*args, **kwargs)

    def noting(method, notes: dict):
        def noted(*args, **kwargs):
            notes[trainer.progress.step] = sum(item.line is not None for item in trainer.log.queue)
            return method(*args, **kwargs)

        return noted

    monkeypatch.setattr(trainer.log, "_write_line", noting(trainer.log._write_line, written))
    monkeypatch.setattr(trainer.saves.saver, "begin", noting(begin_save, saved))
    trainer.run_to_end()
    trainer.close()
    assert metrics(saving.run_dir) == metrics(config.run_dir)
    assert set(written) == set(range(1, 21)) - {1, 6, 11, 16}
    assert saved == dict.fromkeys((5, 10, 15, 20), 0)


@pytest.mark.parametrize("stop_at", [10, 7])
def test_resume_is_exact(config, stop_at):
    """20 steps and stop + resume end with equal weights, moments and metrics, bit for bit."""
    whole = train(config)
    halves = replace(config, run_dir=config.run_dir.with_name("halves"))
    stopped = train(replace(halves, stop_after=stop_at))
    assert stopped.step == stop_at
    resumed = train(replace(halves, resume=True))
    assert resumed.step == 20
    assert_equal_weights(whole, resumed)
    assert metrics(config.run_dir) == metrics(halves.run_dir)


def test_resume_forgets_what_came_after_the_checkpoint(config):
    """A run that died after its last save writes the lost steps again, once."""
    whole = train(config)
    run = config.run_dir
    train(replace(config, run_dir=run.with_name("died"), stop_after=10))
    died = RunFolder(run.with_name("died"))
    with died.metrics.open("a") as file:
        file.write(json.dumps({"step": 12, "loss": 1.0}) + '\n{"step": 13, "lo')
    resumed = train(replace(config, run_dir=died.path, resume=True))
    assert_equal_weights(whole, resumed)
    assert metrics(run) == metrics(died.path)


def test_resume_before_the_first_save_starts_over(config):
    whole = train(config)
    empty = replace(config, run_dir=config.run_dir.with_name("empty"))
    RunFolder(empty.folder).start(empty, load_tokenizer(vocab_size=empty.model.vocab_size))
    assert_equal_weights(whole, train(replace(empty, resume=True)))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_do_not_change_the_step(config, micro_batch_size, tmp_path):
    """8 x 1, 4 x 2 and 2 x 4 give what 1 x 8 gives, with targets ignored unevenly."""
    results = []
    for size in (8, micro_batch_size):
        run_dir = tmp_path / f"micro_{size}"
        trainer = TrainingLoop(
            replace(config, micro_batch_size=size, run_dir=run_dir, grad_clip=0.0)
        )
        try:
            batch = next(trainer.data.loader)
            targets = batch.targets.clone()
            targets[0, :50] = -100
            targets[5, :] = -100
            batch = replace(batch, targets=targets)
            result = trainer.step.step(batch, 1e-3)
            moments = dict(trainer.step.optimizer.exp_avg)
            results.append((result.loss, result.grad_norm, moments))
        finally:
            trainer.close()
    (loss, norm, moments), (other_loss, other_norm, other_moments) = results
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm, other_norm, rtol=1e-5, atol=0)
    for name, moment in moments.items():
        torch.testing.assert_close(moment, other_moments[name], rtol=1e-4, atol=1e-8, msg=name)


def test_interrupted_slow_step_is_dropped_and_comes_again(config, monkeypatch):
    import hamner.train.loop

    monkeypatch.setattr(hamner.train.loop, "PATIENCE_SECONDS", 0.0)
    whole = train(config)
    settings = replace(config, run_dir=config.run_dir.with_name("dropped"), micro_batch_size=4)
    trainer = TrainingLoop(replace(settings, stop_after=5))
    trainer.run_to_end()
    batch = next(trainer.data.loader)
    before = {n: p.clone() for n, p in trainer.step.optimizer.parameters.items()}
    assert trainer.step.step(batch, 1e-3, should_abort=lambda done, total: True) is None
    for name, parameter in trainer.step.optimizer.parameters.items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    trainer.close()
    resumed = train(replace(settings, resume=True))
    assert resumed.step == whole.step
    # Not bit for bit: the whole run was not cut into micro-batches.
    assert abs(resumed.val_loss - whole.val_loss) < 1e-3


def test_only_a_step_that_takes_long_to_end_is_dropped(config):
    """With six seconds gone, of ten that an interrupt waits."""
    trainer = TrainingLoop(config)
    for requested in (False, True):
        trainer.interrupt.requested = requested
        done = ((1, 2), (1, 3), (2, 4), (3, 3))
        answers = [trainer._should_abort(time.perf_counter() - 6.0, *parts) for parts in done]
        assert answers == [False, requested, False, False]
    trainer.close()


def test_batch_size_may_change_on_resume(config, capsys):
    train(replace(config, stop_after=10))
    resumed = train(
        replace(config, resume=True, batch_size=4, steps=None, tokens=20 * 8 * 64, warmup_steps=10)
    )
    assert resumed.tokens == 20 * 8 * 64
    assert resumed.step == 30
    first, second = re.findall(
        r"; 10.24K tokens in (.* of .*)$", capsys.readouterr().out, re.MULTILINE
    )
    assert first == "20 steps of 8 x 64"
    assert second == "30 steps, the 20 to come of 4 x 64"
    rates = [r["lr"] for r in metrics(config.run_dir)]
    assert rates[-1] < rates[len(rates) // 2]
    # A length that is behind the run: what was trained is said, and that nothing is.
    assert train(replace(config, resume=True, steps=5)).step == 30
    printed = capsys.readouterr().out
    assert "; 10.24K tokens in 30 steps, the 0 to come of 8 x 64\n" in printed
    assert "nothing is trained; more --steps make it longer\n" in printed


def test_a_folder_has_one_run_at_a_time(config, monkeypatch):
    """While a run lives, each other start in its folder is refused and changes nothing."""
    monkeypatch.setattr(owner, "WAIT_SECONDS", 0.0)
    refused = []

    def on_phase(phase, step):
        if (phase, step) == ("step done", 10):
            before = (config.run_dir / "config.json").read_text()
            for again in (config, replace(config, resume=True, lr=1e-4)):
                with pytest.raises(UserError, match=f"in use by process {os.getpid()} on") as error:
                    train(again)
                refused.append(error)
            assert (config.run_dir / "config.json").read_text() == before

    train(replace(config, stop_after=12), on_phase=on_phase)
    assert len(refused) == 2
    assert train(replace(config, resume=True)).step == 20
    with pytest.raises(UserError, match="already holds a run"):
        train(config)


def test_a_start_that_fails_leaves_the_folder_to_the_next(config, monkeypatch):
    train(replace(config, stop_after=1))
    with pytest.raises(UserError) as error:
        train(replace(config, resume=True, seed=1))
    assert "--seed" in str(error.value)
    assert train(replace(config, resume=True)).step == 20


def test_a_run_is_not_overwritten(config):
    train(replace(config, stop_after=1))
    with pytest.raises(UserError, match=r"--resume, or start another with --run-dir"):
        train(config)


def test_nothing_to_resume(config):
    with pytest.raises(UserError, match="holds no run"):
        train(replace(config, resume=True))
    assert not config.run_dir.exists()


def test_another_model_is_refused_on_resume(config):
    train(replace(config, stop_after=1))
    wider = replace(config.model, expert_intermediate_size=160)
    with pytest.raises(UserError, match=r"--expert-intermediate-size 160 is not the 128"):
        train(replace(config, model=wider, resume=True))


def test_a_checkpoint_older_than_a_field_of_the_model_resumes(config, monkeypatch):
    train(replace(config, stop_after=1))
    state = checkpoint.Checkpoint.state

    def older_state(self) -> dict:
        values = state(self)
        for name in ("rope_scaling", "rope_scaling_from", "qk_norm"):
            del values["model"][name]
        for name in ("best_loss", "best_step", "evaluations_since_best", "stage"):
            del values[name]
        return values

    monkeypatch.setattr(checkpoint.Checkpoint, "state", older_state)
    assert train(replace(config, resume=True, stop_after=1)).step == 2
    stretched = replace(config.model, rope_scaling="linear", rope_scaling_from=16)
    with pytest.raises(UserError, match="--rope-scaling linear is not the none"):
        train(replace(config, model=stretched, resume=True))
    with pytest.raises(UserError, match="--qk-norm True is not the False"):
        train(replace(config, model=replace(config.model, qk_norm=True), resume=True))


def test_bad_data_leaves_no_run_folder(config):
    with pytest.raises(UserError, match=r"missing\.jsonl"):
        train(replace(config, data=(str(config.run_dir.parent / "missing.jsonl"),)))
    assert not config.run_dir.exists()


@pytest.mark.parametrize("val_fraction", [0.0, 0.1])
def test_data_without_a_document_leaves_no_run_folder(config, tmp_path, val_fraction):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(UserError, match=r"empty\.txt: no document to train on"):
        train(replace(config, data=(str(empty),), val_fraction=val_fraction))
    assert not config.run_dir.exists()


def test_missing_tracker_leaves_no_run_folder(config):
    with pytest.raises(UserError, match=r"--report-to wandb: .* pip install -e '\.\[wandb\]'"):
        train(replace(config, report_to=("wandb",)))
    assert not config.run_dir.exists()


def test_a_finished_run_resumes_to_nothing(config):
    finished = train(config)
    again = train(replace(config, resume=True))
    assert again == finished


def test_failed_periodic_save_does_not_end_the_run(config, monkeypatch, capsys):
    real_save, failures = checkpoint.save, []

    def fail_once(*args, **kwargs):
        if not failures:
            failures.append(args)
            raise OSError(28, "No space left on device")
        return real_save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", fail_once)
    result = train(replace(config, save_every=5))
    assert failures
    assert result.step == 20
    assert "step 5 could not be saved (No space left on device)" in capsys.readouterr().out


def test_the_best_before_stays_where_a_best_step_could_not_be_saved(config, monkeypatch, capsys):
    real_save, losses = checkpoint.save, iter([3.0, 2.0, 2.5, 2.6])

    def save(folder, step, **parts):
        if step == 2:
            raise OSError(28, "No space left on device")
        return real_save(folder, step, **parts)

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(evaluation, "validation_loss", lambda *_: next(losses))
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.0)
    train(replace(config, steps=4, eval_every=1, patience=5, keep=1))
    assert [c.step for c in checkpoint.find(config.run_dir / "checkpoints")] == [1, 4]
    assert checkpoint.best(config.run_dir / "checkpoints").step == 1
    assert "(best 2.0000 at step 2, which could not be saved)" in capsys.readouterr().out


def test_a_best_step_is_saved_once_however_slow_the_disk(config, monkeypatch):
    """After the save before it, and also where a save is due: one more would push an older
    checkpoint out."""
    real_save, saved = checkpoint.save, []
    may_write = {5: threading.Event(), 10: threading.Event()}

    def slow_save(folder, step, **parts):
        assert step not in may_write or may_write[step].wait(30)
        return real_save(folder, step, **parts)

    def on_phase(phase: str, step: int) -> None:
        if phase == "saved":
            saved.append(step)
        elif (phase, step) == ("evaluation", 10):
            may_write[5].set()
        elif (phase, step) == ("step done", 12):
            may_write[10].set()
            futures.wait([trainer.saves.saver._future], 30)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    config = replace(config, eval_every=5, save_every=10, patience=5, keep=1, keep_every=10)
    trainer = TrainingLoop(config, on_phase=on_phase)
    trainer.run_to_end()
    trainer.close()
    assert saved == [5, 10, 15, 20]
    assert [c.step for c in checkpoint.find(config.run_dir / "checkpoints")] == [10, 20]


def test_a_best_step_that_was_skipped_is_saved(config):
    """Its weights are those of the step before, whose loss is the best so far."""

    def on_phase(phase: str, step: int) -> None:
        if (phase, step) == ("evaluation", 2):
            trainer.log.health.bad_in_a_row = 1

    trainer = TrainingLoop(
        replace(config, steps=3, eval_every=2, save_every=0, patience=5), on_phase=on_phase
    )
    trainer.run_to_end()
    trainer.close()
    assert [c.step for c in checkpoint.find(config.run_dir / "checkpoints")] == [2, 3]


def test_samples_come_before_the_save_of_their_step(config, monkeypatch):
    """A run that resumes from it takes none of that step."""
    trainer = TrainingLoop(replace(config, steps=4, sample_every=2, save_every=2))
    order, save = [], trainer.saves.save

    def note_and_save() -> None:
        order.append("save")
        save()

    monkeypatch.setattr(trainer.inspector, "sample", lambda: order.append("samples"))
    monkeypatch.setattr(trainer.saves, "save", note_and_save)
    trainer.run_to_end()
    trainer.close()
    assert order == ["samples", "save"] * 2


def test_failed_last_save_is_one_sentence(config, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full_disk)
    with pytest.raises(UserError, match="could not be written"):
        train(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1},
        {"use_differential_attention": True},
        {"qk_norm": True},
        {"tie_word_embeddings": False},
    ],
)
def test_every_kind_of_model_trains(config, changes):
    result = train(replace(config, model=replace(config.model, **changes), document_mask=True))
    records = metrics(config.run_dir)
    assert result.val_loss < 4.0 < records[0]["loss"]
    assert ("router" in records[0]) == ("num_experts" in changes)


def test_recompute_policies_train_the_same(config):
    results = [
        train(replace(config, recompute=policy, run_dir=config.run_dir / policy))
        for policy in ("none", "full:1")
    ]
    assert_equal_weights(*results)


def out_of_memory_at(trainer: TrainingLoop, step: int, times: int = 1) -> None:
    """Let the forward pass of a step (counted from 0) fail as the allocator does."""
    forward = trainer.step.model.forward
    left = [times]

    def fail(*args):
        if trainer.progress.step == step and left[0] and torch.is_grad_enabled():
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 36.00 MiB. GPU 0")
        return forward(*args)

    trainer.step.model.forward = fail


def test_the_clock_shows_training_and_nothing_else(config, monkeypatch):
    """By a clock on which a step takes a second, an evaluation or a sample a thousand."""
    now = [50.0]
    monkeypatch.setattr("hamner.train.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes_long(result):
        def call(*_, **__):
            now[0] += 1000.0
            return result

        return call

    monkeypatch.setattr("hamner.train.evaluation.validation_loss", takes_long(3.0))
    monkeypatch.setattr("hamner.train.evaluation.generate", takes_long("text"))

    def on_phase(phase: str, step: int) -> None:
        now[0] += phase == "optimizer"

    config = replace(config, sample_every=6)
    train(replace(config, stop_after=13), on_phase=on_phase)
    now[0] += 10_000.0
    train(replace(config, resume=True), on_phase=on_phase)
    records = list(read_records(config.run_dir / "metrics.jsonl"))
    assert [record["seconds"] for record in records] == [record["step"] for record in records]
    assert {record["tokens_per_second"] for record in records} == {8 * 64 * 1.0}


def test_gradients_of_a_step_that_begins_again_count_once(config):
    """The second of two micro-batches has no memory: nothing is left of the first."""
    trainer = TrainingLoop(replace(config, micro_batch_size=4, log_every=1, stop_after=3))
    forward, calls = trainer.step.model.forward, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 36.00 MiB. GPU 0")
        return forward(*args)

    trainer.step.model.forward = fail
    trainer.run_to_end()
    trainer.close()
    assert trainer.step.messages == [] and not trainer.step.may_step_down
    whole = replace(config, log_every=1, stop_after=3, run_dir=config.run_dir.with_name("whole"))
    train(whole)
    norms, expected = ([r["grad_norm"] for r in metrics(c.run_dir)] for c in (config, whole))
    assert norms == pytest.approx(expected, rel=1e-4)


def test_out_of_memory_at_first_changes_the_plan(config, capsys):
    trainer = TrainingLoop(replace(config, micro_batch_size=8))
    before = trainer.step.plan.account.total
    out_of_memory_at(trainer, 1)
    result = trainer.run_to_end()
    trainer.close()
    assert result.step == 20
    assert trainer.step.plan.account.total <= 0.9 * before
    assert trainer.step.model.policies == trainer.step.plan.policies
    said = capsys.readouterr().out
    assert "WARNING: CUDA out of memory. Other programs, or memory in pieces" in said
    assert f"going on with {trainer.step.plan}" in said


@pytest.mark.parametrize(("step", "times"), [(1, 2), (12, 1)])
def test_out_of_memory_later_saves_and_says_what_to_lower(config, step, times):
    trainer = TrainingLoop(replace(config, micro_batch_size=8))
    out_of_memory_at(trainer, step, times)
    with pytest.raises(UserError, match=rf"step {step + 1} does not fit \(CUDA out of memory\)"):
        trainer.run_to_end()
    trainer.close()
    assert [c.step for c in checkpoint.find(config.run_dir / "checkpoints")] == [step]


def test_out_of_memory_in_an_update_is_not_tried_again_nor_saved(config):
    """Some weights are those of the next step then, and a second try would count it twice."""
    trainer = TrainingLoop(config)
    update = trainer.step.optimizer._step_adamw

    def fail(*args):
        update(*args)
        if trainer.progress.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 36.00 MiB. GPU 0")

    trainer.step.optimizer._step_adamw = fail
    with pytest.raises(UserError, match="step 2 does not fit"):
        trainer.run_to_end()
    trainer.close()
    assert checkpoint.find(config.run_dir / "checkpoints") == []


def test_plan_is_compared_with_reality_at_step_100(config, capsys, monkeypatch):
    monkeypatch.setattr("hamner.train.log.PLAN_CHECK_STEP", 10)
    trainer = TrainingLoop(config)
    # What is measured is this CPU; only the plan's line is of interest.
    trainer.step.compute = replace(trainer.step.compute, gpu=GPUS["rtx-3090"], kernels="triton")
    trainer.display.budget_gib = 24.0
    monkeypatch.setattr("hamner.train.log.peak_vram_gib", lambda device: 1.0)
    trainer.run_to_end()
    trainer.close()
    said = [line for line in capsys.readouterr().out.splitlines() if "plan: measured" in line]
    assert len(said) == 1
    assert "below its interval, " in said[0]
    (row,) = (config.run_dir / "plan.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 10
    assert set(json.loads(row)) == {"step", "projected", "measured"}
    projected = json.loads(row)["projected"]
    low, high = projected["tokens_per_second_interval"]
    assert low < projected["tokens_per_second"] < high
