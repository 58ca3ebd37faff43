"""lm-evaluation-harness on our models: scores by hand, and a task of a local file."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.evaluate.harness import HarnessModel, run_tasks
from tests.models import DENSE
from tests.saved import sharp

TOKENIZER = load_tokenizer(vocab_size=261)


@pytest.fixture(scope="module")
def model():
    return sharp(replace(DENSE, vocab_size=261))


def request(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Of each token after the first, one at a time."""
    values = [
        model(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]]
        for i in range(1, len(ids))
    ]
    return torch.stack(values)


def test_likelihood_of_continuations(model):
    """Together in one padded pass, as each alone."""
    pairs = [("The cat", " sat on the mat"), ("A", "b"), ("", "Hi"), ("x" * 30, "y" * 20)]
    results = HarnessModel(model, TOKENIZER).loglikelihood([request(*p) for p in pairs])
    for (context, continuation), (score, is_greedy) in zip(pairs, results, strict=True):
        before = TOKENIZER.encode(context) or [TOKENIZER.eot_id]
        ids = before + TOKENIZER.encode(continuation)
        expected = log_probabilities(model, ids)[len(before) - 1 :].sum().item()
        assert score == pytest.approx(expected, rel=1e-4)
        assert not is_greedy


def test_what_greedy_decoding_writes_is_greedy(model):
    harness = HarnessModel(model, TOKENIZER)
    prompt = "The cat"
    (text,) = harness.generate_until([request(prompt, {"until": [], "max_gen_toks": 8})])
    ids = TOKENIZER.encode(prompt)
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert TOKENIZER.decode(ids[7:]) == text
    continuation = ids[7:]
    ((score, is_greedy),) = harness._loglikelihood_tokens([("", ids[:7], continuation)])
    assert is_greedy
    assert score == pytest.approx(log_probabilities(model, ids)[6:].sum().item(), rel=1e-4)


def test_generation_ends_at_a_stop(model):
    harness = HarnessModel(model, TOKENIZER)
    (whole,) = harness.generate_until([request("The cat", {"until": [], "max_gen_toks": 8})])
    stop = whole[3]
    (cut,) = harness.generate_until([request("The cat", {"until": [stop], "max_gen_toks": 8})])
    assert cut == whole[: whole.index(stop)]


def test_whole_texts_longer_than_the_context(model):
    """Every token is scored once, the first after the end-of-text token."""
    harness = HarnessModel(model, TOKENIZER)
    short = "Hello there"
    (score,) = harness.loglikelihood_rolling([request(short)])
    ids = [TOKENIZER.eot_id, *TOKENIZER.encode(short)]
    assert score == pytest.approx(log_probabilities(model, ids).sum().item(), rel=1e-4)

    seen = []
    harness._loglikelihood_tokens = lambda parts: seen.extend(parts) or [(0.0, True)] * len(parts)
    long = "abcdefghij" * 20
    harness.loglikelihood_rolling([request(long)])
    assert TOKENIZER.decode([i for _, _, scored in seen for i in scored]) == long
    assert all(
        len(context) + len(scored) <= model.config.max_seq_len + 1 for _, context, scored in seen
    )


def test_of_what_is_too_long_the_end_counts(model):
    harness = HarnessModel(model, TOKENIZER)
    context, continuation = list(range(10, 210)), [50, 60]
    ((score, _),) = harness._loglikelihood_tokens([("", context, continuation)])
    ids = (context + continuation)[-model.config.max_seq_len - 1 :]
    assert score == pytest.approx(log_probabilities(model, ids)[-2:].sum().item(), rel=1e-4)


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


def test_a_local_task(model, tasks, monkeypatch, tmp_path):
    """The harness's accuracy is the share of questions where the model prefers the right letter."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows, right = [], 0
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
    results = run_tasks(model, TOKENIZER, ["letters"], folder=tasks, limit=None)
    assert results["letters"]["acc,none"] == right / 5
    limited = run_tasks(model, TOKENIZER, ["letters"], folder=tasks, limit=1)
    assert limited["letters"]["acc,none"] in (0.0, 1.0)


def test_unknown_task_and_missing_data(model, tasks):
    with pytest.raises(UserError, match="--tasks nonsense: no such task in --task-folder"):
        run_tasks(model, TOKENIZER, ["nonsense"], folder=tasks, limit=None)
    with pytest.raises(UserError, match="--tasks letters: cannot be run"):
        run_tasks(model, TOKENIZER, ["letters"], folder=tasks, limit=None)
