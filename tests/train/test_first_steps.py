"""What is shown of the steps before the first log line."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from hamner.progress import ShownStatus
from hamner.train.first_steps import FirstSteps


@pytest.fixture
def log():
    """A run of 25 steps of 100 tokens that logs every 10th."""
    status = ShownStatus(Console(file=io.StringIO()), lambda line: None)
    return SimpleNamespace(
        config=SimpleNamespace(log_every=10, tokens_per_step=100),
        display=SimpleNamespace(status=status, total_tokens=2_500),
        is_before_first_line=True,
    )


def shown(log):
    return [(task.what, task.done, task.total) for task in log.display.status.line.under_way]


def test_micro_batches_of_the_first_step_then_steps(log):
    with FirstSteps(log, is_compiled=True) as steps:
        steps.micro_batch_done(1, 4)
        (task,) = log.display.status.line.under_way
        assert task.what == "first step, which compiles its kernels"
        assert task.note == "1 of 4 micro-batches"
        steps.step_done(1, 100)
        steps.micro_batch_done(1, 4)
        steps.step_done(2, 200)
        assert shown(log) == [("steps to the first log line", 2, 10)]
        assert task.note == ""
    assert shown(log) == []


@pytest.mark.parametrize(("log_every", "step", "total"), [(10, 14, 7), (10, 21, 5), (0, 1, 25)])
def test_the_steps_are_those_to_the_next_line_or_the_end(log, log_every, step, total):
    log.config.log_every = log_every
    with FirstSteps(log, is_compiled=False) as steps:
        steps.step_done(step, 100 * step)
        assert shown(log) == [("steps to the first log line", 1, total)]


def test_nothing_is_shown_after_the_first_line(log):
    with FirstSteps(log, is_compiled=False) as steps:
        steps.step_done(1, 100)
        log.is_before_first_line = False
        steps.step_done(2, 200)
        assert shown(log) == []
        steps.step_done(3, 300)
        steps.micro_batch_done(1, 2)
        assert shown(log) == []
