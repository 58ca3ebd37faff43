"""Batches of bad steps on disk, and their replay."""

import math

import pytest
import torch

from hamner.data.batch import Batch
from hamner.errors import UserError
from hamner.train import bad_steps
from hamner.train.step_monitor import StepReading


def reading(step: int = 7) -> StepReading:
    tokens = torch.arange(12).reshape(2, 6)
    return StepReading(
        step=step,
        tokens=12 * step,
        lr=1e-3,
        loss=math.nan,
        grad_norm=math.inf,
        batch=Batch(tokens, tokens + 1, torch.zeros(2, 6, dtype=torch.int32)),
    )


def test_round_trip(tmp_path):
    folder = tmp_path / "bad_steps"
    said = bad_steps.keep(folder, reading())
    (path,) = folder.iterdir()
    assert path.name == "step_00000007.safetensors"
    assert str(path) in said
    found = bad_steps.read(path)
    assert (found.step, found.tokens, found.lr) == (7, 84, 1e-3)
    assert math.isnan(found.loss)
    assert found.grad_norm == math.inf
    assert torch.equal(found.batch.inputs, reading().batch.inputs)
    assert torch.equal(found.batch.targets, reading().batch.targets)


def test_they_do_not_fill_the_disk(tmp_path):
    said = [bad_steps.keep(tmp_path, reading(step)) for step in range(bad_steps.MOST_KEPT + 2)]
    assert len(list(tmp_path.iterdir())) == bad_steps.MOST_KEPT
    assert "not kept" in said[-1]


def test_a_disk_that_fails_does_not_end_the_run(tmp_path):
    said = bad_steps.keep(tmp_path / "gone" / "bad_steps", reading())
    assert "could not be written" in said


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04", b"\x08\0\0\0\0\0\0\0{}      "])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "step_00000001.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="is not the batch of a bad step"):
        bad_steps.read(path)


def test_diagnosis_tells_a_poisoned_state_from_bad_batches():
    state = {"good": torch.ones(3), "bad": torch.tensor([1.0, math.nan])}
    assert bad_steps.not_finite(state) == ["bad"]
    assert "among them bad" in bad_steps.diagnose(reading(), ["bad"])
    assert "lower --lr" in bad_steps.diagnose(reading(), ["bad"])
    assert "weights are finite" in bad_steps.diagnose(reading(), [])
