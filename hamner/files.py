"""The module has files that are whole or not there, and JSON that may be damaged or hostile."""

import contextlib
import errno
import functools
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamner.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

TEMPORARY = ".new"
"""suffix of a file that is being written"""
PNG = b"\x89PNG"
"""how every such picture begins"""
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""what a file system answers that has no flush, as some over networks and in user space"""
CANNOT_OPEN = (errno.EACCES, errno.EPERM, errno.EISDIR)
"""what it answers where folders, or those of others, are not opened"""


def write_whole(path: Path, data: bytes | bytearray | str) -> None:
    """The function writes a file so that readers see the old one or the whole new one.

    Its folder must exist; text is written in UTF-8.

    Raises:
        OSError: the disk does not take it; the old one is as it was. Or a pipe or a device is
            there, which no file is to replace.
    """
    if is_pipe_or_device(path):
        raise FileExistsError(errno.EEXIST, "a pipe or a device is there, not a file")
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    flush(temporary)
    temporary.replace(path)


def figure_bytes(figure: "Figure", kind: str = "png", *, dpi: int = 120) -> bytes:
    """The function gives what a file of this kind (png, svg, pdf) holds of a matplotlib figure, so
    that it can be written whole."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=dpi)
    return content.getvalue()


def write_output(path: Path, data: bytes) -> None:
    """The function writes a file that a user named: whole, as `write_whole` does, where a link
    leads to if it is one; but into a device, or an open stream's /dev/stdout, directly.

    Raises:
        OSError: the disk does not take it; a file that was there is as it was.
    """
    if is_pipe_or_device(path) or _is_stream(path):
        path.write_bytes(data)
    else:
        write_whole(path.resolve(), data)


def _is_stream(path: Path) -> bool:
    """The answer is whether a path stands for a stream that this process has open, as /dev/stdout
    does, and that goes into a file."""
    devices = Path("/dev")
    return devices in path.absolute().parents and devices not in path.resolve().parents


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
def usual_permissions(path: Path) -> Iterator[None]:
    """The context gives the file that is made at `path` in it the permissions of any new file.

    A library that makes its own temporary file, as safetensors does, lets nobody but the owner read
    it. After an error there is no file.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        yield
        with contextlib.suppress(OSError):  # of a file system that has no permissions
            path.chmod(mode)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


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
    # A Path forgets the `./` by which a file named `~` is meant.
    expanded = os.path.expanduser(path)  # noqa: PTH111
    if str(expanded).startswith("~") and not os.path.lexists(path):
        raise UserError(
            f"{flag} {path}: no home folder is known for {Path(path).parts[0]}; write the whole "
            "path, or ./ before a name that begins with ~"
        )
    return Path(expanded)


def is_pipe_or_device(path: Path) -> bool:
    """The function says whether something is there that is neither a file nor a folder."""
    return path.exists() and not (path.is_file() or path.is_dir())


def refuse_pipe(path: Path, name: str) -> None:
    """The function refuses a pipe or a device: reading one may wait for ever, and only once.

    Raises:
        UserError: it begins with `name`, of the flag or the file.
    """
    if is_pipe_or_device(path):
        raise UserError(
            f"{name}: is a pipe or a device, not a file; write it to a file and give that"
        )


def refuse_unread(path: Path, name: str) -> None:
    """The function refuses to write to a named pipe, where opening waits until somebody reads.

    Devices, and what stands for an open stream, as /dev/stdout does, are written to.

    Raises:
        UserError: it begins with `name`, of the flag.
    """
    target = path.resolve()
    if target.is_fifo() or target.is_socket():
        raise UserError(f"{name} {path} is a pipe, which nobody may ever read: name a file")


def require_writable(path: Path, name: str, *, begins: bytes = b"") -> None:
    """The function refuses a file that cannot be written, before hours go into what it is to hold.

    Args:
        path, name: of the file, and of the flag that gives it.
        begins: see `refuse_foreign`.

    Raises:
        UserError: it begins with `name` and the path.
    """
    if not path.parent.is_dir():
        raise UserError(f"{name} {path}: the folder {path.parent} does not exist; create it")
    if path.is_dir():
        raise UserError(f"{name} {path} is a folder; name a file in it")
    refuse_unread(path, name)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{name} {path} cannot be written: {os.strerror(errno.EACCES)}")
    refuse_foreign(path, name, begins=begins)


def refuse_foreign(path: Path, name: str, *, begins: bytes) -> None:
    """The function refuses to overwrite a file that does not begin as every one of its kind.

    Raises:
        UserError: it begins with `name`, of the flag, and the path.
    """
    if path.is_file() and not _is_stream(path):
        with writing(f"{name} {path}"), path.open("rb") as file:
            found = file.read(len(begins))
        if found and found != begins:
            raise UserError(
                f"{name} {path} is there and holds something else: name another file, or remove it"
            )


def flush(path: Path) -> None:
    """The function has the operating system put a file or folder on disk.

    A file system that cannot do so costs the promise that a power cut takes nothing back, and is
    warned of once.

    Raises:
        OSError: the disk failed, or is full.
    """
    accepted = CANNOT_FLUSH
    try:
        if path.is_dir():
            accepted += CANNOT_OPEN
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in accepted:
            raise
        _warn_of_flush(os.strerror(error.errno), "folders" if path.is_dir() else "files")


@functools.cache
def _warn_of_flush(reason: str, kind: str) -> None:
    logger.warning(
        "this file system cannot flush %s (%s): after a power cut the last ones may be missing",
        kind,
        reason,
    )


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


def read_objects(path: Path) -> Iterator[dict]:
    """The iterator gives the objects of a JSON-lines file, and no torn line; none without a
    file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                value = parse_json(line)
                if isinstance(value, dict):
                    yield value


def read_records(path: Path) -> Iterator[dict]:
    """The iterator gives the objects of a JSON-lines file that have a step."""
    return (record for record in read_objects(path) if isinstance(record.get("step"), int))
