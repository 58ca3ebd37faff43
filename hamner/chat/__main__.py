"""`python -m hamner.chat` lets one talk to a run's model in the terminal, or serves it."""

import sys

if __package__ != "hamner.chat":
    print("error: start this with python -m hamner.chat", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Sequence

from hamner.chat.config import ChatConfig
from hamner.chat.keyboard import Keyboard, line_editing
from hamner.cli import for_terminal, read_flags, run_command


def parse(args: Sequence[str]) -> ChatConfig:
    """The function reads the command line.

    Raises:
        UserError: values that make no sense.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    return read_flags(ChatConfig, args, "hamner.chat")


def write(text: str) -> None:
    """The function writes to the standard output, where a terminal obeys nothing of the text."""
    print(for_terminal(text) if sys.stdout.isatty() else text, end="", flush=True)


def main(args: Sequence[str]) -> None:
    """The command chats or serves as its flags say."""
    config = parse(args)
    # Torch takes a second or more to load.
    from hamner.chat.session import Terminal, chat

    if sys.stdin.isatty() and config.serve is None:
        with line_editing():
            chat(config, Terminal(Keyboard().read, write))
    else:
        # Lines from a pipe: no prompts between the answers.
        chat(config, Terminal(lambda _: input(), write))


if __name__ == "__main__":
    run_command(main)
