"""Every command reads its command line here, and ends the same way.

It ends with 0 done, 2 bad input in one sentence, 130 interrupted. Training also ends with 3: it
stopped itself, because step after step had no finite loss.

Importing this module must stay cheap: `--help` answers before torch is loaded.
"""

import contextlib
import dataclasses
import io
import os
import select
import stat
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep
from types import NoneType, UnionType
from typing import Annotated, Any, TextIO, Union, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

import hamner
from hamner.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, UserError
from hamner.files import expand_home

PARTS = (
    *("chat", "checkpoint", "config", "data", "evaluate", "export", "kernels", "model"),
    *("parallel", "plan", "plot", "profile", "sft", "train"),
)
"""packages that hamner is made of"""
PATIENCE_SECONDS = 5.0
"""longest that a terminal or pipe which stands still is waited for, once"""


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """The function runs a command's `main` on the process's arguments and exits with its code.

    `main` returns an exit code, or None for 0. A `UserError` is printed as one sentence without a
    traceback; anything else unexpected is a bug and keeps its traceback. Of several processes with
    the same command line, the first one of each machine speaks.

    What a terminal cannot encode is replaced, and a reader that has seen enough, such as `head`,
    ends the command without a word.
    """
    is_main = os.environ.get("LOCAL_RANK", "0") == "0"
    _prepare_process()
    try:
        require_whole_package(Path(__file__).resolve().parent)
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


class TimelyStream(UnfailingStream):
    """The stream also loses what a terminal or a pipe does not take in time.

    So a terminal that stands still (Ctrl-S, a laptop that sleeps at the other end of ssh) and a
    pager that nobody turns hold up nothing.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.flush()
        self._stands_still = False
        self._descriptor = None
        with contextlib.suppress(OSError, ValueError):  # it has no descriptor
            self._descriptor = open_unwaiting(stream.fileno())
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)

    def write(self, text: str) -> int:
        if self._descriptor is None:
            return super().write(text)
        data = text.encode(self.stream.encoding, "replace")
        deadline = monotonic() + PATIENCE_SECONDS
        with contextlib.suppress(OSError):
            while data:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:
                    if self._stands_still or monotonic() > deadline:
                        break
                    sleep(0.01)
            self._stands_still = bool(data)
        return len(text)


def for_terminal(text: str) -> str:
    """The function replaces what a terminal would obey in a text that a model or a file made."""
    return text.translate(_CONTROLS)


_CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - set(map(ord, "\t\n\r")), "\ufffd")


def open_unwaiting(descriptor: int) -> int | None:
    """The function opens a terminal or pipe once more, so that writing to it never waits.

    Returns:
        Another descriptor, or None for what is neither, or cannot be opened.
    """
    with contextlib.suppress(OSError):
        if os.isatty(descriptor) or stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            # O_NONBLOCK on the descriptor itself would hold for the shell as well.
            return os.open(f"/dev/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return None


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


def require_whole_package(folder: Path) -> None:
    """The function refuses to mix two folders named hamner, which Python does from some folders.

    What lies in `folder` is not importable without `hamner.` before it: its `profile` would be
    taken for Python's where a command is started in there.

    Raises:
        UserError: it says which folder is in the way, or what is missing.
    """
    inside = {path for path in sys.path if path and Path(path).resolve().is_relative_to(folder)}
    sys.path[:] = [path for path in sys.path if path not in inside]
    imported = Path(next(iter(hamner.__path__))).resolve()
    if imported != folder or hamner.__file__ is None:
        raise UserError(
            f"the folder {imported} has the name of the package in {folder}, and Python takes it "
            "for that: start the command in another folder"
        )
    missing = [name for name in PARTS if not (folder / name / "__init__.py").is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {missing[0]}, so it is not the whole package: start the command in "
            "another folder, or install Hamner again"
        )


def read_flags(
    form: Any,
    args: Sequence[str],
    command: str,
    *,
    default: Any = tyro.MISSING_NONPROP,
    lists: Sequence[str] = ("--data",),
    description: str | None = None,
) -> Any:
    """The function reads a command line into an instance of the dataclass `form`.

    Args:
        form: a dataclass, or a union of those of subcommands.
        args: the command line.
        command: the module that `python -m` starts.
        default: what the flags are that are not given; default those of `form`.
        lists: flags that may be repeated to make their list longer; of any other the last counts.
        description: what the command does; default the docstring of `form`, which subcommands lack.

    Raises:
        UserError: values that make no sense, alone or together.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[form],
        args=_join(args, lists),
        default=default,
        prog=f"python -m {command}",
        description=description,
        config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.SuppressFixed),
        registry=FLAG_RULES,
    )


