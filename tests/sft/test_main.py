"""`python -m hamner.sft` as a user meets it: a real process."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest

from hamner.config.model import ModelConfig
from hamner.config.sft import SftConfig
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.sft.__main__ import main, parse
from hamner.train.__main__ import parse as parse_training
from hamner.train.messages import TrainResult
from tests import forked
from tests.imports import output_without
from tests.models import DENSE, build
from tests.saved import save_run

SHAPE = replace(DENSE, vocab_size=261)


run = partial(forked.run_module, "hamner.sft")


@pytest.fixture
def base(tmp_path):
    return save_run(tmp_path / "base", build(SHAPE))


def test_help_explains_every_flag_without_loading_torch():
    output = output_without(["torch"], "hamner.sft", "--help")
    flags = set(re.findall(r"^│ (--[a-z-]+)", output, re.MULTILINE))
    assert {"--checkpoint", "--data", "--epochs", "--rope-scaling", "--patience"} <= flags
    # Of the checkpoint, not to be chosen here.
    assert not {"--option", "--hidden-size", "--tokenizer", "--document-mask"} & flags


def test_defaults_follow_from_the_checkpoint(base, monkeypatch):
    config = parse(["--checkpoint", str(base)])
    assert config == SftConfig.for_checkpoint(base)
    assert (config.lr, config.seq_len, config.batch_size) == (1e-5, 64, 8)
    assert config.run_dir == base.with_name("base-sft")
    assert config.model == SHAPE
    step = next((base / "checkpoints").iterdir())
    assert parse(["--checkpoint", str(step)]).run_dir == base.with_name("base-sft")
    monkeypatch.chdir(base)
    assert parse(["--checkpoint", "."]).run_dir == base.with_name("base-sft")


def test_a_flag_without_effect_beside_another_is_refused(base):
    args = ["--checkpoint", str(base), "--keep-every", "5"]
    with pytest.raises(UserError, match="^--keep-every 5 does nothing with --keep 0: leave it out"):
        parse([*args, "--keep", "0"])
    assert parse(args).run.keep_every == 5
    # Patience has a default here, which is nobody's wish.
    parse(["--checkpoint", str(base), "--eval-every", "0"])


def test_a_longer_row_extends_the_model(base):
    def model(*flags: str) -> ModelConfig:
        return parse(["--checkpoint", str(base), *flags]).training().model

    assert model("--seq-len", "32").max_seq_len == 64
    assert model("--seq-len", "256").max_seq_len == 256
    assert model("--seq-len", "256", "--rope-scaling", "yarn").rope_scaling_factor == 4.0


def test_positions_are_stretched_once(base, tmp_path):
    args = ["--checkpoint", str(base), "--seq-len", "128", "--rope-scaling", "linear"]
    stretched = parse([*args, "--run-dir", str(tmp_path / "long")]).training()
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "config.json").write_text(json.dumps(stretched.to_json()))
    again = ["--checkpoint", str(tmp_path / "long")]
    assert parse([*again, "--seq-len", "100"]).training().model == stretched.model
    for flags, named in (
        (["--seq-len", "256"], "--seq-len 256: the model's positions were stretched to 128 before"),
        (["--seq-len", "256", "--rope-scaling", "yarn"], "--rope-scaling yarn: the model's"),
    ):
        with pytest.raises(UserError, match=named):
            parse([*again, *flags])
    assert parse(["--resume", "--run-dir", str(tmp_path / "long")]).training().model == (
        stretched.model
    )


def test_config_json_reads_back_what_was_written(base, tmp_path):
    args = ["--checkpoint", str(base), "--data", "a.jsonl=2", "b.jsonl=1", "--epochs", "2"]
    config = parse([*args, "--seq-len", "128", "--rope-scaling", "linear"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.training().to_json()))
    assert SftConfig.read(path).training() == config.training()
    assert TrainConfig.read(path) == config.training()


@pytest.mark.parametrize(
    "args",
    [
        ["--resume", "--run-dir", "base-sft"],
        ["--run_dir", "other", "--run_dir=base-sft", "--resume"],
        ["--checkpoint=gone", "--resume", "--checkpoint", "base"],
    ],
)
def test_a_resume_changes_no_flag_that_was_not_given(base, monkeypatch, args):
    monkeypatch.chdir(base.parent)
    started = parse(["--checkpoint", "base", "--lr", "3e-5", "--keep=1", "--allow-data-change"])
    run = base.parent / "base-sft"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(started.training().to_json()))
    again = replace(started.run, resume=True, allow_data_change=False)
    assert parse(args) == replace(started, run=again)


def test_each_kind_of_run_is_resumed_by_its_command(base, tmp_path):
    with pytest.raises(UserError, match="is a pre-training run; continue it with .*hamner.train"):
        parse(["--resume", "--run-dir", str(base)])
    training = parse(["--checkpoint", str(base)]).training()
    (tmp_path / "config.json").write_text(json.dumps(training.to_json()))
    with pytest.raises(UserError, match="is a fine-tuning run; continue it with .*hamner.sft"):
        parse_training(["--resume", "--run-dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "--checkpoint is needed"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere is neither"),
        (["--checkpoint", "base", "--epochs", "0"], "--epochs 0"),
        (["--checkpoint", "base", "--bad-rows", "2"], "--bad-rows 2.0"),
        (["--checkpoint", "base", "--rope-scaling", "ntk"], "--rope-scaling ntk"),
        (["--checkpoint", "base", "--rope-scaling", "ntk", "--seq-len", "32"], "above the 64"),
        (["--resume"], "--resume needs --run-dir"),
    ],
)
def test_bad_flags(base, monkeypatch, args, named):
    monkeypatch.chdir(base.parent)
    with pytest.raises(UserError, match=named):
        parse(args)


def test_a_batch_is_replayed_by_training(base):
    with pytest.raises(UserError, match="--replay x: .* python -m hamner.train --replay x"):
        parse(["--checkpoint", str(base), "--replay", "x"])


def test_a_run_that_stops_itself_does_not_end_with_code_0(base, monkeypatch):
    stopped = TrainResult(7, 0, None, None, interrupted=False, diagnosis="no finite loss")
    monkeypatch.setattr("hamner.sft.fine_tuning.fine_tune", lambda config: stopped)
    monkeypatch.chdir(base.parent)
    assert main(["--checkpoint", "base"]) == 3


def test_bad_data_is_one_sentence_and_exit_2(base, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi"}\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run("--checkpoint", "base", "--data", "bad.jsonl", "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "error: --data bad.jsonl: 1 of 1 rows cannot be used (1 has no field "
        '"messages", "conversations" or "text", and no pair such as "prompt" and "completion" '
        "(it has prompt): bad.jsonl:1); mend them, or let hamner.sft leave out more with "
        "--bad-rows SHARE (now 0.1)\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == before
