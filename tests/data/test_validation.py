import logging

import pytest
import torch

from hamner.data.loader import DataConfig, TrainLoader
from hamner.data.validation import ValidationSet

TEXTS = [f"Document {i} says {'so ' * (i % 9)}it." for i in range(200)]


@pytest.fixture
def loader_of(write_jsonl, tokenizer):
    def make(texts=TEXTS, seq_len=32, seed=0, val_fraction=0.2):
        path = str(write_jsonl("corpus.jsonl", texts))
        return TrainLoader(DataConfig((path,), seq_len, 4, seed, val_fraction), tokenizer)

    return make


@pytest.fixture
def gathered(monkeypatch):
    """Counts how often rows are gathered."""
    calls = []
    real = TrainLoader.validation_rows

    def spy(loader, max_tokens, status):
        calls.append(max_tokens)
        return real(loader, max_tokens, status)

    monkeypatch.setattr(TrainLoader, "validation_rows", spy)
    return calls


def equal(a, b):
    names = ("inputs", "targets", "document_ids")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_rows_are_gathered_once_and_stay_the_same(tmp_path, loader_of, gathered):
    path = tmp_path / "validation.safetensors"
    first = ValidationSet(path, loader_of(), 320)
    assert first.rows.inputs.shape == (10, 32)
    assert not path.exists()
    first.keep()
    again = ValidationSet(path, loader_of(seed=7), 320)
    again.keep()
    assert gathered == [320]
    assert equal(first.rows, again.rows)
    assert again.rows.inputs.dtype == again.rows.targets.dtype == torch.int64
    assert again.rows.document_ids.dtype == torch.int32


@pytest.mark.parametrize(
    "change", [{"texts": TEXTS[1:]}, {"seq_len": 16}, {"val_fraction": 0.3}, {}]
)
def test_rows_of_anything_else_do_not_count(tmp_path, loader_of, gathered, change):
    path = tmp_path / "validation.safetensors"
    ValidationSet(path, loader_of(), 320).keep()
    changed = ValidationSet(path, loader_of(**change), 320 if change else 640)
    assert len(gathered) == 2
    changed.keep()
    stored = ValidationSet(path, loader_of(**change), 320 if change else 640)
    assert len(gathered) == 2
    assert equal(stored.rows, changed.rows)


def test_run_goes_on_where_the_rows_cannot_be_kept(tmp_path, loader_of, caplog):
    rows = ValidationSet(tmp_path / "missing" / "validation.safetensors", loader_of(), 320)
    with caplog.at_level(logging.WARNING):
        rows.keep()
    assert "validation.safetensors could not be written" in caplog.text


def test_corpus_too_small_to_hold_out_keeps_no_rows(tmp_path, loader_of):
    path = tmp_path / "validation.safetensors"
    ValidationSet(path, loader_of(val_fraction=0.0), 320).keep()
    assert ValidationSet(path, loader_of(val_fraction=0.0), 320).rows.inputs.shape == (0, 32)
