"""A new run starts from another run's weights, or is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.model import ModelConfig
from hamner.config.train import TrainConfig
from hamner.data.chat_tokens import missing_chat_tokens
from hamner.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from hamner.errors import UserError
from hamner.train.__main__ import parse
from hamner.train.initial import (
    find_initial,
    warn_of_missing_chat_tokens,
    with_chat_tokens,
)
from hamner.train.loop import TrainingLoop, train
from tests.corpus import write_predictable
from tests.models import DENSE, build
from tests.saved import save_run
from tests.tokenizers import foreign

SHAPE = replace(DENSE, vocab_size=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("source") / "run", build(SHAPE, seed=5), chat=True)


@pytest.fixture
def config(source, tmp_path) -> TrainConfig:
    """The new run is configured as the command line does."""
    write_predictable(tmp_path / "text.txt")
    args = ["--init-from", str(source), "--run-dir", str(tmp_path / "new"), "--device", "cpu"]
    args += ["--data", str(tmp_path / "text.txt"), "--steps", "2", "--warmup-steps", "0"]
    return parse([*args, "--eval-every", "0", "--sample-every", "0", "--lr", "1e-3"])


def test_a_new_run_has_the_weights_and_nothing_else_of_the_old_one(config, source, capsys):
    weights = load_file(find_saved_model(source).checkpoint.path / "model.safetensors")
    loop = TrainingLoop(config)
    assert (loop.progress.step, loop.progress.tokens, loop.step.optimizer.steps) == (0, 0, 0)
    assert not any(moment.any() for moment in loop.step.optimizer.exp_avg.values())
    for name, weight in loop.step.model.state_dict().items():
        assert torch.equal(weight, weights[name])
    loop.close()


def test_the_new_run_goes_on_without_the_old_one(config, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(config.init_from, moved)
    args = replace(config, init_from=moved)
    result = train(replace(args, stop_after=1))
    assert f"starting from the weights of {moved}" in capsys.readouterr().out
    shutil.rmtree(moved)
    saved = find_saved_model(config.run_dir)
    assert (saved.checkpoint.step, saved.is_chat, saved.config.init_from) == (1, False, moved)
    resumed = parse(["--resume", "--run-dir", str(config.run_dir)])
    assert (result.step, train(resumed).step) == (1, 2)
    with pytest.raises(UserError, match="--init-from elsewhere starts a new run"):
        parse(["--resume", "--run-dir", str(config.run_dir), "--init-from", "elsewhere"])


def test_defaults_are_the_model_of_the_weights(source):
    config = parse(["--init-from", str(source)])
    assert (config.model, config.option, config.seq_len) == (SHAPE, "tiny", 64)
    checkpoint = find_saved_model(source).checkpoint.path
    assert parse([f"--init-from={checkpoint}", "--lr", "5e-4"]).model == SHAPE
    # The weights have no qk-norm, whatever the recipe would have given new ones.
    for option in ((), ("--option", "a")):
        assert not parse(["--init-from", str(source), "--recipe", "muon", *option]).model.qk_norm
    with pytest.raises(UserError, match="--init-from nowhere is neither a run"):
        parse(["--init-from", "nowhere"])
    file = source.with_name("old.pt")
    file.write_bytes(b"PK")
    with pytest.raises(UserError, match="hamner.checkpoint import makes a run of a .pt file"):
        parse(["--init-from", str(file)])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--hidden-size", "128"], "--hidden-size 128 is not its 64"),
        (["--option", "a"], "--num-layers 24 is not its 2"),
        (["--rope-theta", "5e5", "--num-kv-heads", "4"], "--rope-theta 500000.0 is not its 10000"),
        (["--vocab-size", "320"], "--vocab-size 320 is not its 300"),
    ],
)
def test_another_shape_is_refused_by_name(args, named, source, tmp_path):
    config = parse(["--init-from", str(source), "--run-dir", str(tmp_path / "new"), *args])
    with pytest.raises(UserError, match=f"--init-from {source}: .*{named}"):
        train(config)
    assert not (tmp_path / "new").exists()


def test_sequences_may_be_longer_than_those_of_the_weights(source):
    args = ["--init-from", str(source), "--max-seq-len", "128", "--seq-len", "128"]
    assert find_initial(parse(args)).config.model.max_seq_len == 64


def test_another_tokenizer_is_refused_by_name(source, tmp_path):
    same = tmp_path / "same.json"
    load_tokenizer(vocab_size=300).save(same)
    args = ["--init-from", str(source), "--tokenizer"]
    assert find_initial(parse([*args, str(same)]))
    other = foreign(tmp_path, 4)
    with pytest.raises(UserError, match=rf"--tokenizer {other} \(fingerprint \w+\) is not its"):
        find_initial(parse([*args, str(other)]))
    # It has more entries than the model, and is no less another one for that.
    larger = json.loads(other.read_text())
    larger["model"]["vocab"] |= {"Ġzebras": 300, "Ġzebra": 301}
    other.write_text(json.dumps(larger))
    with pytest.raises(UserError, match=rf"--tokenizer {other} \(fingerprint \w+\) is not its"):
        find_initial(parse([*args, str(other)]))


def of(path: Path, vocab_size: int = 300, **changes) -> tuple:
    model = ModelConfig(vocab_size=vocab_size)
    config = TrainConfig(model, tokenizer=str(path), **changes)
    return load_tokenizer(config.tokenizer, vocab_size), config


def test_a_run_that_cannot_be_fine_tuned_later_is_warned_of(tmp_path):
    (warning,) = warn_of_missing_chat_tokens(*of(foreign(tmp_path, 4)))
    assert "has no tokens <|system|> <|user|> <|assistant|> <|end|>" in warning
    assert "start with --reserve-chat-tokens" in warning
    (warning,) = warn_of_missing_chat_tokens(*of(foreign(tmp_path, 3)))
    assert "start with --vocab-size 304 or above, and --reserve-chat-tokens" in warning
    ours = load_tokenizer(vocab_size=300), TrainConfig(ModelConfig(vocab_size=300))
    assert warn_of_missing_chat_tokens(*ours) == []


@pytest.mark.parametrize(
    ("reserved", "vocab_size", "ids"), [(4, 300, {1, 2, 3, 4}), (3, 304, {300, 301, 302, 303})]
)
def test_unused_ids_are_reserved_for_conversations(reserved, vocab_size, ids, tmp_path):
    tokenizer, config = of(foreign(tmp_path, reserved), vocab_size, reserve_chat_tokens=True)
    given = with_chat_tokens(tokenizer, config)
    assert {given.special_id(name) for name in SPECIAL_TOKENS[1:]} == ids
    assert warn_of_missing_chat_tokens(given, config) == missing_chat_tokens(given) == []
    text = "Plain text, and <|user|> is spelled out: naïve 你好."
    assert given.encode(text) == tokenizer.encode(text)
    assert given.decode(given.encode(text)) == text
    # What a resumed run finds in its folder.
    given.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert with_chat_tokens(again, config).fingerprint == given.fingerprint


def test_reserving_without_room_or_use_is_refused(tmp_path):
    tokenizer, config = of(foreign(tmp_path, 3), reserve_chat_tokens=True)
    with pytest.raises(UserError, match="has no unused ids; .* --vocab-size 304 or above"):
        with_chat_tokens(tokenizer, config)
    with pytest.raises(UserError, match="learned the tags of conversations as ordinary text"):
        with_chat_tokens(tokenizer.with_text_tags(), config)


def test_a_run_keeps_its_reserved_tokens(config, source, tmp_path, capsys):
    tokenizer = foreign(tmp_path, 4)
    args = ["--option", "tiny", "--hidden-size", "64", "--num-layers", "1", "--vocab-size", "300"]
    args += ["--expert-intermediate-size", "64", "--seq-len", "64", "--batch-size", "2"]
    args += ["--tokenizer", str(tokenizer), "--reserve-chat-tokens", "--run-dir"]
    given = parse([*args, str(tmp_path / "reserved")])
    changes = {name: getattr(given, name) for name in ("model", "tokenizer", "reserve_chat_tokens")}
    train(replace(config, init_from=None, steps=1, **changes))
    saved = find_saved_model(config.run_dir)
    assert {saved.tokenizer.special_id(name) for name in SPECIAL_TOKENS[1:]} == {1, 2, 3, 4}
    assert "WARNING" not in capsys.readouterr().out
