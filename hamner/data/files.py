"""Local files give documents: .txt, .jsonl and .parquet, the first two also compressed.

A file is read in blocks (a row group of parquet, about 4 MiB of text), which are shuffled. Files
whose content is not what their name says are refused when the source is opened; broken rows when
they are met, naming file and row.
"""

import glob
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from hamner.data.documents import TEXT_FIELDS, document_text
from hamner.data.shuffle import State, permutation, shuffled_documents
from hamner.data.tokenizer import END_OF_TEXT
from hamner.errors import UserError
from hamner.files import parse_json

BLOCK_BYTES = 4 * 2**20
#: A text file up to this size is one document; a larger one is cut into documents of about it.
TEXT_DOCUMENT_BYTES = 64 * 2**10
#: A longer line, or row group, is no data but a mistake or an attack: it has to be in memory whole.
MAX_LINE_BYTES = 64 * 2**20
MAX_ROW_GROUP_BYTES = 2**30

#: First bytes of a file by the last part of its name.
MAGIC = {".parquet": b"PAR1", ".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
MAGIC[".zstd"] = MAGIC[".zst"]
COMPRESSED = (".gz", ".zst", ".zstd")
SUPPORTED = ".txt, .jsonl or .parquet (.txt and .jsonl also with .gz, .zst or .zstd)"

_SEPARATOR = re.escape(END_OF_TEXT.encode()) + rb"[ \t\r]*"
#: Where a text may be cut, best first: after a separator line, a blank line, a line.
_CUTS = (
    re.compile(rb"(?:\A|\n)" + _SEPARATOR + rb"\n"),
    re.compile(rb"\n[ \t\r]*\n"),
    re.compile(rb"\n"),
)
_SEPARATOR_LINE = re.compile(rb"(?:\A|(?<=\n))" + _SEPARATOR + rb"(?:\n|\Z)")


class FileSource:
    """A file source gives the documents of a file, a folder or a glob.

    Raises:
        UserError: nothing there, or a file that is not what its name says.
    """

    def __init__(self, location: str) -> None:
        try:
            self._paths = find_files(location)
            self._sizes = [path.stat().st_size for path in self._paths]
            self._files = [_open(path) for path in self._paths]
        except OSError as error:
            raise UserError(f"--data {location}: cannot be read ({error})") from error

    def identity(self) -> State:
        """Names and sizes of the files must not change between saving and resuming."""
        listing = [[p.name, size] for p, size in zip(self._paths, self._sizes, strict=True)]
        return {
            "files": len(listing),
            "bytes": sum(self._sizes),
            "digest": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        }

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The epoch is shuffled; see `shuffled_documents`."""
        return shuffled_documents(self._files, seed, epoch, state)


def find_files(location: str) -> list[Path]:
    path = Path(location).expanduser()
    if path.is_file():
        if _reader(path) is None:
            raise UserError(f"--data {location}: the name of a data file must end in {SUPPORTED}")
        return [path]
    if path.is_dir():
        what, found = "folder", sorted(path.rglob("*"))
    elif glob.has_magic(location):
        # Path.glob takes no absolute pattern.
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207
        what, found = "glob", sorted(map(Path, names))
    else:
        raise UserError(f"--data {location}: no such file or folder")
    paths = [path for path in found if _reader(path) and path.is_file()]
    if not paths:
        raise UserError(f"--data {location}: the {what} has no file that ends in {SUPPORTED}")
    return paths


def _reader(path: Path) -> "type[_ParquetFile | _TextFile] | None":
    """The class reads what the name says; it is None when not ours."""
    is_compressed = path.suffix.lower() in COMPRESSED
    reader = READERS.get(Path(path.stem if is_compressed else path.name).suffix.lower())
    return None if is_compressed and reader is _ParquetFile else reader


def _open(path: Path) -> "_ParquetFile | _TextFile":
    with path.open("rb") as stream:
        head = stream.read(4)
    suffix = path.suffix.lower()
    expected = MAGIC.get(suffix)
    found = next((name for name, magic in MAGIC.items() if head.startswith(magic)), None)
    if expected is not None and not head.startswith(expected):
        raise UserError(f"--data {path}: its content is not {suffix[1:]}, though its name says so")
    if expected is None and found is not None:
        raise UserError(f"--data {path}: its content is {found[1:]}; rename it to end in {found}")
    return _reader(path)(path)


def open_bytes(path: Path) -> IO[bytes]:
    """The stream gives the content of a file, decompressed where the name says so."""
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return path.open("rb")
    if suffix == ".gz":
        return gzip.open(path)
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


class _ParquetFile:
    """A block is a row group; only the text column is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def blocks(self, start: int, *key: int) -> Iterator[Sequence[str]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                field = self._text_field(file.schema_arrow.names)
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                for group in permutation(len(groups), *key)[start:]:
                    if self._size(file.metadata.row_group(group), field) > MAX_ROW_GROUP_BYTES:
                        raise UserError(
                            f"--data {self._path}: a row group of more than "
                            f"{MAX_ROW_GROUP_BYTES // 2**30} GiB; write it with smaller ones"
                        )
                    values = file.read_row_group(group, columns=[field]).column(0)
                    yield self._texts(field, values, first_row=sum(groups[:group]))
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--data {self._path}: not a readable parquet file ({reason})"
            ) from error

    def _size(self, group: Any, field: str) -> int:
        """The size is that of a field in memory (bytes), as the file says."""
        columns = map(group.column, range(group.num_columns))
        return sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.partition(".")[0] == field
        )

    def _text_field(self, names: list[str]) -> str:
        for name in TEXT_FIELDS:
            if name in names:
                return name
        raise UserError(
            f'--data {self._path}: no column "text", "content" or "messages" '
            f"(it has {', '.join(names)})"
        )

    def _texts(self, field: str, values: Any, first_row: int) -> list[str]:
        texts = []
        for row, value in enumerate(values, start=first_row):
            try:
                texts.append(document_text({field: value.as_py()}))
            except ValueError as error:
                reason = str(error)
                if isinstance(error, UnicodeDecodeError):
                    reason = f'"{field}" is not UTF-8 at byte {error.start}'
                raise UserError(f"--data {self._path}, row {row}: {reason}") from error
        return texts


