"""The module has files that are whole or not there, and JSON that may be damaged or hostile."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hamner.errors import UserError

TEMPORARY = ".new"
"""suffix of a file that is being written"""


def write_whole(path: Path, data: bytes | bytearray | str) -> None:
    """The function writes a file so that readers see the old one or the whole new one.

    Its folder must exist; text is written in UTF-8.

    Raises:
        OSError: the disk does not take it; the old one is as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    flush(temporary)
    temporary.replace(path)


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """The context gives the path at which to make a file or folder that is to stand at `path`.

    Its parent must exist, and a folder must not be there yet. Processes may do so at the same time:
    the last one wins. After an error `path` is as it was and nothing is left beside it.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        flush(temporary)
        temporary.replace(path)


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """The context names what could not be written in it, such as a flag and its path.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror}") from error


def expand_home(path: str | Path, flag: str) -> Path:
    """The function expands a `~` that begins a path, as a shell would have.

    Raises:
        UserError: there is no such user, or none has a home folder here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        if os.path.lexists(path):  # a file of that very name
            return Path(path)
        raise UserError(
            f"{flag} {path}: no home folder is known for {Path(path).parts[0]}; write the whole "
            "path, or ./ before a name that begins with ~"
        ) from error


def flush(path: Path) -> None:
    """The function has the operating system put a file or folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parse_json(text: str) -> Any:
    """The function parses as `json.loads` does, with one kind of error.

    Raises:
        ValueError: not JSON, or nested so deeply that the parser gives up.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, error: type[UserError] = UserError) -> dict:
    """The function reads a file that holds one JSON object.

    Raises:
        UserError: or `error`, where one is given: the file cannot be read, or holds something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object")
    return value


def read_records(path: Path) -> Iterator[dict]:
    """The iterator gives the objects of a JSON-lines file that have a step, and no torn line."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record
