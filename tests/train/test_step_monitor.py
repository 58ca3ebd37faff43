"""Readings of steps, and spikes among them."""

import math

import pytest
import torch

from hamner.data.batch import Batch
from hamner.train.step_monitor import SpikeDetector, StepMonitor

ROWS = torch.zeros(2, 3, dtype=torch.int64)
BATCH = Batch(ROWS, ROWS, ROWS.int())


def read(*values: tuple[float, float]):
    monitor = StepMonitor()
    for step, (loss, norm) in enumerate(values, start=1):
        monitor.record(step, 6 * step, 1e-3, BATCH, torch.tensor(loss), torch.tensor(norm))
    return list(monitor.arrived(most_under_way=0))


def test_readings_come_in_order_with_their_batches():
    readings = read((3.5, 1.0), (3.25, 0.5))
    assert [(r.step, r.tokens, r.loss, r.grad_norm) for r in readings] == [
        *((1, 6, 3.5, 1.0), (2, 12, 3.25, 0.5))
    ]
    assert readings[0].batch is BATCH
    assert not any(reading.is_bad for reading in readings)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loss_or_gradient_that_is_not_finite_is_bad(bad):
    assert [reading.is_bad for reading in read((bad, 1.0), (1.0, bad), (1.0, 1.0))] == [
        *(True, True, False)
    ]


@pytest.mark.gpu
def test_a_reading_does_not_wait_for_the_gpu():
    monitor = StepMonitor()
    values = torch.tensor(3.0, device="cuda"), torch.tensor(1.0, device="cuda")
    monitor.record(1, 6, 1e-3, BATCH, *values)
    torch.cuda.synchronize()
    assert [reading.loss for reading in monitor.arrived()] == [3.0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)
        monitor.record(2, 12, 1e-3, BATCH, *values)
        assert list(monitor.arrived()) == []
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [reading.step for reading in monitor.arrived(most_under_way=0)] == [2]


@pytest.mark.gpu
def test_the_host_stays_a_step_ahead_at_most():
    monitor = StepMonitor()
    values = torch.tensor(3.0, device="cuda"), torch.tensor(1.0, device="cuda")
    for step in (1, 2, 3):
        torch.cuda._sleep(300_000_000)
        monitor.record(step, 6 * step, 1e-3, BATCH, *values)
    assert [reading.step for reading in monitor.arrived()] == [1, 2]
    assert monitor.under_way == 1


def noisy(count: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (3.0 + 0.05 * torch.randn(count, generator=generator)).tolist()


def test_a_spike_is_marked_and_noise_is_not():
    detector = SpikeDetector([])
    assert [detector.score(loss) for loss in noisy(500)] == [None] * 500
    score = detector.score(4.0)
    assert 15 < score < 25  # 1.0 above the median at a deviation of 0.05
    assert detector.score(2.0) is None  # far below is good news
    assert detector.score(3.05) is None


def test_spikes_do_not_hide_those_after_them():
    detector = SpikeDetector(noisy(128))
    assert all(detector.score(5.0) is not None for _ in range(20))


def test_nothing_is_judged_by_a_handful_of_losses():
    detector = SpikeDetector([])
    assert [detector.score(loss) for loss in (3.0, 3.0, 9.0, 3.0)] == [None] * 4


def test_last_digits_are_no_spike():
    detector = SpikeDetector([1.0] * 128)
    assert detector.score(1.001) is None
    assert detector.score(1.1) is not None


def test_a_resumed_detector_goes_on():
    whole, half = SpikeDetector([]), SpikeDetector([])
    losses = noisy(100)
    for loss in losses:
        whole.score(loss)
    for loss in losses[:60]:
        half.score(loss)
    resumed = SpikeDetector(list(half.recent))
    for loss in losses[60:]:
        resumed.score(loss)
    assert resumed.score(4.0) == whole.score(4.0)
