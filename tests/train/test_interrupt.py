"""Which signals ask a run to stop, and which end it at once."""

import signal

import pytest

from hamner.train import interrupt
from hamner.train.interrupt import Interrupt


@pytest.fixture
def after_first(monkeypatch, capfd):
    """The test is inside an `Interrupt` that has had a signal, and meanwhile gets it again."""
    # Under nohup a hang-up is ignored, here and by a run.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def begin(context: Interrupt, number: int) -> None:
        def again(seconds: float) -> None:
            assert seconds == interrupt.TOGETHER_SECONDS
            signal.raise_signal(number)

        monkeypatch.setattr(interrupt.time, "sleep", again)
        # Not os.kill: another thread may get that one, and the handler runs some time later.
        signal.raise_signal(number)
        assert context.requested
        assert capfd.readouterr().err.count("stopping: saving first") == 1

    yield begin
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_asks_once_however_often_it_signals(after_first):
    """A shell passes SIGHUP on to its jobs, and the system sends one more when the shell ends."""
    with Interrupt(is_single=True) as context:
        after_first(context, signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_that_comes_twice_at_once_is_one_and_the_next_ends_the_process(after_first):
    with Interrupt(is_single=True) as context:
        after_first(context, signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
