"""Batches of bad steps on disk, and their replay."""

import math

import pytest
import torch

from hamner.data.batch import Batch
from hamner.errors import UserError
from hamner.train import health
from hamner.train.health import StepReading


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
    said = health.keep(folder, reading())
    (path,) = folder.iterdir()
    assert path.name == "step_00000007.safetensors"
    assert str(path) in said
    found = health.read(path)
    assert (found.step, found.tokens, found.lr) == (7, 84, 1e-3)
    assert math.isnan(found.loss)
    assert found.grad_norm == math.inf
    assert torch.equal(found.batch.inputs, reading().batch.inputs)
    assert torch.equal(found.batch.targets, reading().batch.targets)


def test_they_do_not_fill_the_disk(tmp_path):
    said = [health.keep(tmp_path, reading(step)) for step in range(health.MOST_KEPT + 2)]
    assert len(list(tmp_path.iterdir())) == health.MOST_KEPT
    assert "not kept" in said[-1]


def test_a_disk_that_fails_does_not_end_the_run(tmp_path):
    said = health.keep(tmp_path / "gone" / "bad_steps", reading())
    assert "could not be written" in said


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04", b"\x08\0\0\0\0\0\0\0{}      "])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "step_00000001.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="is not the batch of a bad step"):
        health.read(path)


def test_diagnosis_tells_a_non_finite_state_from_bad_batches():
    state = {"good": torch.ones(3), "bad": torch.tensor([1.0, math.nan])}
    assert health.not_finite(state) == ["bad"]
    assert "among them bad" in health.diagnose(reading(), ["bad"])
    assert "lower --lr" in health.diagnose(reading(), ["bad"])
    assert "weights are finite" in health.diagnose(reading(), [])


def noisy(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (3.0 + 0.05 * torch.randn(count, generator=generator)).tolist()


def resumed(losses: list[float]) -> health.StepHealth:
    detector = health.StepHealth()
    detector.load_state_dict({"recent_losses": losses})
    return detector


def test_a_spike_is_marked_and_noise_is_not():
    detector = health.StepHealth()
    assert [detector.score(loss) for loss in noisy(500)] == [None] * 500
    score = detector.score(4.0)
    assert 15 < score < 25  # 1.0 above the median at a deviation of 0.05
    assert detector.score(2.0) is None  # far below is good news
    assert detector.score(3.05) is None


def test_spikes_do_not_hide_those_after_them():
    detector = resumed(noisy(128))
    assert all(detector.score(5.0) is not None for _ in range(20))


def test_nothing_is_judged_by_a_handful_of_losses():
    detector = resumed(noisy(30))
    assert [detector.score(loss) for loss in (3.0, 9.0)] == [None] * 2
    assert detector.score(9.0) is not None


def test_losses_of_long_ago_are_forgotten():
    detector = resumed([5.0] * 128 + noisy(128))
    assert detector.score(4.0) is not None


def test_last_digits_are_no_spike():
    detector = resumed([1.0] * 128)
    assert detector.score(1.001) is None
    assert detector.score(1.1) is not None


def test_a_resumed_detector_goes_on():
    whole, half = health.StepHealth(), health.StepHealth()
    losses = noisy(100)
    for loss in losses:
        whole.score(loss)
    for loss in losses[:60]:
        half.score(loss)
    other = resumed(half.state_dict()["recent_losses"])
    for loss in losses[60:]:
        other.score(loss)
    assert other.score(4.0) == whole.score(4.0)
