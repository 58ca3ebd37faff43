"""`python -m hamner.evaluate`: arguments, and what it prints; the path test runs it for real."""

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hamner.errors import UserError
from hamner.evaluate.__main__ import EvaluateConfig, evaluate, parse, show
from tests.models import DENSE
from tests.saved import save_run, sharp

SHAPE = replace(DENSE, vocab_size=261, max_seq_len=128)


def test_help_explains_every_flag_without_loading_torch():
    result = subprocess.run(
        [sys.executable, "-m", "hamner.evaluate", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )
    assert result.returncode == 0
    flags = set(re.findall(r"^│ (--[a-z-]+)", result.stdout, re.MULTILINE))
    assert {"--checkpoint", "--data", "--conversations", "--tasks", "--output"} <= flags
    assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--seq-len", "0"], "--seq-len 0"),
        (["--eval-tokens", "-1"], "--eval-tokens -1"),
        (["--val-fraction", "0"], "--val-fraction 0"),
        (["--val-fraction", "2"], "--val-fraction 2"),
        (["--output", "nowhere/x.json"], "no folder nowhere"),
    ],
)
def test_bad_flags(args, named):
    with pytest.raises(UserError, match=named):
        parse(["--checkpoint", "run", *args])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"checkpoint": (Path("nowhere"),)}, "--checkpoint nowhere"),
        ({"data": ("missing.txt",)}, "missing.txt"),
        ({"conversations": ("missing.jsonl",)}, "missing.jsonl"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, changes, named):
    run = save_run(tmp_path / "base", sharp(SHAPE))
    config = EvaluateConfig(checkpoint=(run,), device="cpu", eval_tokens=256)
    with pytest.raises(UserError, match=named):
        evaluate(replace(config, **changes))


def test_base_and_chat_model_side_by_side(tmp_path):
    """Both on the same data; each model's own columns, samples and probe."""
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
    assert [result.probe is None for result in results] == [True, False]

    console = Console(file=io.StringIO(), width=100)
    show(results, console)
    table = console.file.getvalue()
    assert f"{results[0].sources[0].loss:.4f}" in table
    assert len(re.findall(r"text: builtin", table)) == 1
    assert re.search(r"arithmetic +│ +- +│ +\d+%", table)
    assert "> Who are you?" in table
    assert "> The history of" in table
