"""Conversations are read from files and from the hub; rows that cannot be used are told apart.

`rows` has the forms, which a file may mix. The built-in set is a file that Hamner ships.
"""

import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple

from hamner.data.chat_template import Message
from hamner.data.conversations.rows import FIELDS, parse_conversation
from hamner.data.files import NUL_BYTES, check_content, find_files, open_bytes
from hamner.data.hub import open_location
from hamner.data.retry import RetriedSource
from hamner.data.shuffle import State
from hamner.data.specs import Spec
from hamner.errors import UserError
from hamner.files import parse_json

BUILTIN_FILE = "builtin.jsonl"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd")
PARQUET_ROWS = 1000
"""rows of a parquet file that are in memory at once"""


@dataclass(frozen=True)
class Conversation:
    """A conversation is messages, and where they were read."""

    messages: tuple[Message, ...]
    origin: str
    """for people: `file:line`"""


@dataclass(frozen=True)
class Unusable:
    """A row cannot be used, for a reason that other rows may share."""

    kind: str
    name: str
    """of the file"""
    number: int
    """line, or row of a table, counted from 0"""


class Row(NamedTuple):
    """A row is not read yet; reading it raises a `ValueError` where that is not possible."""

    name: str
    number: int
    read: Callable[[], Any]


def read_conversations(spec: Spec) -> Iterator[Conversation | Unusable]:
    """The iterator gives every row of a `--data` spec, in its order.

    Raises:
        UserError: not such a spec, or a file or data set that cannot be read.
    """
    for row in _rows(spec):
        try:
            messages = parse_conversation(row.read())
        except ValueError as error:
            yield Unusable(_kind(error), row.name, row.number)
        else:
            yield Conversation(messages, f"{row.name}:{row.number}")


def _kind(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    return "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _rows(spec: Spec) -> Iterator[Row]:
    if spec.kind == "builtin":
        resource = resources.files("hamner.data.conversations").joinpath(BUILTIN_FILE)
        with resource.open("rb") as stream:
            yield from _lines(stream, "builtin")
    elif spec.kind == "hub":
        source = RetriedSource(_HubRows(spec.location), spec.text)
        for row, state in source.documents(seed=0, epoch=0, state=None):
            yield Row(spec.text, state["rows"] - 1, lambda row=row: row)
    elif spec.kind == "files":
        named = Path(spec.location)
        # People keep whole files of rows as one array; in a folder, such a file is anything.
        is_array = named.suffix.lower() == ".json" and named.is_file()
        for path in [named] if is_array else find_files(spec.location):
            yield from _file_rows(path)
    else:
        raise UserError(
            f"--data {spec.text}: conversations are not read from shards; give a file, a folder, "
            "a glob, hf:owner/name or builtin"
        )


def _file_rows(path: Path) -> Iterator[Row]:
    name = path.name.lower()
    try:
        if name.endswith((".parquet", ".json", *SUFFIXES)):
            check_content(path)
        if name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif name.endswith((".json", *SUFFIXES)):
            # Arrow's streams have no lines of their own.
            with io.BufferedReader(open_bytes(path)) as stream:
                yield from (_json_rows if name.endswith(".json") else _lines)(stream, path.name)
        else:
            raise UserError(
                f"--data {path}: conversations are read from .jsonl files "
                "(also with .gz, .zst or .zstd), .parquet and .json"
            )
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"--data {path}: cannot be read ({error})") from error


def _lines(stream: IO[bytes], name: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield Row(name, number, lambda line=line: _parse_line(line))


def _parse_line(line: bytes) -> Any:
    """The value is that of one line of JSON.

    Raises:
        ValueError: it is none.
    """
    if 0 in line:
        raise ValueError(NUL_BYTES)
    # A byte order mark may open the first line.
    return parse_json(line.decode("utf-8-sig"))


def _json_rows(stream: IO[bytes], name: str) -> Iterator[Row]:
    """The file is one array, or JSON lines under another name."""
    content = stream.read()
    try:
        rows = parse_json(content.decode("utf-8-sig"))
    except ValueError:
        rows = None
    if isinstance(rows, list):
        for number, row in enumerate(rows):
            yield Row(name, number, lambda row=row: row)
    else:
        yield from _lines(io.BytesIO(content), name)


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in FIELDS]
            if not columns:
                raise UserError(
                    f'--data {path}: no column "messages", "conversations" or the like '
                    f"(it has {', '.join(names)})"
                )
            first = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for row in range(batch.num_rows):
                    content = batch.slice(row, 1)
                    yield Row(
                        path.name, first + row, lambda content=content: content.to_pylist()[0]
                    )
                first += batch.num_rows
    except pyarrow.ArrowException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--data {path}: not a readable parquet file ({reason})") from error


class _HubRows:
    """The rows of a data set are read in its order, and on from a state after an error."""

    def __init__(self, location: str) -> None:
        self._location, self._dataset = location, open_location(location)

    def identity(self) -> State:
        return {"name": self._location}

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[Any, State]]:
        """The iterator gives rows, each with the state to go on after it."""
        del seed, epoch  # The order is the data set's: conversations are shuffled in memory.
        count = state["rows"] if state else 0
        if state:
            self._dataset.load_state_dict(state["stream"])
        for number, row in enumerate(self._dataset, start=count + 1):
            yield row, {"rows": number, "stream": self._dataset.state_dict()}
