"""Local files give documents: .txt, .jsonl and .parquet, the first two also compressed.

A file is read in blocks (a row group of parquet, about 4 MiB of text), which are shuffled. Files
whose content is not what their name says are refused when the source is opened; rows that hold no
document stand in their block as a `BadRow`.
"""

import codecs
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.filesize import decimal

from hamner.data.bad_rows import BadRow, BadRows, Counts
from hamner.data.documents import TEXT_FIELDS, Extent, document_text
from hamner.data.find import COMPRESSED, data_format, find_files
from hamner.data.scan import MendedFile, Row, Scan, mended, scan, share_of_rows
from hamner.data.shuffle import State, permutation, shuffled_documents
from hamner.data.tokenizer import END_OF_TEXT
from hamner.errors import UserError
from hamner.files import parse_json

logger = logging.getLogger(__name__)

BLOCK_BYTES = 4 * 2**20
#: A text file up to this size is one document; a larger one is cut into documents of about it.
TEXT_DOCUMENT_BYTES = 64 * 2**10
#: A longer line, or row group, is no data but a mistake or an attack: it has to be in memory whole.
MAX_LINE_BYTES = 64 * 2**20
MAX_ROW_GROUP_BYTES = 2**30

#: With the first bad row of a source, so much of it is looked through for others (bytes on disk),
#: beside the files that are known to have any.
SCAN_BYTES = 2 * 2**30

