"""Runs beside each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hamner.checkpoint.run_folder import RunFolder
from hamner.config.train import FineTuning
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.plot.__main__ import PlotConfig, plot
from hamner.plot.comparison import BITS, NATS, compare
from tests.models import DENSE
from tests.plot.test_run import OPTION, folder_of, record

SHAPE = replace(DENSE, vocab_size=600)
CONFIG = replace(OPTION, model=SHAPE, seq_len=64)


def run_of(path, offset: float = 0.0, config=CONFIG, **values):
    """A run's folder whose loss falls by 1 every 100 tokens."""
    records = [record(step, loss=12.0 - step + offset, **values) for step in range(1, 11)]
    records[-1] |= {"val_loss": 3.0 + offset, "val_step": records[-1]["step"]}
    run = folder_of(path, records, config)
    if config:
        tokenizer = load_tokenizer("builtin", config.model.vocab_size)
        tokenizer.save(run.tokenizer)
    return path


def test_the_difference_is_taken_at_the_same_tokens(tmp_path):
    """Also of runs that logged at other steps, and only where both have been."""
    others = [(2, 250, 10.0), (4, 450, 7.5), (14, 1_400, 1.0)]
    records = [record(step, tokens=tokens, loss=loss) for step, tokens, loss in others]
    other = folder_of(tmp_path / "b", records)
    comparison = compare([run_of(tmp_path / "a"), other.path])
    tokens, difference = comparison.difference(1)
    assert tokens.tolist() == [250, 450]
    assert difference.tolist() == pytest.approx([0.5, 0.0])
    assert comparison.unit == NATS


def test_runs_are_drawn_and_said_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = (run_of(tmp_path / "a"), run_of(tmp_path / "b", 0.25, peak_vram_gib=2.0))
    lines = plot(PlotConfig(paths))
    assert lines[-1] == "wrote runs.png"
    assert [line.split() for line in lines[1:3]] == [
        ["a", "1K", "0.01", "5", "2.0000", "3.0000"],
        ["b", "1K", "0.01", "5", "2.2500", "3.2500", "+0.2500", "0.2500"],
    ]
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    plot(PlotConfig(paths[:1], tmp_path / "new" / "one.svg"))
    assert b"<svg" in (tmp_path / "new" / "one.svg").read_bytes()


def test_runs_of_one_name_are_named_by_their_paths(tmp_path):
    paths = [tmp_path / "x" / "a", tmp_path / "y" / "a"]
    for path in paths:
        path.parent.mkdir()
        run_of(path)
    assert [run.name for run in compare(paths).runs] == [str(path) for path in paths]


def test_what_a_reader_must_know_is_said(tmp_path):
    paths = [run_of(tmp_path / "a"), run_of(tmp_path / "b", config=None)]
    paths.append(run_of(tmp_path / "c", config=replace(CONFIG, sft=FineTuning())))
    unknown, tuned = compare(paths).remarks
    assert unknown.startswith("b: no config.json")
    assert tuned.startswith("c: fine-tuning")


def keep_rows(path, text: str, vocab_size: int) -> int:
    """Validation rows of `text` and its end; the result is the number of targets that count."""
    tokenizer = load_tokenizer("builtin", vocab_size)
    targets = torch.tensor([[-100, *tokenizer.encode(text), tokenizer.eot_id]], dtype=torch.int32)
    save_file({"targets": targets}, RunFolder(path).validation)
    return targets.numel() - 1


def test_losses_of_different_tokenizers_are_compared_by_bytes(tmp_path):
    text = "naïve bytes of text"
    small = replace(CONFIG, model=replace(SHAPE, vocab_size=300))
    paths = run_of(tmp_path / "a"), run_of(tmp_path / "b", config=small)
    message = "a and b have different tokenizers.*a, b has no validation rows"
    with pytest.raises(UserError, match=message):
        compare(paths)
    counts = [keep_rows(p, text, size) for p, size in zip(paths, (600, 300), strict=True)]
    assert counts[0] < counts[1]
    comparison = compare(paths)
    assert comparison.unit == BITS
    expected = [count / len(text.encode()) / np.log(2) for count in counts]
    assert list(comparison.scales) == pytest.approx(expected)
    assert comparison.last_loss(1, "val_loss") == pytest.approx(3.0 * expected[1])
    assert "bits per byte" in comparison.remarks[0]
    RunFolder(paths[0]).validation.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"validation.safetensors cannot be read"):
        compare(paths)


@pytest.mark.parametrize("name", ["a.png", "a.svg", "a.pdf"])
def test_only_pictures_of_the_kind_are_overwritten(name, tmp_path):
    (file := tmp_path / name).write_text("my thesis")
    with pytest.raises(UserError, match=rf"--output \S+{name} is there and holds something else"):
        PlotConfig((tmp_path / "run",), file)
    file.unlink()
    for _ in range(2):
        plot(PlotConfig((run_of(tmp_path / "run"),), file))
