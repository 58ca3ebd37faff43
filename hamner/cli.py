"""Every command ends the same way: 0 done, 2 bad input in one sentence, 130 interrupted.

Training also ends with 3: it stopped itself, because step after step had no finite loss.

Importing this module must stay cheap: `--help` answers before torch is loaded.
"""

import os
import sys
from collections.abc import Callable, Sequence

from hamner.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """The function runs a command's `main` on the process's arguments and exits with its code.

    `main` returns an exit code, or None for 0. A `UserError` is printed as one sentence without a
    traceback; anything else unexpected is a bug and keeps its traceback. Of several processes with
    the same command line, the first one speaks.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        if is_main:
            print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code)


def gather_data(args: Sequence[str]) -> list[str]:
    """The function joins repeated `--data` flags: `--data A --data B` is `--data A B`.

    Raises:
        UserError: The flag is there without a value, as an unset variable of the shell leaves it.
    """
    rest: list[str] = []
    specs: list[str] = []
    in_data = False
    for argument in args:
        if argument == "--data" or argument.startswith("--data="):
            in_data = True
            if argument != "--data":
                specs.append(argument.partition("=")[2])
        elif in_data and not argument.startswith("-"):
            specs.append(argument)
        else:
            in_data = False
            rest.append(argument)
    if specs:
        return [*rest, "--data", *specs]
    if len(rest) < len(args):
        raise UserError("--data has no value: say what to read, or leave the flag out")
    return rest


def flag_value(args: Sequence[str], flag: str) -> str | None:
    """The function finds the value of `--flag VALUE` or `--flag=VALUE`, before the real parsing."""
    for position, argument in enumerate(args):
        if argument == flag and position + 1 < len(args):
            return args[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None
