"""`python -m hamner.evaluate`: arguments, and what it prints; the path test runs it for real."""

import importlib.util
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hamner.checkpoint.saved_model import SavedModel
from hamner.config.sft import SftConfig
from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.evaluate import evaluation
from hamner.evaluate.__main__ import EvaluateConfig, evaluate, main, show
from tests import forked
from tests.imports import output_without
from tests.models import DENSE, MOE
from tests.saved import save_run, sharp

SHAPE = replace(DENSE, vocab_size=261, max_seq_len=128)


def test_help_explains_every_flag_without_loading_torch():
    output = output_without(["torch"], "hamner.evaluate", "--help")
    flags = set(re.findall(r"^│ (--[a-z-]+)", output, re.MULTILINE))
    assert {"--checkpoint", "--data", "--conversations", "--tasks", "--output"} <= flags


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--seq-len", "0"], "--seq-len 0"),
        (["--eval-tokens", "-1"], "--eval-tokens -1"),
        (["--val-fraction", "0"], "--val-fraction 0"),
        (["--val-fraction", "2"], "--val-fraction 2"),
        (["--seq-len", "99999999999999999999"], "--seq-len 99999999999999999999 must be at most"),
        (["--output", "nowhere/x.json"], "nowhere/x.json: the folder nowhere does not exist"),
        (["--output", "."], "--output . is a folder; name a file in it"),
        (["--task-limit", "5"], "--task-limit 5 needs --tasks beside it"),
        (["--task-folder", "tasks"], "--task-folder tasks needs --tasks beside it"),
    ],
)
def test_bad_flags(args, named):
    with pytest.raises(UserError, match=named):
        main(["--checkpoint", "run", *args])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\n{"step": 2}\n', r"metrics\.jsonl is there and holds something else"),
        ("a file of mine", r"metrics\.jsonl is there and holds something else"),
        ('{\n "models": []\n}\n', "^(?!--output)"),  # what is not there is the run
    ],
)
def test_only_its_own_results_are_overwritten(text, message, tmp_path):
    (file := tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        main(["--checkpoint", "run", "--output", str(file)])
    assert file.read_text() == text


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"--output {tmp_path}/pipe is a pipe"):
        main(["--checkpoint", "run", "--output", str(tmp_path / "pipe")])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"checkpoint": (Path("nowhere"),)}, "--checkpoint nowhere"),
        ({"data": ("missing.txt",)}, "missing.txt"),
        ({"conversations": ("missing.jsonl",)}, "missing.jsonl"),
        ({"eval_tokens": 127}, "^--eval-tokens 127 is less than one .* --seq-len 128, so nothing"),
        ({"seq_len": 512}, "^--eval-tokens 256 is less than one sequence of --seq-len 512"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, changes, named):
    run = save_run(tmp_path / "base", sharp(SHAPE))
    config = EvaluateConfig(checkpoint=(run,), device="cpu", eval_tokens=256)
    with pytest.raises(UserError, match=named):
        evaluate(replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"router_balance": "bias"}, "no place for the router biases"),
        ({"num_shared_experts": 1}, "shared experts"),
        ({"use_differential_attention": True}, "differential attention with experts"),
    ],
)
def test_tasks_of_a_model_that_has_no_export(tmp_path, monkeypatch, changes, reason):
    """Said in one sentence before any model is loaded."""
    shape = replace(MOE, vocab_size=261, **changes)
    run = save_run(tmp_path / "run", sharp(shape))
    monkeypatch.setattr(SavedModel, "build", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    config = EvaluateConfig(checkpoint=(run,), tasks=("hellaswag",), device="cpu")
    with pytest.raises(UserError, match=rf"--tasks: .+step_00000007: .*{reason}"):
        evaluate(config)


@pytest.mark.parametrize("missing", ["lm_eval", "transformers", "accelerate"])
def test_tasks_without_the_harness(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(UserError, match=r"--tasks needs .+ pip install -e '\.\[harness\]'"):
        evaluate(EvaluateConfig(checkpoint=(tmp_path,), tasks=("hellaswag",), device="cpu"))


def test_base_and_chat_model_side_by_side(tmp_path):
    """Both on the same data; each model's own columns and samples."""
    base = save_run(tmp_path / "base", sharp(SHAPE))
    chat = save_run(tmp_path / "chat", sharp(SHAPE), chat=True)
    results = evaluate(
        EvaluateConfig(checkpoint=(base, chat), device="cpu", eval_tokens=1024, seq_len=64)
    )
    for result in results:
        # The default of both runs is the built-in data, text for one and conversations for one.
        assert [(s.name, s.kind) for s in result.sources] == [
            ("builtin", "text"),
            ("builtin", "conversations"),
        ]
    # The same weights: the same losses, whatever the model is called.
    assert results[0].sources == results[1].sources
    assert [result.is_chat for result in results] == [False, True]

    console = Console(file=io.StringIO(), width=100)
    show(results, console)
    table = console.file.getvalue()
    assert f"{results[0].sources[0].loss:.4f}" in table
    assert len(re.findall(r"text: builtin", table)) == 1
    assert re.search(r"kind +│ +base model +│ +chat model", table)
    assert "> Who are you?" in table
    assert "> The history of" in table


def test_text_for_a_chat_model_alone_is_what_its_base_held_out(tmp_path, monkeypatch):
    """Fine-tuning holds out five times as large a share, of conversations."""
    base = save_run(tmp_path / "base", sharp(SHAPE))
    chat = save_run(tmp_path / "chat", sharp(SHAPE), chat=True)
    tuned = replace(SftConfig.for_checkpoint(base), run_dir=chat).training()
    (chat / "config.json").write_text(json.dumps(tuned.to_json()))
    held_out = []
    monkeypatch.setattr(
        evaluation, "open_held_out", lambda *_, **how: held_out.append(how["val_fraction"]) or []
    )
    config = EvaluateConfig(checkpoint=(chat,), data=("builtin",), device="cpu")
    evaluate(config)
    assert held_out == [TrainConfig.val_fraction, SftConfig.val_fraction] == [0.01, 0.05]
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"did not train on.* name that beside it, or give --val-f"):
        evaluate(config)
    evaluate(replace(config, val_fraction=0.02))


def test_results_that_no_file_takes_are_shown(tmp_path, monkeypatch, capsys):
    run, file = save_run(tmp_path / "base", sharp(SHAPE)), tmp_path / "results.json"
    file.write_text('{\n "models": [] }')

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "open_held_out", lambda *_, **__: [])
    monkeypatch.setattr("hamner.files.write_whole", fail)
    with pytest.raises(UserError, match=r"results\.json cannot be written: No space left"):
        main(["--checkpoint", str(run), "--output", str(file), "--device", "cpu"])
    assert "base model" in capsys.readouterr().out
    assert file.read_text() == '{\n "models": [] }'


def test_a_model_whose_context_holds_no_question_is_evaluated(tmp_path):
    run = save_run(tmp_path / "chat", sharp(replace(SHAPE, max_seq_len=8)), chat=True)
    result = forked.run_module(
        "hamner.evaluate", "--checkpoint", str(run), "--data", "builtin", "--eval-tokens", "64"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("is left out: the model's context of 8 tokens") == 4
    assert "loss" in result.stdout
