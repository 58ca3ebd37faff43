"""A run's folder belongs to one process at a time."""

import errno
import fcntl
import os
import re
import socket

import pytest

from hamner.checkpoint import owner
from hamner.checkpoint.owner import LOCK_FILE, Owner
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.options import OPTIONS
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from tests.kills import CONTEXT


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(owner, "WAIT_SECONDS", 0.0)


def take_and_stay(folder, taken) -> None:
    """Body of a process."""
    mine = Owner(folder)
    mine.take()
    taken.set()
    CONTEXT.Event().wait()


def test_a_process_has_the_folder_until_it_is_killed(tmp_path):
    taken = CONTEXT.Event()
    process = CONTEXT.Process(target=take_and_stay, args=(tmp_path, taken))
    process.start()
    assert taken.wait(60)
    name = f"in use by process {process.pid} on {re.escape(socket.gethostname())}: "
    with pytest.raises(UserError, match=name):
        Owner(tmp_path).take()
    with pytest.raises(UserError, match=name):
        Owner(tmp_path).require_free()
    process.kill()
    process.join()
    Owner(tmp_path).require_free()
    with RunFolder(tmp_path) as run:
        run.owner.take()
        run.owner.take()
        assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()
    assert Owner(tmp_path).take() is None


def test_a_second_start_is_refused(tmp_path):
    first, config = RunFolder(tmp_path), OPTIONS["tiny"]
    tokenizer = load_tokenizer(vocab_size=config.model.vocab_size)
    RunFolder(tmp_path).open(resume=False)
    first.start(config, tokenizer)
    for attempt in (
        lambda run: run.open(resume=True),
        lambda run: run.open(resume=False),
        lambda run: run.start(config, tokenizer),
    ):
        with pytest.raises(UserError, match="is in use by process"):
            attempt(RunFolder(tmp_path))
    first.owner.release()
    RunFolder(tmp_path).open(resume=True)
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        RunFolder(tmp_path).start(config, tokenizer)


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    Owner(tmp_path).take()
    (message,) = caplog.messages
    assert message.startswith(f"WARNING: the file system of {tmp_path}/run.lock has no locks (No l")


def test_a_folder_that_takes_no_file_is_named(tmp_path):
    with pytest.raises(UserError, match=f"--run-dir {tmp_path}/gone cannot be written"):
        Owner(tmp_path / "gone").take()
