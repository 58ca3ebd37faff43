"""Fine-tuning end to end, on the CPU in fp32, from a minute pre-trained model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.format import MODEL_FILE
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.options import total_tokens
from hamner.config.sft import SftConfig
from hamner.config.train import ComputeConfig, RunConfig, TrainConfig
from hamner.data.conversations.examples import load_examples
from hamner.data.conversations.loader import validation_batch
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.sft.fine_tuning import fine_tune, scheduled
from tests.models import DENSE, build
from tests.saved import save_run

BYTES_ONLY = 261
SHAPE = replace(DENSE, vocab_size=BYTES_ONLY)


@pytest.fixture
def base(tmp_path) -> Path:
    return save_run(tmp_path / "base", build(SHAPE))


@pytest.fixture
def data(tmp_path) -> str:
    """An echo: the answer repeats the question's letter, all over again in many conversations."""
    path = tmp_path / "echo.jsonl"
    with path.open("w") as file:
        for number in range(120):
            letter = "abcdefgh"[number % 8]
            turns = [("user", letter * (1 + number // 8)), ("assistant", f"{letter}{letter}")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


@pytest.fixture
def config(base, data) -> SftConfig:
    return replace(
        SftConfig.for_checkpoint(base),
        data=(data,),
        steps=16,
        batch_size=4,
        lr=3e-3,
        min_lr=3e-4,
        eval_every=4,
        patience=10,
        val_fraction=0.2,
        compute=ComputeConfig(device="cpu"),
        run=RunConfig(log_every=4),
    )


def with_run(config: SftConfig, **changes) -> SftConfig:
    return replace(config, run=replace(config.run, **changes))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def model_weights(saved: Path) -> dict[str, torch.Tensor]:
    return load_file(saved / MODEL_FILE)


def test_starts_from_the_checkpoint_and_learns_the_answers(config, base):
    """Of three learned tokens only the first depends on the question: one of eight letters.

    So a model that knows the form of the answers alone has a loss of ln 8 / 3 = 0.69, one that
    knows nothing ln 261 = 5.6.
    """
    result = fine_tune(replace(config, steps=120, lr=1e-2))
    assert config.run_dir == base.with_name("base-sft")
    assert result.val_loss < 0.65
    unmoved = fine_tune(replace(config, run_dir=base.with_name("unmoved"), lr=1e-12, min_lr=0.0))
    before, after = model_weights(find_saved_model(base).checkpoint.path), unmoved.checkpoint
    for name, weight in model_weights(after).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-8)


def test_starts_from_a_run_whose_tokenizer_was_elsewhere(data, tmp_path):
    path = tmp_path / "mine.json"
    load_tokenizer(vocab_size=BYTES_ONLY).save(path)
    base = save_run(tmp_path / "base", build(SHAPE), tokenizer=str(path))
    path.unlink()
    config = replace(SftConfig.for_checkpoint(base), data=(data,), steps=2, eval_every=0)
    config = with_run(replace(config, compute=ComputeConfig(device="cpu")), stop_after=1)
    assert fine_tune(config).step == 1
    shutil.rmtree(base)
    assert fine_tune(with_run(config, resume=True)).step == 2


def test_validation_loss_is_of_the_learned_tokens_alone(config):
    """Computed by hand from logits: mean over answers and end markers of the held-out part."""
    result = fine_tune(config)
    tokenizer = load_tokenizer(vocab_size=BYTES_ONLY)
    (source,) = load_examples(config.training(), tokenizer)
    model = find_saved_model(result.checkpoint).build(torch.device("cpu"))
    total, count = 0.0, 0
    for example in source.validation:
        ids = torch.from_numpy(example.ids).long()
        logits = model(ids[None, :-1]).logits[0].log_softmax(-1)
        for position, learned in enumerate(example.learned[1:]):
            if learned:
                total -= logits[position, ids[position + 1]].item()
                count += 1
    batch = validation_batch([source], tokenizer, config.seq_len, config.run.eval_tokens)
    assert count == int((batch.targets != -100).sum()) == 3 * len(source.validation)
    assert result.val_loss == pytest.approx(total / count, rel=1e-4)


def test_resume_is_exact(config):
    whole = fine_tune(config)
    halves = replace(config, run_dir=config.run_dir.with_name("halves"))
    stopped = fine_tune(with_run(halves, stop_after=7))
    assert stopped.step == 7
    resumed = fine_tune(with_run(halves, resume=True))
    one, other = model_weights(whole.checkpoint), model_weights(resumed.checkpoint)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert checkpoint.best(whole.checkpoint.parent).step == (
        checkpoint.best(resumed.checkpoint.parent).step
    )


def test_the_run_keeps_the_system_prompt_of_its_data(config, tmp_path):
    path = tmp_path / "al.jsonl"
    row = {"system": "You are Al.", "prompt": "Hi", "completion": "Yo"}
    path.write_text(f"{json.dumps(row)}\n" * 20)
    data = replace(config, data=(str(path),), steps=2, val_fraction=0.0)
    fine_tune(with_run(data, stop_after=1))
    assert fine_tune(with_run(data, resume=True)).step == 2
    assert find_saved_model(config.run_dir).config.sft.system == "You are Al."


def test_resume_does_not_need_the_base(config, base):
    fine_tune(with_run(config, stop_after=2))
    base.rename(base.with_name("elsewhere"))
    assert fine_tune(with_run(config, resume=True)).step == 16


def test_stops_early_and_keeps_the_best(config):
    """A learning rate that soon ruins the model: the loss rises, the run stops, the best stays."""
    ruinous = replace(
        with_run(config, grad_clip=0, keep=1),
        steps=400,
        lr=0.3,
        min_lr=0.3,
        eval_every=1,
        patience=3,
        warmup_steps=40,
    )
    result = fine_tune(ruinous)
    losses = {r["step"]: r["val_loss"] for r in records(config.run_dir)}
    best_step = min(losses, key=losses.get)
    assert result.step == best_step + 3 < 400
    assert checkpoint.best(config.run_dir / "checkpoints").step == best_step
    assert find_saved_model(config.run_dir).checkpoint.step == best_step
    assert [c.step for c in checkpoint.find(config.run_dir / "checkpoints")] == [
        best_step,
        result.step,
    ]
    again = fine_tune(with_run(ruinous, resume=True))
    assert again == result


def test_a_fine_tuned_run_is_a_run_and_a_chat_model(config, base):
    fine_tune(replace(config, steps=2))
    saved = find_saved_model(config.run_dir)
    assert saved.is_chat
    assert not find_saved_model(base).is_chat
    assert type(saved.config) is TrainConfig
    assert saved.config.document_mask
    assert SftConfig.read(config.run_dir / "config.json").sft.checkpoint == base


@pytest.mark.parametrize("kind", ["none", "yarn"])
def test_a_longer_context(config, kind):
    """Pre-trained at 64, fine-tuned at 128: the model of the run is made for 128."""
    longer = replace(config, seq_len=128, sft=replace(config.sft, rope_scaling=kind), steps=2)
    result = fine_tune(longer)
    shape = find_saved_model(result.checkpoint).config.model
    assert shape.max_seq_len == 128
    assert (shape.rope_scaling, shape.rope_scaling_from) == (kind, 0 if kind == "none" else 64)
    assert fine_tune(with_run(replace(longer, steps=3), resume=True)).step == 3


def test_length_follows_from_the_epochs(config):
    config = replace(config, steps=None, warmup_steps=20, eval_every=100).training()
    planned = scheduled(config, epochs=2.5, rows_per_epoch=50)
    assert total_tokens(planned) == 32 * 4 * 64  # ceil(2.5 x 50 rows / 4 a step)
    assert planned.warmup_steps == 3
    assert planned.eval_every == 13
    fixed = scheduled(replace(config, steps=7), epochs=2.5, rows_per_epoch=50)
    assert total_tokens(fixed) == 7 * 4 * 64


@pytest.mark.parametrize(("lr", "is_little"), [(1e-5, True), (1e-4, True), (1e-3, False)])
def test_a_run_that_is_short_for_its_learning_rate_is_told_so(lr, is_little, config, capsys):
    fine_tune(replace(config, lr=lr, min_lr=lr / 10))
    said = f"16 steps with a peak --lr of {lr:g} will teach little: of 350 KB"
    assert (said in capsys.readouterr().out) == is_little
    longer = replace(config, lr=lr, min_lr=lr / 10, steps=20)
    fine_tune(with_run(longer, resume=True))
    assert "will teach little" not in capsys.readouterr().out


def test_bad_data_leaves_no_run_folder(config, tmp_path):
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    for data, named in ((str(silent), "no conversation to train on"), ("no.jsonl", "no such file")):
        with pytest.raises(UserError, match=named):
            fine_tune(replace(config, data=(data,)))
    assert not config.run_dir.exists()
