"""Evaluation: every figure against one computed by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from hamner.data.batch import Batch
from hamner.data.conversations.examples import load_examples
from hamner.data.conversations.loader import validation_batch
from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.tokenizer import load_tokenizer
from hamner.evaluate import evaluation
from hamner.evaluate.evaluation import (
    HeldOut,
    evaluate_source,
    loss_by_position,
    open_held_out,
)
from hamner.progress import Task
from tests.models import DENSE, build
from tests.saved import sharp

TOKENIZER = load_tokenizer(vocab_size=261)
SHAPE = replace(DENSE, vocab_size=261)


@pytest.fixture
def documents(tmp_path) -> str:
    """Held out entirely by a fraction of 1; some characters have more than one byte."""
    path = tmp_path / "documents.jsonl"
    texts = [f"Größe {i}: {'wörter ' * (i % 7)}" for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


SETTINGS = {"seq_len": 32, "max_tokens": 640, "val_fraction": 1.0}


def text(spec: str, document_mask: bool = False) -> HeldOut:
    (source,) = open_held_out("text", (spec,), TOKENIZER, **SETTINGS, document_mask=document_mask)
    return source


def conversations() -> HeldOut:
    (source,) = open_held_out(
        "conversations", ("builtin",), TOKENIZER, **SETTINGS, document_mask=True
    )
    return source


def uniform():
    """A model for which all 261 tokens are equally likely, everywhere."""
    model = build(SHAPE)
    with torch.no_grad():
        model.embed.weight.zero_()
    return model


@pytest.mark.parametrize("document_mask", [False, True])
def test_loss_is_the_models_own(documents, document_mask, monkeypatch):
    """Cut into single rows, and without: what the model itself computes against targets."""
    model = sharp(SHAPE)
    source = text(documents, document_mask)
    ids = source.batch.document_ids if document_mask else None
    expected = model(source.batch.inputs, source.batch.targets, ids).cross_entropy.item()
    for limit in (1, 2**26):
        monkeypatch.setattr(evaluation, "MAX_LOGITS", limit)
        result = evaluate_source(model, TOKENIZER, source)
        assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.tokens == source.batch.targets.numel()


def test_a_cpu_counts_every_few_rows(documents, monkeypatch):
    """A pass of many rows would show nothing for minutes."""
    monkeypatch.setattr(evaluation, "CPU_MICRO_BATCH_TOKENS", 64)
    amounts = []
    monkeypatch.setattr(Task, "advance", lambda task, by=1: amounts.append((task.total, by)))
    source = text(documents)
    amounts.clear()
    evaluate_source(uniform(), TOKENIZER, source)
    rows = len(source.batch.inputs)
    assert amounts[0] == (rows, 2)
    assert sum(amount for _, amount in amounts) == rows


def test_a_token_a_byte_costs_log2_of_the_vocabulary(documents):
    """However many bytes a character has; what ends a document or an answer is no text."""
    for source in (text(documents), conversations()):
        result = evaluate_source(uniform(), TOKENIZER, source)
        assert result.loss == pytest.approx(math.log(261), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(math.log2(261), rel=1e-5)


def test_conversations_count_answers_alone():
    source = conversations()
    result = evaluate_source(uniform(), TOKENIZER, source)
    assert result.kind == "conversations"
    assert result.tokens == int((source.batch.targets != -100).sum()) > 0


def test_what_is_read_is_what_a_training_held_out(documents):
    """Of every kind, at the fraction of the training, whose seed and batch do not matter."""
    settings = {**SETTINGS, "val_fraction": 0.3}
    training = DataConfig((documents,), 32, 8, 5, val_fraction=0.3)
    expected = TrainLoader(training, TOKENIZER).validation_rows(640)
    (source,) = open_held_out("text", (documents,), TOKENIZER, **settings, document_mask=False)
    assert 0 < len(expected.inputs) < 20
    assert torch.equal(source.batch.inputs, expected.inputs)
    training = replace(training, data=("builtin",))
    examples = load_examples(training, TOKENIZER)
    expected = validation_batch(examples, TOKENIZER, 32, 640)
    (source,) = open_held_out(
        "conversations", ("builtin",), TOKENIZER, **settings, document_mask=True
    )
    assert len(expected.inputs)
    assert torch.equal(source.batch.inputs, expected.inputs)


def test_nothing_held_out_is_no_loss(tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "Hi"}\n')
    result = evaluate_source(uniform(), TOKENIZER, text(str(path)))
    assert (result.tokens, result.loss, result.bits_per_byte) == (0, None, None)
    assert result.loss_by_position == {}


def test_ranges_of_positions_double():
    losses = torch.arange(100, dtype=torch.float64).expand(2, 100)
    positions = torch.arange(100).expand(2, 100)
    kept = torch.ones(2, 100, dtype=torch.bool)
    kept[1, :64] = False
    assert loss_by_position(losses, positions, kept) == {
        "0-31": 15.5,
        "32-63": 47.5,
        "64-99": 81.5,
    }
    kept[:, :32] = False
    assert set(loss_by_position(losses, positions, kept)) == {"32-63", "64-99"}


def test_positions_of_masked_documents_start_anew():
    """Two documents of 16 in a row of 32: no token has more than 15 before it."""
    ids = torch.zeros(1, 64, dtype=torch.int32)
    ids[:, 16:] = 1
    tokens = torch.full((1, 64), 7)
    batch = Batch(tokens, tokens, ids)
    for mask, expected in ((False, {"0-31", "32-63"}), (True, {"0-31", "32-63"})):
        result = evaluate_source(uniform(), TOKENIZER, HeldOut("x", "text", batch, mask))
        assert set(result.loss_by_position) == expected
    ids[:, 32:] = 2
    masked = evaluate_source(uniform(), TOKENIZER, HeldOut("x", "text", batch, True))
    assert set(masked.loss_by_position) == {"0-31"}


def test_samples_of_base_and_chat_models(monkeypatch):
    model = sharp(replace(SHAPE, max_seq_len=128))
    base = evaluation.samples(model, TOKENIZER, is_chat=False)
    assert [sample.prompt for sample in base] == list(evaluation.PROMPTS)
    chat = evaluation.samples(model, TOKENIZER, is_chat=True)
    assert [sample.prompt for sample in chat] == list(evaluation.QUESTIONS)
    assert chat == evaluation.samples(model, TOKENIZER, is_chat=True)
    monkeypatch.setattr(evaluation, "QUESTIONS", evaluation.QUESTIONS[1:])
    assert evaluation.samples(model, TOKENIZER, is_chat=True) == chat[1:]


def test_a_question_that_does_not_fit_the_context_is_left_out(caplog):
    model = sharp(replace(SHAPE, max_seq_len=32))
    chat = evaluation.samples(model, TOKENIZER, is_chat=True)
    assert [sample.prompt for sample in chat] == ["Hello!", "Who are you?", "What is 2 + 2?"]
    (record,) = caplog.records
    assert record.getMessage() == (
        "the sample 'What is the capital of France?' is left out: the model's context of 32 tokens "
        "has no room for the question and an answer"
    )
