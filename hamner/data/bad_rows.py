"""Rows that hold no document are passed over, up to a share of their source, and counted."""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from hamner.config.train import TrainConfig
from hamner.data.shuffle import State
from hamner.errors import UserError
from hamner.files import made_whole, read_json

logger = logging.getLogger(__name__)

#: The share of a source's rows that may be bad, unless `--bad-rows` says another.
DEFAULT_SHARE: float = TrainConfig.bad_rows
#: Bad rows of a kind whose location a sentence names.
NAMED = 3

Counts = dict[str, dict[str, int]]
"""the number of bad rows by file and kind"""
Locations = Mapping[tuple[str, str], Sequence[str]]
"""where bad rows are, by file and kind"""
NOWHERE: Locations = MappingProxyType({})


class TooManyBadRows(UserError):
    """More rows of a source are bad than may be: its content is to be mended, not passed over."""


@dataclass(frozen=True)
class BadRow:
    """A bad row stands in a block for a row without a document.

    Attributes:
        path: of its file.
        offset: where it is in the file: a byte, or in parquet a row.
        reason: half a sentence that says what is wrong, the particulars in brackets at its end.
    """

    path: str
    offset: int
    reason: str

    @property
    def kind(self) -> str:
        return kind_of(self.reason)


def kind_of(reason: str) -> str:
    """The kind is the reason without its particulars."""
    return re.sub(r" \(.*\)$", "", reason, flags=re.DOTALL)


@dataclass
class BadRows:
    """The bad rows of a source are counted, and judged by the share that may be.

    Attributes:
        name: of the source, as the user wrote it.
        share: that may be bad.
        record: JSON that the source finds again at the next start of the run.
        counts: so far, those of earlier starts included.
        is_changed: whether `record` has changed since it was written.
    """

    name: str
    share: float = DEFAULT_SHARE
    record: State = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)
    is_changed: bool = False

    def keep(self, record: State, counts: Counts) -> None:
        """Both replace what there was; another thread may be reading them."""
        self.record, self.counts, self.is_changed = record, counts, True

    def judge(
        self, rows: float, first: str, locations: Locations = NOWHERE, assumed: int = 0
    ) -> str:
        """The rows counted may be bad, or are too many.

        Args:
            rows: of the source, as far as is known.
            first: where one of them is, and what is wrong with it.
            locations: of all that are known.
            assumed: rows that the source is taken to have where there are fewer as yet.

        Returns:
            A sentence that says how many there are, for a warning.

        Raises:
            TooManyBadRows: names the first one and counts all.
        """
        bad = sum(sum(kinds.values()) for kinds in self.counts.values())
        shown = f"{bad:,} of {rows:,.0f} rows cannot be used"
        if bad > 1:
            shown += f" ({listing_of(self.counts, locations)})"
        if bad > self.share * max(rows, assumed):
            raise TooManyBadRows(
                f"--data {first}; {shown}, more than the share of --bad-rows "
                f"{self.share:g}: mend or remove them, or raise it, and go on from here"
            )
        # Short, as a `UserError` is.
        return str(UserError(f"--data {first}; {shown} and are passed over"))


def listing_of(counts: Counts, locations: Locations) -> str:
    """The listing says how many bad rows of each kind each file has, and where the first are."""
    parts = []
    for file, kinds in counts.items():
        found = []
        for kind, count in kinds.items():
            where = list(locations.get((file, kind), ()))[:NAMED]
            where += ["..."] if where and count > NAMED else []
            found.append(f"{count:,} {kind}" + (f" ({', '.join(where)})" if where else ""))
        parts.append(f"{file}: {', '.join(found)}")
    return "; ".join(parts)


def lines_of(counts: Iterable[Counts], path: Path) -> list[str]:
    """The lines count the rows of each source that were passed over, and say where the list is."""
    lines = [
        f"passed over in {file}: {count:,} {kind}"
        for files in counts
        for file, kinds in files.items()
        for kind, count in kinds.items()
    ]
    return [*lines, f"these rows are listed in {path}"] if lines else []


class BadRowsFile:
    """The file of a run lists the bad rows of its sources; there is none as long as none is met.

    Args:
        path: of the file, None for what is no run.
        share: that may be bad.
    """

    def __init__(self, path: Path | None, share: float) -> None:
        self._path, self._share = path, share
        self._sources: dict[str, BadRows] = {}
        self._before: State = {}
        if path is not None and path.exists():
            try:
                self._before = read_json(path)
            except UserError as error:
                logger.warning("%s; bad rows are counted anew", error)

    def of(self, name: str) -> BadRows:
        """The bad rows are those of one source, with what was recorded at earlier starts."""
        record = self._before.get(name)
        record = record if isinstance(record, dict) else {}
        self._sources[name] = BadRows(name, self._share, record)
        return self._sources[name]

    def counts(self) -> dict[str, Counts]:
        """The counts are by source; there are none of a source without bad rows."""
        return {name: source.counts for name, source in self._sources.items() if source.counts}

    def write(self) -> None:
        """The file is written if there is something new, and its folder is there."""
        changed = [source for source in self._sources.values() if source.is_changed]
        if not changed or self._path is None or not self._path.parent.is_dir():
            return
        records = {s.name: s.record for s in self._sources.values() if s.record}
        try:
            with made_whole(self._path) as temporary:
                temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self._path, error.strerror)
            return
        for source in changed:
            source.is_changed = False
