"""The module finds the data files of a `--data` location: a file, a folder or a glob.

What is left out is named in a warning: hidden files, linked folders of a folder, and what has the
name of a data file and is none. The `**` of a glob follows links, but never to a folder that it
came through or has been in: so it comes out of every loop.
"""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from hamner.errors import UserError
from hamner.files import expand_home

logger = logging.getLogger(__name__)

COMPRESSED = (".gz", ".zst", ".zstd")
FORMATS = (".txt", ".jsonl", ".parquet")
SUPPORTED = ".txt, .jsonl or .parquet (.txt and .jsonl also with .gz, .zst or .zstd)"
#: Names that a warning spells out.
NAMED = 3


def data_format(path: Path) -> str | None:
    """The format is the one of `FORMATS` that the file's name says; None when it is not ours."""
    is_compressed = path.suffix.lower() in COMPRESSED
    suffix = Path(path.stem if is_compressed else path.name).suffix.lower()
    if suffix not in FORMATS or (is_compressed and suffix == ".parquet"):
        return None
    return suffix


def find_files(location: str) -> list[Path]:
    """The function lists the data files of a location in an order that does not change.

    Raises:
        UserError: nothing there, or not a file that can be read as data.
    """
    path = expand_home(location, "--data")
    if path.is_dir():
        found, what = _search(path, ["**", "*"], location, links=False), "folder"
    elif os.path.lexists(path):
        _require_file(path, location)
        return [path]
    elif glob.has_magic(location):
        parts = path.parts
        deep = parts.index("**") if "**" in parts else len(parts)
        # Path.glob takes no absolute pattern.
        found, what = list(map(Path, glob.glob(str(Path(*parts[:deep]))))), "glob"  # noqa: PTH207
        if "**" in parts:
            folders = [path for path in found if path.is_dir()]
            found = [p for f in folders for p in _search(f, parts[deep:], location, links=True)]
    else:
        raise UserError(f"--data {location}: no such file or folder")
    named = sorted(path for path in found if data_format(path) and not path.is_dir())
    paths = [path for path in named if path.is_file()]
    _warn(location, "that are no files (broken links, pipes)", sorted({*named} - {*paths}))
    if not paths:
        raise UserError(f"--data {location}: the {what} has no file that ends in {SUPPORTED}")
    return paths


def _require_file(path: Path, location: str) -> None:
    if not path.exists():
        raise UserError(f"--data {location}: is a link to {path.readlink()}, which is not there")
    if not path.is_file():
        raise UserError(
            f"--data {location}: is a pipe or a device, not a file; data is read more than once "
            "and in any order, so write it to a file and give that"
        )
    if data_format(path) is None:
        raise UserError(f"--data {location}: the name of a data file must end in {SUPPORTED}")


def _search(folder: Path, pattern: Sequence[str], location: str, *, links: bool) -> list[Path]:
    """The function lists what matches a pattern that begins with `**` below a folder.

    As in a shell, hidden names match only what spells their dot.
    """
    found, hidden = [], []
    for path in _walk(folder, location, links=links):
        parts = path.relative_to(folder).parts
        if _matches(parts, pattern):
            found.append(path)
        elif data_format(path) and _matches([part.lstrip(".") for part in parts], pattern):
            hidden.append(path)
    _warn(location, "hidden files", sorted(hidden))
    return found


def _walk(folder: Path, location: str, *, links: bool) -> Iterator[Path]:
    """The iterator gives all files below a folder, those behind links after all others."""
    entered = set()
    waiting, left_out = [folder], []
    unreadable: list[OSError] = []
    for start in waiting:
        for here, folders, names in os.walk(start, onerror=unreadable.append):
            real = Path(here).resolve()
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            linked = [path for name in sorted(folders) if (path := Path(here, name)).is_symlink()]
            if links:
                waiting += [path for path in linked if not real.is_relative_to(path.resolve())]
            else:
                left_out += linked
            yield from (Path(here, name) for name in names)
    _warn(location, "linked folders (give them as --data of their own)", left_out)
    _warn(location, "that cannot be read", [Path(error.filename) for error in unreadable])


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        depth = next((i for i, part in enumerate(parts) if part.startswith(".")), len(parts))
        return any(_matches(parts[i:], pattern[1:]) for i in range(depth + 1))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _warn(location: str, what: str, paths: Sequence[Path]) -> None:
    if paths:
        names = ", ".join(map(str, paths[:NAMED])) + (", ..." if len(paths) > NAMED else "")
        logger.warning("--data %s: leaves out %d %s: %s", location, len(paths), what, names)
