"""config.json: what is written reads back, and what does not fit is named."""

import json
from dataclasses import replace

import pytest

from hamner.checkpoint.saved_model import find_saved_model
from hamner.config.options import OPTIONS, find_option, for_option, total_tokens
from hamner.config.sft import SftConfig
from hamner.config.train import FineTuning, TrainConfig, no_run
from hamner.errors import UserError
from hamner.train.flags import Origin


@pytest.mark.parametrize("sft", [None, FineTuning(epochs=2.0)])
def test_what_is_written_reads_back(tmp_path, sft):
    config = replace(for_option("c"), run_dir=tmp_path, sft=sft)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_json()))
    assert TrainConfig.read(path) == config
    assert ("sft" in config.to_json()) == (sft is not None)


def test_a_config_from_before_there_was_a_flag_has_its_default(tmp_path):
    values = for_option("tiny").to_json()
    del values["hang_minutes"], values["model"]["router_balance"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = TrainConfig.read(tmp_path / "config.json")
    assert (read.hang_minutes, read.model.router_balance) == (30.0, "aux")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"surprise": 1}, "a field this version does not know: surprise"),
        ({"batch_size": "8"}, "field batch_size has an unfit value '8'"),
        ({"model": None}, "is not a run's configuration"),
        ({"sft": {"epochs": "many"}}, "field epochs has an unfit value 'many'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, named):
    (tmp_path / "config.json").write_text(json.dumps(for_option("a").to_json() | changes))
    with pytest.raises(UserError, match=named):
        TrainConfig.read(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hang_minutes": 1e-30}, "--hang-minutes 1e-30 must be between 0.001 and 1,000,000, or 0"),
        ({"hang_minutes": 1e9}, r"--hang-minutes 1000000000.0 must be between"),
        ({"batch_size": 10**9}, "--batch-size 1000000000 with --seq-len 256 makes 256,000,000,000"),
        ({"lr": 0.0}, "--lr 0.0 must be above 0"),
        ({"lr": float("inf")}, "--lr inf must be a finite number"),
        ({"lr": 1e-5}, "--min-lr 8e-05 is above --lr 1e-05"),
        ({"grad_clip": -1.0}, "--grad-clip -1.0 must not be negative"),
        ({"beta2": 1.0}, "--beta2 1.0 must be below 1"),
        ({"decay_fraction": 1.5}, "--decay-fraction 1.5 must be at most 1"),
    ],
)
def test_what_no_run_can_do_is_refused(changes, named):
    with pytest.raises(UserError, match=named):
        replace(for_option("tiny"), **changes)
    assert replace(for_option("tiny"), hang_minutes=0.0).hang_minutes == 0


def test_a_row_of_conversations_is_no_longer_than_a_batch():
    with pytest.raises(UserError, match="--batch-size 8 with --seq-len 1000000000 makes"):
        SftConfig(model=OPTIONS["tiny"].model, seq_len=10**9)


def test_a_run_is_as_long_as_its_flags_or_its_option_say():
    option = for_option("tiny")
    assert total_tokens(option) == OPTIONS["tiny"].tokens == 520 * option.tokens_per_step
    assert total_tokens(replace(option, steps=3)) == 3 * option.tokens_per_step
    assert total_tokens(replace(option, tokens=5_000.0)) == 2 * option.tokens_per_step
    assert total_tokens(replace(option, tokens=5.0)) == option.tokens_per_step
    with pytest.raises(UserError, match="--option huge is not one of tiny, "):
        find_option("huge")


def test_an_export_is_not_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").touch()
    sentence = f"{tmp_path} is a model in Hugging Face's format, not a run: name the run"
    for refuse in (
        lambda: SftConfig.for_checkpoint(tmp_path),
        lambda: find_saved_model(tmp_path),
        lambda: Origin(init_from=tmp_path).defaults(),
    ):
        with pytest.raises(UserError, match=f"--(checkpoint|init-from) {sentence}"):
            refuse()


def test_only_a_file_that_may_be_a_pt_checkpoint_is_to_be_imported(tmp_path):
    for name, mends in (("old.pt", True), ("model.gguf", False)):
        (tmp_path / name).touch()
        assert ("hamner.checkpoint import" in str(no_run(tmp_path / name, "--checkpoint"))) == mends
