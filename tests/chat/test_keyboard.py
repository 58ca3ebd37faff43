"""The tests type and paste into a terminal of their own."""

import os
import pty
import readline
import sys
from pathlib import Path

import pytest

from hamner.chat.keyboard import Keyboard, line_editing


@pytest.fixture
def typed(monkeypatch):
    """The function types into a terminal, from which `input` reads."""
    master, terminal = pty.openpty()
    with os.fdopen(terminal, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda text: os.write(master, text.encode())
    os.close(master)


def test_a_pasted_block_is_one_turn(typed):
    keyboard = Keyboard()
    typed("def f():\n\n    pass\n")
    assert keyboard.read("") == "def f():\n\n    pass"
    typed("next\n")
    assert keyboard.read("") == "next"


def test_the_end_after_a_block_is_not_lost(typed):
    keyboard = Keyboard()
    typed("one\ntwo\n\x04")
    assert keyboard.read("") == "one\ntwo"
    with pytest.raises(EOFError):
        keyboard.read("")


def test_the_history_lasts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with line_editing():
        readline.add_history("Hi")
    assert "Hi" in (tmp_path / ".hamner_history").read_text()


def test_no_home_folder_means_no_history(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with line_editing():
        pass


def test_a_home_folder_that_is_not_there_means_no_history(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    with line_editing():
        pass
    assert not (tmp_path / "gone").exists()