def read_ahead(form: Any, args: Sequence[str], command: str) -> Any:
    """The function reads the flags of `form` among others, as `read_flags` will.

    So a command knows what the defaults of the others are before it reads them, and `--help` can
    show those. Where the command line cannot be read, the defaults of `form` are returned:
    `read_flags` refuses it too, and says so with all that its own form knows of the flag.
    """
    prog, unheard = f"python -m {command}", io.StringIO()
    try:
        with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
            known, _ = tyro.cli(
                form,
                args=args,
                prog=prog,
                add_help=False,
                return_unknown_args=True,
                registry=FLAG_RULES,
            )
    except SystemExit:
        return form()
    return known


def _join(args: Sequence[str], lists: Sequence[str]) -> list[str]:
    """The function joins repeated flags of lists: `--data A --data B` is `--data A B`.

    Raises:
        UserError: A flag is there without a value, as an unset variable of the shell leaves it, or
            with another flag for one.
    """
    rest: list[str] = []
    found: list[tuple[str, list[str]]] = []
    begun: list[str] | None = None
    for argument in args:
        flag, has_value, value = argument.partition("=")
        if flag in lists:
            begun = [value] if has_value else []
            found.append((flag, begun))
        elif begun is not None and not argument.startswith("-"):
            begun.append(argument)
        else:
            begun = None
            rest.append(argument)
    joined: dict[str, list[str]] = {}
    for flag, values in found:
        if not values:
            raise UserError(f"{flag} has no value: name one, or leave the flag out")
        if values[0].startswith("-"):
            raise UserError(f"{flag}={values[0]} names a flag: write ./{values[0]} for a file")
        joined.setdefault(flag, [flag]).extend(values)
    return rest + [part for parts in joined.values() for part in parts]


def _expanded(text: str) -> str:
    """The function expands the home folder of a path: no shell does it in `--run-dir=~/x`.

    Raises:
        UserError: nobody knows that folder, or the path is empty.
    """
    if not text:
        raise UserError("a path is empty: is a variable of the shell not set?")
    return str(expand_home(text, "the path"))


FLAG_RULES = ConstructorRegistry()
"""how flags are read and described"""


@FLAG_RULES.primitive_rule
def _read_path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """The rule reads every flag of the type Path."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: Path(_expanded(texts[0])),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


@FLAG_RULES.primitive_rule
def _read_optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """The rule reads `T | None` as T, of whose values `None` is one that `--help` need not show."""
    parts = get_args(info.type)
    if info.type_origin not in (Union, UnionType) or len(parts) != 2 or NoneType not in parts:
        return None
    of_value = next(part for part in parts if part is not NoneType)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(of_value, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        nargs=spec.nargs if spec.nargs in (1, "*") else (1, spec.nargs),
        choices=spec.choices and (*spec.choices, "None"),
        instance_from_str=lambda texts: (
            None if texts == ["None"] else spec.instance_from_str(texts)
        ),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: [] if value is None else spec.str_from_instance(value),
    )


@FLAG_RULES.struct_rule
def _describe_fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The rule leaves the default of a flag out of `--help` where there is none to show."""
    if not dataclasses.is_dataclass(info.type) or _DESCRIBED in info.markers:
        return None
    plain = dataclasses.replace(info, markers=(*info.markers, _DESCRIBED))
    spec = ConstructorRegistry.get_struct_spec(plain)
    if not isinstance(spec, StructConstructorSpec):
        return spec
    fields = (dataclasses.replace(f, type=Annotated[f.type, _DESCRIBED]) for f in spec.fields)
    return dataclasses.replace(spec, fields=tuple(fields))


_DESCRIBED = tyro.conf.arg(help_behavior_hint=lambda text: text and f"(default: {text})")
"""describes a default, of which `text` is empty for None and for an empty list"""

NameOrPath = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="STR",
        instance_from_str=lambda texts: _expanded(texts[0]) if texts[0] else "",
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda text: [text],
    ),
]
"""the type of a flag that is a name or a path"""
