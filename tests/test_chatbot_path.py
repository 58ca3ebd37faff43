"""From nothing to a chatbot, as a user types it: train, fine-tune, evaluate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    *("--option", "tiny", "--hidden-size", "64", "--num-layers", "2", "--vocab-size", "600"),
    *("--expert-intermediate-size", "128", "--max-seq-len", "128", "--seq-len", "128"),
    *("--eval-tokens", "1024", "--val-fraction", "0.1", "--sample-every", "0", "--save-every", "0"),
]


def run(module: str, *args: str, cwd: Path) -> str:
    """Run a command, which must succeed; gives what it printed."""
    command = [sys.executable, "-m", f"hamner.{module}", *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=170, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds runs/tiny and runs/tiny-sft."""
    folder = tmp_path_factory.mktemp("path")
    run("train", *SMALL, "--steps", "30", "--warmup-steps", "5", "--device", "cpu", cwd=folder)
    # A demo's learning rate: these weights are far from anything worth preserving.
    sft = ["--checkpoint", "runs/tiny", "--lr", "3e-3", "--epochs", "10", "--batch-size", "4"]
    printed = run("sft", *sft, "--val-fraction", "0.1", "--device", "cpu", cwd=folder)
    (folder / "sft.txt").write_text(printed)
    return folder


def test_fine_tuning_shows_its_data_and_learns(folder):
    printed = (folder / "sft.txt").read_text()
    assert "conversations to train on" in printed
    assert "% of them supervised" in printed
    assert "<|end|>]]" in printed
    assert "python -m hamner.train" not in printed
    lines = (folder / "runs/tiny-sft/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["val_loss"] for line in lines]
    assert min(losses) < losses[0] - 0.3


def test_evaluation_tells_base_and_chat_model_apart(folder):
    args = ["--checkpoint", "runs/tiny", "runs/tiny-sft", "--output", "results.json"]
    printed = run("evaluate", *args, "--device", "cpu", cwd=folder)
    base, chat = json.loads((folder / "results.json").read_text())["models"]
    assert [base["is_chat"], chat["is_chat"]] == [False, True]
    losses = {
        (name, source["kind"]): source["loss"]
        for name, model in (("base", base), ("chat", chat))
        for source in model["sources"]
    }
    assert losses["chat", "conversations"] < losses["base", "conversations"] - 0.3
    last = json.loads((folder / "runs/tiny/metrics.jsonl").read_text().splitlines()[-1])
    assert losses["base", "text"] == pytest.approx(last["val_loss"], rel=1e-5)
    best = min(
        json.loads(line)["val_loss"]
        for line in (folder / "runs/tiny-sft/metrics.jsonl").read_text().splitlines()
    )
    assert losses["chat", "conversations"] == pytest.approx(best, rel=1e-5)
    assert f"{losses['chat', 'conversations']:.4f}" in printed
    assert len(chat["probe"]["answers"]) > 20