#: First bytes of a file by the last part of its name; zstd may begin with a skippable frame.
MAGIC = {
    ".parquet": re.compile(rb"PAR1"),
    ".gz": re.compile(rb"\x1f\x8b"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
MAGIC[".zstd"] = MAGIC[".zst"]
#: Encodings whose text is UTF-8 with NUL bytes where it is ASCII, and the marks it may begin with.
WIDE_ENCODINGS = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
WIDE_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32"}
WIDE_MARKS |= {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
WIDE_HEAD_BYTES = 4096
NOT_UTF_8 = "not UTF-8 (convert the file to UTF-8, such as with iconv)"
NUL_BYTES = "holds NUL bytes, as binary files and those of a crash do"

_SEPARATOR = re.escape(END_OF_TEXT.encode()) + rb"[ \t\r]*"
#: Where a text may be cut, best first: after a separator line, a blank line, a line.
_CUTS = (
    re.compile(rb"(?:\A|\n)" + _SEPARATOR + rb"\n"),
    re.compile(rb"\n[ \t\r]*\n"),
    re.compile(rb"\n"),
)
_SEPARATOR_LINE = re.compile(rb"(?:\A|(?<=\n))" + _SEPARATOR + rb"(?:\n|\Z)")


class FileChanged(Exception):
    """The exception says that a file is no longer the one that was opened; it may be put back."""


class FileSource:
    """A file source gives the documents of a file, a folder or a glob.

    Bad rows are passed over, up to a share. With the first one that is met in a file it is looked
    through, and so are other files as far as `SCAN_BYTES` go: all are counted and listed at once,
    and the share does not depend on the order. Files in which only bad rows were mended or removed
    since then are read in the order that they had, so a run goes on exactly.

    Args:
        location: see `find_files`.
        bad_rows: counts them.

    Raises:
        UserError: nothing there, or a file that is not what its name says.
    """

    def __init__(self, location: str, bad_rows: BadRows | None = None) -> None:
        self._bad_rows = bad_rows or BadRows(location)
        self._judged: set[int] = set()
        """numbers of the files that were looked through since the start"""
        self._spare_bytes = SCAN_BYTES
        """that may still be looked through beside files with a bad row"""
        self._grown: set[int] = set()
        """numbers of the files that were warned of"""
        self._scans: dict[int, Scan] = {}
        self._layouts: dict[int, Scan] = {}
        """what mended files held before"""
        try:
            self._paths = find_files(location)
            self._numbers = {str(path): number for number, path in enumerate(self._paths)}
            self._sizes = [path.stat().st_size for path in self._paths]
            self._readers = [_open(path) for path in self._paths]
            self._files: list[_TextFile | _ParquetFile | MendedFile] = list(self._readers)
            self._identity, self._sizes_before = _identity(self._paths, self._sizes), self._sizes
            self._recall(self._bad_rows.record)
        except OSError as error:
            raise UserError(f"--data {location}: cannot be read ({error})") from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            logger.warning("--data %s: the list of its bad rows is damaged", location)

    def identity(self) -> State:
        """Names and sizes of the files must not change between saving and resuming."""
        return self._identity

    def extent(self, seed: int, epoch: int, state: State | None) -> Extent:
        """The extent counts bytes of whole files, and the share read of the file under way."""
        done, total = 0.0, float(sum(self._sizes))
        if state is not None:
            number, order = state["file"], permutation(len(self._files), seed, epoch)
            done = float(sum(self._sizes[n] for n in order[:number]))
            where = state["block"], state["row"]
            share = self._files[order[number]].share(where, seed, epoch, number)
            done += self._sizes[order[number]] * share
        return Extent(done, total, "bytes")

    def documents(self, seed: int, epoch: int, state: State | None) -> Iterator[tuple[str, State]]:
        """The epoch is shuffled; see `shuffled_documents`.

        Raises:
            TooManyBadRows: more than their share.
            FileChanged: a file is another one by now, or was cut short.
            OSError: it cannot be read.
        """
        files = [
            _JudgedFile(file, self._look_through, partial(self._require_unchanged, number))
            for number, file in enumerate(self._files)
        ]
        for row, after in shuffled_documents(files, seed, epoch, state):
            if isinstance(row, str):
                yield row, after

    def _require_unchanged(self, number: int) -> None:
        """A file has the size that it had at the start, or is text that has grown since."""
        path, before = self._paths[number], self._sizes[number]
        size = path.stat().st_size
        if size < before or (size != before and data_format(path) == ".parquet"):
            raise FileChanged(f"{path} has {size:,} bytes, and had {before:,} at the start")
        if size != before and number not in self._grown:
            self._grown.add(number)
            logger.warning(
                "--data %s: has grown from %s to %s bytes since the start; --resume will take it "
                "for other data",
                path,
                f"{before:,}",
                f"{size:,}",
            )

    def _look_through(self, met: BadRow) -> None:
        """The file of a bad row is looked through unless it was, and all bad rows are judged."""
        number = self._numbers[met.path]
        if number in self._judged:
            return
        if self._sizes[number] > SCAN_BYTES:
            logger.warning(
                "--data %s: has a bad row, so all of its %s are looked through now, for minutes",
                met.path,
                decimal(self._sizes[number]),
            )
        for other in sorted({*range(len(self._paths))} - self._judged, key=lambda n: n != number):
            if other != number:
                if self._sizes[other] > self._spare_bytes:
                    break
                self._spare_bytes -= self._sizes[other]
            try:
                found = scan(self._readers[other], self._sizes[other], self._bad_rows.share)
            except UserError:
                if other == number:
                    raise
                continue  # said when its turn comes
            self._judged.add(other)
            self._scans[other] = found
        self._keep()
        scans = [self._scans[n] for n in self._judged]
        seen = sum(scan.size for scan in scans)
        rows = sum(scan.rows for scan in scans) * sum(self._sizes) / max(1, seen)
        if not self._scans[number].is_whole:  # a wrong file, whatever others hold
            rows = self._scans[number].rows
        listed = self._scans[number].bad[0]
        locations: dict[tuple[str, str], list[str]] = {}
        for n, found in self._scans.items():
            for bad in found.bad:
                locations.setdefault((str(self._paths[n]), bad.kind), []).append(bad.location)
        first = f"{met.path}, {listed.location}: {listed.reason}"
        logger.warning("%s", self._bad_rows.judge(rows, first, locations))

    def _keep(self) -> None:
        """What is known of the files is recorded for the next start."""
        record = {
            "identity": self._identity,
            "sizes": self._sizes_before,
            "files": self._to_json(self._scans),
            "before": self._to_json(self._layouts),
        }
        self._bad_rows.keep(record, self._counts())

    def _to_json(self, scans: dict[int, Scan]) -> State:
        return {
            str(self._paths[number]): {"number": number, **scan.to_json()}
            for number, scan in sorted(scans.items())
            if scan.bad
        }

    def _counts(self) -> Counts:
        return {
            str(self._paths[number]): dict(scan.kinds)
            for number, scan in sorted(self._scans.items())
            if scan.kinds
        }

    def _recall(self, record: State) -> None:
        """What an earlier start has recorded is taken over, if these are the files, or were.

        Raises:
            AttributeError, IndexError, KeyError, TypeError, ValueError: the record is damaged.
        """
        if not record:
            return
        sizes = record["sizes"]
        if len(sizes) != len(self._paths) or record["identity"] != _identity(self._paths, sizes):
            return
        scans, layouts = (_from_json(record[key], self._sizes) for key in ("files", "before"))
        changed = [n for n, size in enumerate(self._sizes) if sizes[n] != size]
        files = list(self._files)
        for number in changed:
            before = layouts.get(number) or scans.get(number)
            if before is None or before.size != sizes[number]:
                return
            file = mended(self._readers[number], before)
            if file is None:
                return
            files[number], layouts[number] = file, before
        if changed:
            names = ", ".join(str(self._paths[number]) for number in changed)
            logger.warning("--data %s: only bad rows were mended or went", names)
        self._files, self._layouts = files, layouts
        self._identity, self._sizes_before = record["identity"], sizes
        self._scans = {n: scan for n, scan in scans.items() if scan.size == self._sizes[n]}
        self._bad_rows.counts = self._counts()


@dataclass(frozen=True)
class _JudgedFile:
    """A file says which bad row a block has, before it gives the block, and that it is the one
    that was opened."""

    file: "_TextFile | _ParquetFile | MendedFile"
    met: Callable[[BadRow], None]
    require_unchanged: Callable[[], None]

    def blocks(self, start: int, *key: int) -> Iterator[Sequence[Row]]:
        """The blocks are those of the file; see `BlockFile`."""
        self.require_unchanged()
        try:
            for block in self.file.blocks(start, *key):
                bad = next((row for row in block if isinstance(row, BadRow)), None)
                if bad is not None:
                    self.met(bad)
                yield block
        except UserError:
            self.require_unchanged()  # else nothing is wrong with what was opened
            raise


def _identity(paths: Sequence[Path], sizes: Sequence[int]) -> State:
    listing = [[path.name, size] for path, size in zip(paths, sizes, strict=True)]
    return {
        "files": len(listing),
        "bytes": sum(sizes),
        "digest": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
    }


def _from_json(files: State, sizes: Sequence[int]) -> dict[int, Scan]:
    """The scans are read back by the numbers of their files.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: they are none.
    """
    scans = {}
    for state in files.values():
        number = state["number"]
        if type(number) is not int or not 0 <= number < len(sizes):
            raise ValueError(f"file {number!r}")
        scans[number] = Scan.from_json({k: v for k, v in state.items() if k != "number"})
    return scans


def _open(path: Path) -> "_ParquetFile | _TextFile":
    check_content(path)
    reader = READERS[data_format(path)](path)
    if isinstance(reader, _ParquetFile):
        reader.check()
    return reader


def check_content(path: Path) -> None:
    """The function refuses a file whose content is another than its name says.

    That is one compressed otherwise, and text of UTF-16 or UTF-32, which may be UTF-8 with NUL
    bytes too.

    Raises:
        UserError: says what it is, or what is wrong with a compressed file.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        head = stream.read(4)
    suffix = path.suffix.lower()
    expected = MAGIC.get(suffix)
    found = next((name for name, magic in MAGIC.items() if magic.match(head)), None)
    if expected is not None and not expected.match(head):
        raise UserError(f"--data {path}: its content is not {suffix[1:]}, though its name says so")
    if expected is None and found is not None:
        raise UserError(f"--data {path}: its content is {found[1:]}; rename it to end in {found}")
    if suffix != ".parquet" and (encoding := _wide_encoding(path)):
        raise UserError(
            f"--data {path}: is {encoding[:6]}, not UTF-8; convert it, such as with "
            f"iconv -f {encoding} -t UTF-8"
        )


def _wide_encoding(path: Path) -> str | None:
    """The name is that of the text's encoding, if it is UTF-16 or UTF-32."""
    with open_bytes(path) as stream:
        head = _read(path, stream, WIDE_HEAD_BYTES)
    marked = next((name for mark, name in WIDE_MARKS.items() if head.startswith(mark)), None)
    for encoding in WIDE_ENCODINGS if 0 in head and marked is None else ():
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(head)
        except UnicodeDecodeError:
            continue
        # Taken for UTF-16, ASCII is Chinese.
        if text and "\0" not in text and sum(c < "\u2e80" for c in text) >= 0.9 * len(text):
            return encoding
    return marked


def _read(path: Path, stream: IO[bytes], size: int) -> bytes:
    try:
        return stream.read(size)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if is_of_system(error):
            raise
        raise UserError(f"--data {path}: damaged compressed file ({error})") from error


def is_of_system(error: Exception) -> bool:
    """The answer is whether the disk or network failed, which may pass; it does not say that the
    content of a file is wrong."""
    return isinstance(error, OSError) and error.errno is not None


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

    is_forward = False

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self) -> None:
        """The function refuses a file without text before others are read for hours.

        Raises:
            UserError: it has no column of text, or is not readable.
        """
        with self._opened() as file:
            self._text_field(file.schema_arrow.names)
            groups = range(file.num_row_groups)
            self._group_rows = [file.metadata.row_group(i).num_rows for i in groups]

    def share(self, position: tuple[int, int], *key: int) -> float:
        return share_of_rows(self._group_rows, position, *key)

    def blocks(self, start: int, *key: int) -> Iterator[Sequence[Row]]:
        with self._opened() as file:
            yield from self._blocks(file, permutation(file.num_row_groups, *key)[start:])

    def read(self, numbers: Sequence[int] | None) -> Iterator[Sequence[Row]]:
        """The blocks come in the order of their numbers; None is all of them."""
        with self._opened() as file:
            yield from self._blocks(
                file, range(file.num_row_groups) if numbers is None else numbers
            )

    def locate(self, bad: Sequence[BadRow]) -> list[str]:
        return [f"row {row.offset}" for row in bad]

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            if is_of_system(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--data {self._path}: not a readable parquet file ({reason})"
            ) from error

    def _blocks(self, file: Any, numbers: Sequence[int]) -> Iterator[list[Row]]:
        field = self._text_field(file.schema_arrow.names)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        for group in map(int, numbers):
            if self._size(file.metadata.row_group(group), field) > MAX_ROW_GROUP_BYTES:
                raise UserError(
                    f"--data {self._path}: a row group of more than "
                    f"{MAX_ROW_GROUP_BYTES // 2**30} GiB; write it with smaller ones"
                )
            values = file.read_row_group(group, columns=[field]).column(0)
            yield self._rows(field, values, first_row=sum(groups[:group]))

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

    def _rows(self, field: str, values: Any, first_row: int) -> list[Row]:
        rows: list[Row] = []
        for number, value in enumerate(values, start=first_row):
            try:
                rows.append(document_text({field: value.as_py()}))
            except ValueError as error:
                reason = str(error)
                if isinstance(error, UnicodeDecodeError):
                    reason = f'"{field}" is not UTF-8'
                rows.append(BadRow(str(self._path), number, reason))
        return rows


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

    Uncompressed blocks are read in any order, up to the size that the file has now; a compressed
    file can only be read forward.
    """

    _last_cut = staticmethod(last_cut)

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, path.stat().st_size
        self.is_forward = path.suffix.lower() in COMPRESSED

    def blocks(self, start: int, *key: int) -> Iterator[Sequence[Row]]:
        if self.is_forward:
            found = itertools.islice(self._blocks_forward(), start, None)
        else:
            found = self._blocks_at(permutation(self._count(), *key)[start:])
        for offset, block in found:
            yield self._parse(block, offset)

    def read(self, numbers: Sequence[int] | None) -> Iterator[Sequence[Row]]:
        """The blocks come in the order of their numbers; None is all of them."""
        if self.is_forward:
            found = self._blocks_forward()
        else:
            found = self._blocks_at(range(self._count()) if numbers is None else numbers)
        for offset, block in found:
            yield self._parse(block, offset)

    def locate(self, bad: Sequence[BadRow]) -> list[str]:
        unpacked = "decompressed " if self.is_forward else ""
        return [f"{unpacked}byte {row.offset:,}" for row in bad]

    def share(self, position: tuple[int, int], *key: int) -> float:
        """Whole blocks count; 0 where only reading would tell their number."""
        block, _ = position
        return 0.0 if self.is_forward else min(1.0, block / max(1, self._count()))

    def _count(self) -> int:
        return -(-self._size // BLOCK_BYTES)

    def _blocks_at(self, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as stream:
            for number in numbers:
                begin = self._cut_after(stream, int(number) * BLOCK_BYTES) if number else 0
                end = self._cut_after(stream, min(int(number + 1) * BLOCK_BYTES, self._size))
                stream.seek(begin)
                block = stream.read(end - begin)
                if len(block) < end - begin:
                    raise FileChanged(f"{self._path} was cut short while it is read")
                yield begin, block

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
        return _read(self._path, stream, size)

    def _cut_after(self, stream: IO[bytes], position: int) -> int:
        """The offset is the first from `position` on at which a block may begin; what was written
        behind the end since the start does not count."""
        stream.seek(position)
        following = stream.read(min(TEXT_DOCUMENT_BYTES, self._size - position))
        return position + self._last_cut(following)

    def _parse(self, block: bytes, offset: int) -> list[Row]:
        rows: list[Row] = []
        begin = 0
        for separator in [*_SEPARATOR_LINE.finditer(block), None]:
            end = separator.start() if separator else len(block)
            while end - begin > TEXT_DOCUMENT_BYTES:
                cut = begin + last_cut(block[begin : begin + TEXT_DOCUMENT_BYTES])
                rows.append(self._decode(block[begin:cut], offset + begin))
                begin = cut
            rows.append(self._decode(block[begin:end], offset + begin))
            begin = separator.end() if separator else end
        # Blanks around separators are no documents; a file of blanks is an empty one.
        return [row for row in rows if isinstance(row, BadRow) or row.strip()] or rows[:1]

    def _decode(self, text: bytes, offset: int) -> str | BadRow:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            return BadRow(str(self._path), offset + error.start, NOT_UTF_8)
        if "\0" in decoded:
            return BadRow(str(self._path), offset + text.index(0), NUL_BYTES)
        return decoded.removeprefix("\ufeff") if offset == 0 else decoded


class _JsonLinesFile(_TextFile):
    """Blocks of JSON lines end at a line's end, however long the line."""

    def _cut_after(self, stream: IO[bytes], position: int) -> int:
        stream.seek(position - 1)
        if len(stream.readline(MAX_LINE_BYTES + 1)) > MAX_LINE_BYTES:
            self._refuse_length(position)
        return min(stream.tell(), self._size)

    def _last_cut(self, text: bytes) -> int:
        return text.rfind(b"\n") + 1

    def _parse(self, block: bytes, offset: int) -> list[Row]:
        rows: list[Row] = []
        begin = offset
        for line in io.BytesIO(block):
            text = self._decode(line, begin)
            if isinstance(text, BadRow):
                rows.append(replace(text, offset=begin))
            elif text.strip():
                rows.append(self._document(text, begin))
            begin += len(line)
        return rows

    def _document(self, line: str, offset: int) -> str | BadRow:
        try:
            return document_text(parse_json(line))
        except json.JSONDecodeError as error:
            reason = f"not JSON ({error.msg})"
        except ValueError as error:
            reason = str(error)
            if reason.startswith("Exceeds the limit"):
                reason = "holds a number of too many digits"
        return BadRow(str(self._path), offset, reason)

    def locate(self, bad: Sequence[BadRow]) -> list[str]:
        """The lines are counted only now: blocks are read in any order."""
        found: list[str] = []
        lines = offset = 0
        with open_bytes(self._path) as stream:
            for row in bad:
                while offset < row.offset:
                    chunk = self._read(stream, min(BLOCK_BYTES, row.offset - offset))
                    lines, offset = lines + chunk.count(b"\n"), offset + len(chunk)
                    if not chunk:
                        break
                found.append(f"line {lines + 1}")
        return found

    def _refuse_length(self, offset: int) -> None:
        raise UserError(
            f"--data {self._path}: a line of more than {MAX_LINE_BYTES // 2**20} MiB at byte "
            f"{offset:,}; JSON lines have one document a line"
        )


READERS = {".txt": _TextFile, ".jsonl": _JsonLinesFile, ".parquet": _ParquetFile}
