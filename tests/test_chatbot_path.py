"""A user gets from nothing to a chatbot by typing: train, fine-tune, evaluate, chat, export."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import forked
from tests.llama_cpp import LlamaCpp, needs_llama_cpp

# One worker, which trains once for all of them.
pytestmark = pytest.mark.xdist_group("from nothing to a chatbot")

SMALL = [
    *("--option", "tiny", "--hidden-size", "64", "--num-layers", "2", "--vocab-size", "600"),
    *("--expert-intermediate-size", "128", "--max-seq-len", "128", "--seq-len", "128"),
    *("--eval-tokens", "1024", "--val-fraction", "0.1", "--sample-every", "0", "--save-every", "0"),
]


def run(module: str, *args: str, cwd: Path, typed: str = "") -> str:
    """The function runs a command, which must succeed, and gives what it printed."""
    command = [sys.executable, "-m", f"hamner.{module}", *args]
    # Fine-tuning draws its pictures, which a process that comes from the fork server does not.
    start = subprocess.run if module == "sft" else forked.run
    result = start(command, capture_output=True, text=True, timeout=170, cwd=cwd, input=typed)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder holds runs/tiny and runs/tiny-sft."""
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
    assert (folder / "runs/tiny-sft/plots/loss.png").exists()


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
    assert [len(model["samples"]) for model in (base, chat)] == [3, 4]


QUESTION = "Hello there!"


@pytest.fixture(scope="module")
def answer(folder) -> str:
    """What the chatbot answers in the terminal, at temperature 0."""
    best = json.loads(
        (sorted((folder / "runs/tiny-sft/checkpoints").iterdir())[-1] / "state.json").read_text()
    )["best_step"]
    greedy = ["--temperature", "0", "--device", "cpu"]
    printed = run("chat", "--checkpoint", "runs/tiny-sft", *greedy, cwd=folder, typed=QUESTION)
    title, _, answer = printed.split("\n", 2)
    assert f"runs/tiny-sft/checkpoints/step_{best:08d}" in title
    return answer


def test_the_chatbot_says_the_same_in_transformers(folder, answer):
    run("export", "--checkpoint", "runs/tiny-sft", "--to", "hf", "exported", cwd=folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype="float32")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_length=128, do_sample=False)
    text = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :])
    # Up to the first special token, here as there; what follows may be a note that it was cut.
    assert text.strip("\n")
    assert answer.startswith(re.split(r"<\|\w+\|>", text)[0])

    card = (folder / "exported" / "README.md").read_text()
    assert "| started from | `tiny`, trained on `builtin` |" in card
    assert re.search(r"\| final training loss \| \d\.\d{4} nats", card)
    assert re.search(r"\| final validation loss \| \d\.\d{4} nats .* held-out conversations", card)
    assert re.search(r"\| tokens \| [\d,]+ in \d+ steps of 4 x 128 \|", card)


@needs_llama_cpp
def test_the_chatbot_says_the_same_in_llama_cpp(folder, answer):
    """By the template in the file."""
    run("export", "--checkpoint", "runs/tiny-sft", "--to", "gguf", "chat.gguf", cwd=folder)
    theirs = LlamaCpp(folder / "chat.gguf", context=128)
    text = theirs.answer([{"role": "user", "content": QUESTION}], 20)
    assert text
    assert answer.startswith(text)
