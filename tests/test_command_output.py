"""What a command prints never ends it otherwise than its work does."""

import io
import os
import pwd
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from hamner.cli import run_command
from hamner.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError


def exit_code(main: Callable) -> int:
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    return exit_.value.code


@pytest.fixture(params=[True, False], ids=["line by line", "in blocks"])
def without_reader(request, monkeypatch):
    """The standard output is a pipe that nobody reads any more, as behind `| head`."""
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", buffering=1 if request.param else 4096)
    monkeypatch.setattr(sys, "stdout", stream)
    yield stream
    stream.close()  # raises if anything is left in it


def test_what_a_terminal_cannot_encode_is_replaced(monkeypatch):
    output, errors = (io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", errors)

    def main(_):
        print("données \udcff")
        raise UserError("é is not there")

    assert exit_code(main) == EXIT_BAD_INPUT
    assert output.buffer.getvalue() == b"donn?es ?\n"
    errors.flush()
    assert errors.buffer.getvalue() == b"error: ? is not there\n"


@pytest.mark.parametrize(("rank", "said"), [("0", "error: too few GPUs\n"), ("1", "")])
def test_the_first_process_of_each_machine_speaks(rank, said, monkeypatch, capsys):
    """Of a machine that is not the job's first nobody else would say why it does not start."""
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main(_):
        raise UserError("too few GPUs")

    assert exit_code(main) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == said


def say(_) -> None:
    print("one")
    print("two")


def draw(_) -> None:
    Console().print("one")


def ask_for_help(_) -> None:
    print("usage")
    raise SystemExit(0)


@pytest.mark.parametrize("main", [say, draw, ask_for_help])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(without_reader, capfd, main):
    assert exit_code(main) == 0
    assert capfd.readouterr().err == ""


def test_bad_input_stays_bad_without_a_reader(without_reader):
    def refuse(_):
        print("reading")
        raise UserError("no such file")

    assert exit_code(refuse) == EXIT_BAD_INPUT


def test_another_broken_pipe_is_an_error():
    def main(_):
        raise BrokenPipeError("of a service")

    with pytest.raises(BrokenPipeError, match="of a service"):
        run_command(main)


def test_a_disk_that_does_not_take_the_output_is_one_sentence(monkeypatch, capfd):
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_code(say) == EXIT_FAILED
    sentence = "error: the output cannot be written: No space left on device\n"
    assert capfd.readouterr().err == sentence


def test_the_backend_of_a_notebook_does_not_count(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    assert exit_code(lambda _: None) == 0
    assert "MPLBACKEND" not in os.environ


@pytest.mark.parametrize("home", [None, "/proc/nobody"])
def test_an_account_without_a_home_keeps_kernels_elsewhere(monkeypatch, tmp_path, home):
    for name in ("HOME", "TRITON_HOME", "HF_HOME"):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    if home:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["uid"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert exit_code(lambda _: None) == 0
    (folder,) = tmp_path.iterdir()
    assert os.environ["TRITON_HOME"] == os.environ["HF_HOME"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
