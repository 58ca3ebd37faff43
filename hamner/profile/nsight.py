"""Nsight Systems' SQLite export and Nsight Compute's CSV are read as torch-profiler events.

    nsys export --type sqlite report.nsys-rep          kernels, copies, launches, NVTX ranges
    ncu --import report.ncu-rep --csv --page raw       kernels alone, each measured by itself

Torch-free.
"""

import csv
import io
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from hamner.errors import UserError

SQLITE_MAGIC = b"SQLite format 3\0"
_WORK = {
    "CUPTI_ACTIVITY_KIND_KERNEL": ("kernel", "SELECT start, end, correlationId, demangledName"),
    "CUPTI_ACTIVITY_KIND_MEMCPY": ("gpu_memcpy", "SELECT start, end, correlationId, NULL"),
    "CUPTI_ACTIVITY_KIND_MEMSET": ("gpu_memset", "SELECT start, end, correlationId, NULL"),
}
_DURATION = "gpu__time_duration.sum"
_MICROSECONDS = {"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6} | {
    "ns": 1e-3,
    "us": 1.0,
    "ms": 1e3,
    "s": 1e6,
}


def read_systems(path: Path) -> dict:
    """The function reads a Nsight Systems export as a torch-profiler document.

    Raises:
        UserError: the file is not such an export.
    """
    try:
        with sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True) as database:
            events = list(_system_events(database))
            names = _rows(database, "TARGET_INFO_GPU", "SELECT name")
    except sqlite3.Error as error:
        raise UserError(
            f"{path} is not Nsight Systems' export: {error}; "
            "write it with nsys export --type sqlite"
        ) from error
    return {"deviceProperties": [{"name": name} for (name,) in names], "traceEvents": events}


def _system_events(database: sqlite3.Connection) -> Iterator[dict]:
    text = dict(_rows(database, "StringIds", "SELECT id, value"))
    for table, (category, select) in _WORK.items():
        for start, end, correlation, name in _rows(database, table, select):
            yield _event(
                category,
                name=text.get(name, category),
                start=start,
                end=end,
                thread=0,
                correlation=correlation,
            )
    launches = "SELECT start, end, globalTid, correlationId, nameId"
    for start, end, thread, correlation, name in _rows(
        database, "CUPTI_ACTIVITY_KIND_RUNTIME", launches
    ):
        yield _event(
            "cuda_runtime",
            name=text.get(name, ""),
            start=start,
            end=end,
            thread=thread,
            correlation=correlation,
        )
    ranges = "SELECT start, end, globalTid, text, textId"
    for start, end, thread, own, name in _rows(database, "NVTX_EVENTS", ranges):
        if end is not None:  # else a mark
            yield _event(
                "user_annotation",
                name=own or text.get(name, ""),
                start=start,
                end=end,
                thread=thread,
                correlation=None,
            )


def _rows(database: sqlite3.Connection, table: str, select: str) -> list[tuple]:
    """The function reads a table; the export leaves it out where it would be empty."""
    found = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    if database.execute(found, (table,)).fetchone() is None:
        return []
    return database.execute(f"{select} FROM {table}").fetchall()


def _event(category: str, name: str, start: int, end: int, thread: int, correlation) -> dict:
    """The function makes an event; it takes nanoseconds, and the event has microseconds."""
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 0,
        "tid": thread,
        "ts": start / 1e3,
        "dur": (end - start) / 1e3,
        "args": {} if correlation is None else {"correlation": correlation},
    }


def read_compute(path: Path, content: bytes) -> dict:
    """The function reads Nsight Compute's CSV as a torch-profiler document.

    Kernels are measured one by one, so they stand end to end: times add up, gaps are not known.

    Raises:
        ValueError: it is something else.
        UserError: it holds no durations.
    """
    lines = content.decode("utf-8", errors="replace").splitlines()
    # What the profiled program printed comes first.
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise ValueError("no kernels found")
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[head:]))))
    events, now = [], 0
    if rows and _DURATION in rows[0]:
        # One column a metric; the first row has the units.
        scale = _MICROSECONDS.get(rows[0][_DURATION], 1e-3)
        timed = [(row["Kernel Name"], _number(row[_DURATION]) * scale) for row in rows[1:]]
    else:
        timed = [
            (row["Kernel Name"], _number(row["Metric Value"]) * _MICROSECONDS[row["Metric Unit"]])
            for row in rows
            if row.get("Metric Name") in (_DURATION, "Duration")
        ]
    if not timed:
        raise UserError(f"{path} holds no durations: profile with --metrics {_DURATION}")
    for name, microseconds in timed:
        end = now + round(microseconds * 1e3)
        events.append(_event("kernel", name=name, start=now, end=end, thread=0, correlation=None))
        now = end
    return {"traceEvents": events}


def _number(text: str) -> float:
    """The function reads a number with or without separators of thousands."""
    return float(text.replace(",", ""))
