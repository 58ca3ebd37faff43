"""The tests find and load the model of a run."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.sft import SftConfig
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.model.kv_cache import KVCache
from tests.models import DENSE, build
from tests.saved import save_run

SHAPE = replace(DENSE, vocab_size=300)


def test_the_newest_checkpoint_of_a_run(tmp_path):
    for step in (3, 12, 9):
        run = save_run(tmp_path / "mine", build(SHAPE, seed=step), step=step)
    saved = find_saved_model(run)
    assert (saved.checkpoint.step, saved.name, saved.is_chat) == (12, "mine", False)
    assert saved.config.model == SHAPE
    assert saved.tokenizer.vocab_size == 300
    model = saved.build(torch.device("cpu"))
    expected = build(SHAPE, seed=12)
    inputs = torch.arange(20)[None]
    assert torch.equal(model(inputs).logits, expected(inputs).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_one_of_its_checkpoints(tmp_path):
    for step in (3, 12):
        run = save_run(tmp_path / "mine", build(SHAPE), step=step, chat=True)
    saved = find_saved_model(run / "checkpoints" / "step_00000003")
    assert (saved.checkpoint.step, saved.name, saved.is_chat) == (3, "mine", True)


def test_the_run_that_saved_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("b", "c", "a")):
        run = save_run(tmp_path / "runs" / name, build(SHAPE))
        (path,) = (run / "checkpoints").iterdir()
        os.utime(path, (number % 2, number % 2))
    assert find_saved_model(None).name == "c"


def test_bf16_weights_are_computed_with_in_fp32_on_a_cpu(tmp_path):
    run = save_run(tmp_path / "mine", build(SHAPE), dtype=torch.bfloat16)
    saved = find_saved_model(run)
    assert saved.weights()["embed.weight"].dtype == torch.bfloat16
    weight = saved.build(torch.device("cpu")).embed.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, build(SHAPE).embed.weight.bfloat16().float())


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is neither a run's folder nor one of its"):
        find_saved_model(tmp_path / "nowhere")
    run = save_run(tmp_path / "mine", build(SHAPE))
    (found,) = checkpoint.find(run / "checkpoints")
    (found.path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="model.safetensors has 9 bytes.*name an older one of"):
        find_saved_model(run)
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(UserError, match="has not saved a checkpoint yet"):
        find_saved_model(run)


@pytest.fixture
def own_tokenizer(tmp_path):
    """A tokenizer.json of the user's."""
    path = tmp_path / "mine.json"
    load_tokenizer(vocab_size=290).save(path)
    return path


def test_a_run_has_its_tokenizer_with_it(tmp_path, own_tokenizer):
    run = save_run(tmp_path / "mine", build(SHAPE), tokenizer=str(own_tokenizer))
    own_tokenizer.unlink()
    moved = run.rename(tmp_path / "moved")
    saved = find_saved_model(moved)
    assert (saved.tokenizer.vocab_size, saved.name) == (290, "moved")
    load_tokenizer(vocab_size=289).save(moved / "tokenizer.json")
    with pytest.raises(UserError, match=r"another content of the tokenizer .*moved/tokenizer.json"):
        find_saved_model(moved)


def test_a_run_without_a_tokenizer_uses_the_one_it_names(tmp_path, own_tokenizer):
    """As earlier versions left it."""
    run = save_run(tmp_path / "mine", build(SHAPE), tokenizer=str(own_tokenizer))
    (run / "tokenizer.json").unlink()
    assert find_saved_model(run).tokenizer.vocab_size == 290
    load_tokenizer(vocab_size=289).save(own_tokenizer)
    with pytest.raises(UserError, match=r"another content of the tokenizer .*mine.json"):
        find_saved_model(run)


@pytest.mark.parametrize("name", ["step_00000007", "the best one"])
def test_a_checkpoint_copied_elsewhere_is_a_model(name, tmp_path, own_tokenizer, monkeypatch):
    run = save_run(tmp_path / "mine", build(SHAPE), tokenizer=str(own_tokenizer), chat=True)
    copied = (run / "checkpoints" / "step_00000007").rename(tmp_path / name)
    shutil.rmtree(run)
    own_tokenizer.unlink()
    saved = find_saved_model(copied)
    assert (saved.name, saved.checkpoint.step, saved.is_chat) == (name, 7, True)
    assert saved.tokenizer.vocab_size == 290
    assert torch.equal(saved.weights()["embed.weight"], build(SHAPE).embed.weight)
    assert SftConfig.for_checkpoint(copied).run_dir == tmp_path / f"{name}-sft"
    monkeypatch.chdir(copied)
    assert find_saved_model(Path()).name == name


def test_a_checkpoint_is_found_from_inside_its_run(tmp_path, monkeypatch):
    run = save_run(tmp_path / "mine", build(SHAPE))
    monkeypatch.chdir(run / "checkpoints")
    assert find_saved_model(Path("step_00000007")).name == "mine"


def test_the_optimizer_is_not_read(tmp_path):
    """It is the larger part of a checkpoint, and may be left behind when one is copied."""
    run = save_run(tmp_path / "mine", build(SHAPE))
    (found,) = checkpoint.find(run / "checkpoints")
    (found.path / "optimizer.safetensors").unlink()
    assert find_saved_model(run).checkpoint == found


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, {"use_differential_attention": True}, {"qk_norm": True}])
@torch.no_grad()
def test_decoding_on_a_gpu_is_as_exact_as_whole_sequences_are(kind, tmp_path):
    """bf16 with the cache errs at most twice as much from fp32 as bf16 without it."""
    shape = replace(SHAPE, hidden_size=256, **kind)
    run = save_run(tmp_path / "mine", build(shape), dtype=torch.bfloat16)
    saved = find_saved_model(run)
    device = torch.device("cuda")
    model = saved.build(device)
    tokens = torch.randint(300, (1, 50), generator=torch.Generator().manual_seed(1))
    cache = KVCache(shape, 50, device=device, dtype=torch.bfloat16)
    parts = tokens.to(device).split((20, *[1] * 30), dim=1)
    cached = torch.cat([model(part, cache=cache).logits for part in parts], dim=1)
    whole = model(tokens.to(device)).logits[:, 19:]
    exact = saved.build(torch.device("cpu"))(tokens).logits[:, 19:]
    errors = [(logits.float().cpu() - exact).abs().max() for logits in (cached, whole)]
    assert errors[0] <= 2 * errors[1]