def last_cut(text: bytes) -> int:
    """A text that goes on is cut after its last separator line, else blank line, else line.

    Only the last 32 KiB are searched, lest a cut leave a tiny document. Without any, the cut is
    before the last UTF-8 character, which may be incomplete.
    """
    begin = max(0, len(text) - TEXT_DOCUMENT_BYTES // 2)
    for pattern in _CUTS:
        ends = [match.end() for match in pattern.finditer(text, begin)]
        if ends:
            return ends[-1]
    cut = len(text) - 1
    while cut > begin and (text[cut] & 0xC0) == 0x80:
        cut -= 1
    return cut if cut > begin else len(text)


class _TextFile:
    """A block of plain text is about 4 MiB that end where the text may be cut.

    Uncompressed blocks are read in any order; a compressed file can only be read forward.
    """

    _last_cut = staticmethod(last_cut)

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_compressed = path.suffix.lower() in COMPRESSED

    def blocks(self, start: int, *key: int) -> Iterator[Sequence[str]]:
        shuffled = self._blocks_shuffled(start, *key)
        forward = itertools.islice(self._blocks_forward(), start, None)
        for offset, block in forward if self._is_compressed else shuffled:
            yield self._parse(block, offset)

    def _blocks_shuffled(self, start: int, *key: int) -> Iterator[tuple[int, bytes]]:
        size = self._path.stat().st_size
        count = -(-size // BLOCK_BYTES)
        with self._path.open("rb") as stream:
            for number in permutation(count, *key)[start:]:
                begin = self._cut_after(stream, int(number) * BLOCK_BYTES) if number else 0
                end = self._cut_after(stream, min(int(number + 1) * BLOCK_BYTES, size))
                stream.seek(begin)
                yield begin, stream.read(end - begin)

    def _blocks_forward(self) -> Iterator[tuple[int, bytes]]:
        offset, buffer = 0, b""
        with open_bytes(self._path) as stream:
            while chunk := self._read(stream, BLOCK_BYTES):
                # Only now is it known that the text goes on, so that a small file stays whole.
                cut = self._last_cut(buffer) if len(buffer) >= BLOCK_BYTES else 0
                if cut:
                    yield offset, buffer[:cut]
                elif len(buffer) > MAX_LINE_BYTES:
                    self._refuse_length(offset)
                offset, buffer = offset + cut, buffer[cut:] + chunk
        if buffer:
            yield offset, buffer

    def _read(self, stream: IO[bytes], size: int) -> bytes:
        try:
            return stream.read(size)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"--data {self._path}: damaged compressed file ({error})") from error

    def _cut_after(self, stream: IO[bytes], position: int) -> int:
        """The offset is the first from `position` on at which a block may begin."""
        stream.seek(position)
        return position + self._last_cut(stream.read(TEXT_DOCUMENT_BYTES))

    def _parse(self, block: bytes, offset: int) -> list[str]:
        documents = []
        begin = 0
        for separator in [*_SEPARATOR_LINE.finditer(block), None]:
            end = separator.start() if separator else len(block)
            while end - begin > TEXT_DOCUMENT_BYTES:
                cut = begin + last_cut(block[begin : begin + TEXT_DOCUMENT_BYTES])
                documents.append(self._decode(block[begin:cut], offset + begin))
                begin = cut
            documents.append(self._decode(block[begin:end], offset + begin))
            begin = separator.end() if separator else end
        # Blanks around separators are no documents; a file of blanks is an empty one.
        return [text for text in documents if text.strip()] or documents[:1]

    def _decode(self, text: bytes, offset: int) -> str:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            unpacked = "decompressed " if self._is_compressed else ""
            raise UserError(
                f"--data {self._path}: not UTF-8 at {unpacked}byte {offset + error.start}; "
                "convert it to UTF-8"
            ) from error
        return decoded.removeprefix("\ufeff") if offset == 0 else decoded


class _JsonLinesFile(_TextFile):
    """Blocks of JSON lines end at a line's end, however long the line."""

    def _cut_after(self, stream: IO[bytes], position: int) -> int:
        stream.seek(position - 1)
        if len(stream.readline(MAX_LINE_BYTES + 1)) > MAX_LINE_BYTES:
            self._refuse_length(position)
        return stream.tell()

    def _last_cut(self, text: bytes) -> int:
        return text.rfind(b"\n") + 1

    def _parse(self, block: bytes, offset: int) -> list[str]:
        documents = []
        begin = 0
        for line in io.BytesIO(block):
            text = self._decode(line, offset + begin)
            if text.strip():
                try:
                    documents.append(document_text(parse_json(text)))
                except json.JSONDecodeError as error:
                    self._refuse(offset + begin, f"not JSON ({error.msg})", error)
                except ValueError as error:
                    self._refuse(offset + begin, str(error), error)
            begin += len(line)
        return documents

    def _refuse_length(self, offset: int) -> None:
        raise UserError(
            f"--data {self._path}: a line of more than {MAX_LINE_BYTES // 2**20} MiB at byte "
            f"{offset:,}; JSON lines have one document a line"
        )

    def _refuse(self, offset: int, message: str, error: Exception) -> None:
        """The error names the line, counted only now: blocks are read in any order."""
        with open_bytes(self._path) as stream:
            line = self._read(stream, offset).count(b"\n") + 1
        raise UserError(f"--data {self._path}, line {line}: {message}") from error


READERS = {".txt": _TextFile, ".jsonl": _JsonLinesFile, ".parquet": _ParquetFile}
