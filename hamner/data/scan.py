"""A file with a bad row is looked through once, so that all its bad rows are known and it can be
known again when they have been mended or removed.

Then the order of its documents stays that of the file as it was, so that a run goes on exactly.
"""

import hashlib
import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from hamner.data.bad_rows import BadRow, kind_of
from hamner.data.shuffle import State, check_counts, permutation

#: Bad rows of a file that are listed one by one; a file with more cannot be known again.
MAX_LISTED = 10_000
#: After so many bad rows, and no more good ones, a file is looked through no further.
GIVE_UP_AFTER = 1_000

Row = str | BadRow | None
"""a document, or no document; None is a row that went"""


class RowFile(Protocol):
    """A file is read in blocks of rows, in any order unless it can only be read forward."""

    is_forward: bool

    def read(self, numbers: Sequence[int] | None) -> Iterator[Sequence[Row]]:
        """The blocks come in the order of their numbers; None is all, the one way forward."""

    def locate(self, bad: Sequence[BadRow]) -> list[str]:
        """Where bad rows are, for people; they come in the order of the file."""


@dataclass(frozen=True)
class ListedRow:
    """A bad row of a scan.

    Attributes:
        row: its number in the file.
        location: for people, such as "line 41".
        reason: as of `BadRow`.
        next: digest of the next document.
    """

    row: int
    location: str
    reason: str
    next: str = ""

    @property
    def kind(self) -> str:
        return kind_of(self.reason)


@dataclass(frozen=True)
class Scan:
    """A scan is what a file held, without its text.

    Attributes:
        size: of the file, bytes.
        blocks: rows of each block, bad ones included.
        kinds: bad rows of each kind.
        bad: those that are listed.
        digest: of all documents; empty where the file cannot be known again.
        is_whole: not where the scan was given up.
    """

    size: int
    blocks: list[int]
    kinds: dict[str, int]
    bad: list[ListedRow]
    digest: str
    is_whole: bool = True

    @property
    def rows(self) -> int:
        return sum(self.blocks)

    def to_json(self) -> State:
        return asdict(self)

    @classmethod
    def from_json(cls, state: State) -> "Scan":
        """The scan is read back.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: it is none.
        """
        check_counts(state, "size")
        check_counts(state["kinds"], *state["kinds"])
        check_counts(dict(enumerate(state["blocks"])), *range(len(state["blocks"])))
        bad = [ListedRow(**listed) for listed in state["bad"]]
        check_counts({listed.row: listed.row for listed in bad}, *(listed.row for listed in bad))
        if not all(isinstance(s, str) for b in bad for s in (b.location, b.reason, b.next)):
            raise TypeError("a bad row that is none")
        return cls(**{**state, "bad": bad})


def digest_of(text: str) -> str:
    """The digest tells documents apart."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def scan(file: RowFile, size: int, share: float) -> Scan:
    """The function looks through a file; it gives up where nearly every row is bad.

    Raises:
        UserError: the file cannot be read to its end.
    """
    blocks: list[int] = []
    kinds: Counter[str] = Counter()
    found: list[tuple[int, BadRow]] = []
    following: list[str] = []
    total, row, is_whole = hashlib.sha256(), 0, True
    for block in file.read(None):
        for value in block:
            if isinstance(value, BadRow):
                kinds[value.kind] += 1
                if len(found) < MAX_LISTED:
                    found.append((row, value))
            elif value is not None:
                digest = digest_of(value)
                following += [digest] * (len(found) - len(following))
                total.update(digest.encode())
            row += 1
        blocks.append(len(block))
        if kinds.total() > max(GIVE_UP_AFTER, row * max(share, 0.5)):
            is_whole = False
            break
    following += [""] * (len(found) - len(following))
    locations = file.locate([bad for _, bad in found])
    listed = [
        ListedRow(number, location, bad.reason, digest)
        for (number, bad), location, digest in zip(found, locations, following, strict=True)
    ]
    digest = total.hexdigest() if is_whole and kinds.total() == len(listed) else ""
    return Scan(size, blocks, dict(kinds), bad=listed, digest=digest, is_whole=is_whole)


def share_of_rows(blocks: Sequence[int], position: tuple[int, int], *key: int) -> float:
    """The function gives the share of a file's rows that an epoch has read.

    Args:
        blocks: rows of each.
        position: number of the block in the epoch's order, and rows read of it.
        key: of the order.
    """
    block, row = position
    before = sum(blocks[number] for number in permutation(len(blocks), *key)[:block])
    return min(1.0, (before + row) / max(1, sum(blocks)))


class MendedFile:
    """A mended file is read in the blocks that it had before, those rows empty that went.

    Args:
        file: as it is now.
        before: what it held.
        removed: numbers that rows had which are gone, sorted.
        blocks: rows of each block now.
    """

    def __init__(
        self, file: RowFile, before: Scan, removed: Sequence[int], blocks: Sequence[int]
    ) -> None:
        self._file, self._before, self._removed = file, before, removed
        self._starts = [0, *itertools.accumulate(before.blocks)]
        self._starts_now = [0, *itertools.accumulate(blocks)]

    def share(self, position: tuple[int, int], *key: int) -> float:
        """The share is that before a position; see `share_of_rows`."""
        return share_of_rows(self._before.blocks, position, *key)

    def blocks(self, start: int, *key: int) -> Iterator[Sequence[Row]]:
        """The blocks come in the order that they had; see `BlockFile`."""
        count = len(self._before.blocks)
        if self._file.is_forward:
            rows = itertools.chain.from_iterable(self._file.read(None))
            rows = itertools.islice(rows, self._now(self._starts[start]), None)
            for number in range(start, count):
                yield self._spread(number, rows)
            return
        for number in permutation(count, *key)[start:]:
            begin, end = (self._now(self._starts[n]) for n in (number, number + 1))
            first = max(0, bisect_left(self._starts_now, begin + 1) - 1)
            last = bisect_left(self._starts_now, end)
            rows = itertools.chain.from_iterable(self._file.read(range(first, last)))
            yield self._spread(
                number, itertools.islice(rows, begin - self._starts_now[first], None)
            )

    def _now(self, row: int) -> int:
        """The number of the row, or of the first one after it that is still there."""
        return row - bisect_left(self._removed, row)

    def _spread(self, number: int, rows: Iterator[Row]) -> list[Row]:
        begin, end = self._starts[number], self._starts[number + 1]
        gone = set(
            self._removed[bisect_left(self._removed, begin) : bisect_left(self._removed, end)]
        )
        return [None if row in gone else next(rows) for row in range(begin, end)]


def mended(file: RowFile, before: Scan) -> MendedFile | None:
    """The function knows a file again of which only bad rows were mended or went; None else.

    Raises:
        UserError: the file cannot be read to its end.
    """
    if not before.digest:
        return None
    blocks: list[int] = []

    def read() -> Iterator[Row]:
        for block in file.read(None):
            blocks.append(len(block))
            yield from block

    end = object()
    rows, bad = read(), {listed.row: listed.next for listed in before.bad}
    removed: list[int] = []
    total = hashlib.sha256()
    value = next(rows, end)
    for row in range(before.rows):
        if row in bad and (value is end or _is_document(value, bad[row])):
            removed.append(row)
            continue
        if row not in bad:
            if not isinstance(value, str):
                return None
            total.update(digest_of(value).encode())
        value = next(rows, end)
    if value is not end or total.hexdigest() != before.digest:
        return None
    return MendedFile(file, before, removed, blocks)


def _is_document(value: object, digest: str) -> bool:
    return isinstance(value, str) and digest_of(value) == digest
