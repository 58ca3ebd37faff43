"""The module reads what a person types: one turn at a time, with arrow keys and a history."""

import contextlib
import select
import sys
from collections.abc import Iterator
from pathlib import Path

PASTE_SECONDS = 0.05
"""A line that comes within so short a time after another was not typed but pasted with it."""


class Keyboard:
    """The keyboard gives a turn: a line, or all lines of a block that was pasted.

    Where the terminal marks what is pasted, readline gives the block in one piece.
    """

    def __init__(self) -> None:
        self._has_ended = False

    def read(self, prompt: str) -> str:
        """The method gives the next turn.

        Raises:
            EOFError: the input is at its end.
        """
        if self._has_ended:
            raise EOFError
        lines = [input(prompt)]
        while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
            try:
                lines.append(input())
            except EOFError:
                # The turn before it comes first.
                self._has_ended = True
                break
        return "\n".join(lines)


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """The context has arrow keys and a lasting history, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = _history_file()
    with contextlib.suppress(OSError):
        if file is not None:
            readline.read_history_file(file)
    readline.set_history_length(1_000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if file is not None:
                readline.write_history_file(file)


def _history_file() -> Path | None:
    """The file is in the home folder, which an account without a name may lack."""
    try:
        return Path.home() / ".hamner_history"
    except RuntimeError:
        return None
