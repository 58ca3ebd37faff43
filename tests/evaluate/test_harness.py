"""lm-evaluation-harness on our models: scores by hand, and a task of a local file."""

import json
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hamner.checkpoint.saved_model import find_saved_model
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.evaluate.harness import open_exported, run_tasks
from tests.models import DENSE, MOE
from tests.saved import save_run, sharp

TOKENIZER = load_tokenizer(vocab_size=261)
CPU = torch.device("cpu")
SHAPES = {"dense": replace(DENSE, vocab_size=261), "experts": replace(MOE, vocab_size=261)}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Neither a model nor a task of a local file may ask the hub for anything."""

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """A model, and what the harness makes of its export."""
    model, folder = sharp(SHAPES[request.param]), tmp_path_factory.mktemp(request.param)
    saved = find_saved_model(save_run(folder / "run", model))
    return model, open_exported(saved, folder / "model", CPU)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = save_run(tmp_path_factory.mktemp("saved") / "run", sharp(SHAPES["dense"]))
    return find_saved_model(run)


def request(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Of each token after the first, one at a time."""
    values = [
        model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]]
        for i in range(1, len(ids))
    ]
    return torch.stack(values)


def test_likelihood_of_continuations(pair):
    """Together in padded passes, as each alone."""
    model, harness = pair
    pairs = [("The cat", " sat on the mat"), ("A", "b"), ("", "Hi"), ("x" * 30, "y" * 20)]
    results = harness.loglikelihood([request(*p) for p in pairs], disable_tqdm=True)
    for (context, continuation), (score, is_greedy) in zip(pairs, results, strict=True):
        before = TOKENIZER.encode(context) or [TOKENIZER.eot_id]
        ids = before + TOKENIZER.encode(continuation)
        expected = log_probabilities(model, ids)[len(before) - 1 :].sum().item()
        assert score == pytest.approx(expected, rel=1e-4)
        assert not is_greedy


def test_what_the_harness_has_written_is_greedy(pair):
    model, harness = pair
    prompt = "The cat"
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
    (text,) = harness.generate_until([request(prompt, settings)], disable_tqdm=True)
    ids = TOKENIZER.encode(prompt)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert TOKENIZER.decode(ids[7:]) == text


def test_whole_texts_are_scored_after_the_end_of_text_token(pair):
    model, harness = pair
    text = "Hello there"
    (score,) = harness.loglikelihood_rolling([request(text)], disable_tqdm=True)
    ids = [TOKENIZER.eot_id, *TOKENIZER.encode(text)]
    assert score == pytest.approx(log_probabilities(model, ids).sum().item(), rel=1e-4)


@pytest.fixture
def tasks(tmp_path):
    """A folder with one task: of two continuations, one is what the model would write."""
    (tmp_path / "letters.yaml").write_text(
        f"""
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/letters.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""
    )
    return tmp_path


def test_a_local_task(saved, tasks, monkeypatch, tmp_path):
    """The harness's accuracy is the share of questions where the model prefers the right letter."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, rows, right = sharp(SHAPES["dense"]), [], 0
    for number, question in enumerate(["one", "two", "three", "four", "five"]):
        ids = TOKENIZER.encode(question)
        logits = model(torch.tensor([ids])).logits[0, -1]
        letters = ["q", "z"]
        label = number % 2
        scores = [logits[TOKENIZER.encode(letter)[0]].item() for letter in letters]
        right += scores[label] > scores[1 - label]
        rows.append({"question": question, "choices": letters, "label": label})
    (tasks / "letters.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    # Nothing between question and letter, so that the scores above are the harness's.
    with (tasks / "letters.yaml").open("a") as file:
        file.write('target_delimiter: ""\n')
    results = run_tasks(saved, ["letters"], folder=tasks, limit=None, device=CPU)
    assert results["letters"]["acc,none"] == right / 5
    limited = run_tasks(saved, ["letters"], folder=tasks, limit=1, device=CPU)
    assert limited["letters"]["acc,none"] in (0.0, 1.0)


def test_unknown_task_and_missing_data(saved, tasks):
    with pytest.raises(UserError, match="--tasks nonsense: no such task in --task-folder"):
        run_tasks(saved, ["nonsense"], folder=tasks, limit=None, device=CPU)
    with pytest.raises(UserError, match="--tasks letters: cannot be run"):
        run_tasks(saved, ["letters"], folder=tasks, limit=None, device=CPU)
