"""Every command ends the same way: 0 done, 2 bad input in one sentence, 130 interrupted.

Training also ends with 3: it stopped itself, because step after step had no finite loss.

Importing this module must stay cheap: `--help` answers before torch is loaded.
"""

import contextlib
import io
import os
import select
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

from hamner.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, UserError

QUIET_SECONDS = 10.0
"""between two plain lines that say how far something is"""


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """The function runs a command's `main` on the process's arguments and exits with its code.

    `main` returns an exit code, or None for 0. A `UserError` is printed as one sentence without a
    traceback; anything else unexpected is a bug and keeps its traceback. Of several processes with
    the same command line, the first one speaks.

    What a terminal cannot encode is replaced, and a reader that has seen enough, such as `head`,
    ends the command without a word.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    _prepare_process()
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        code = EXIT_BAD_INPUT
        if is_main:
            _complain(f"error: {error}")
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        if is_main:
            _complain("interrupted")
    except OSError as error:
        if not _is_of_output(error):
            raise
        code = 0
    except SystemExit as exit_:
        # Rich leaves so, when it finds that nobody reads.
        code = 0 if isinstance(exit_.__context__, BrokenPipeError) else exit_.code
    failure = _flush_output()
    sys.exit(code or failure)


class UnfailingStream:
    """The stream writes to another one, and what that refuses is lost.

    So a terminal that is closed, a pipe without a reader, a log on a full disk end nothing.

    Args:
        stream: to write to. What it cannot encode is replaced.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def give_up_rest(self) -> None:
        """What could not be written so far is given up, so that the process's end does not stumble
        over it."""
        try:
            self.stream.flush()
        except OSError:
            _give_up(self.stream)
        except ValueError:  # closed
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """While people wait in this context, they see what is being done.

    On a terminal that is one line that changes, elsewhere a line at first and then one from time to
    time. Of several processes, the first one speaks.

    Args:
        what: is being done.

    Yields:
        A function that takes how far it is, as often as one likes.
    """
    from rich.console import Console
    from rich.text import Text

    speaks = sys.stdout is not None and os.environ.get("RANK", "0") == "0"
    file = UnfailingStream(sys.stdout) if speaks else io.StringIO()
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        with console.status(Text(what)) as status:
            yield lambda how_far: status.update(Text(f"{what}: {how_far}"))
        return
    console.print(Text(what), soft_wrap=True)
    said = monotonic()

    def update(how_far: str) -> None:
        nonlocal said
        if monotonic() - said >= QUIET_SECONDS:
            console.print(Text(f"{what}: {how_far}"), soft_wrap=True)
            said = monotonic()

    yield update


def _prepare_process() -> None:
    """Nothing in the process's surroundings is to end a command that does not need it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # A notebook leaves its own drawing backend to the commands it starts, and where that is not
    # installed the import of matplotlib fails. Figures here are files only.
    os.environ.pop("MPLBACKEND", None)
    home = os.path.expanduser("~")  # noqa: PTH111 (pathlib raises where there is none)
    if not os.access(home, os.W_OK):
        # Else Triton could keep no kernel, or would keep them in a folder named "~".
        os.environ.setdefault("TRITON_HOME", _cache_folder())
    if not Path(home).is_dir():
        os.environ.setdefault("HF_HOME", _cache_folder())


def _cache_folder() -> str:
    """The folder stands in for an account's home: it is the same at the next start, and nobody
    else's."""
    folder = Path(tempfile.gettempdir()) / f"hamner-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            return str(folder)
    return tempfile.mkdtemp(prefix="hamner-")


def _complain(sentence: str) -> None:
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr)


def _flush_output() -> int:
    """The function writes what is left of the output, and returns an exit code if a disk does not
    take it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _give_up(sys.stdout)
    except OSError as error:
        _give_up(sys.stdout)
        _complain(f"error: the output cannot be written: {error.strerror}")
        return EXIT_FAILED
    return 0


def _is_of_output(error: OSError) -> bool:
    """The answer is whether an error came from the standard output."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _give_up(stream: TextIO) -> None:
    """What the stream still holds, and all that follows, goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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
