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
_TABLES = {
    "CUPTI_ACTIVITY_KIND_KERNEL": ("kernel", "0, correlationId, demangledName, NULL"),
    "CUPTI_ACTIVITY_KIND_MEMCPY": ("gpu_memcpy", "0, correlationId, NULL, NULL"),
    "CUPTI_ACTIVITY_KIND_MEMSET": ("gpu_memset", "0, correlationId, NULL, NULL"),
    "CUPTI_ACTIVITY_KIND_RUNTIME": ("cuda_runtime", "globalTid, correlationId, nameId, NULL"),
    "NVTX_EVENTS": ("user_annotation", "globalTid, NULL, textId, text"),
}
"""category; the columns for thread, launch, name (a number of StringIds) and text of its own"""
_DURATION = "gpu__time_duration.sum"
_MICROSECONDS = {"nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6}
_MICROSECONDS |= {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}


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
    for table, (category, columns) in _TABLES.items():
        rows = _rows(database, table, f"SELECT start, end, {columns}")
        for start, end, thread, correlation, name, own in rows:
            if end is not None:  # else a mark
                named = own or text.get(name, category)
                yield _event(category, named, start, end, thread=thread, correlation=correlation)


def _rows(database: sqlite3.Connection, table: str, select: str) -> list[tuple]:
    """The function reads a table; the export leaves it out where it would be empty."""
    found = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    if database.execute(found, (table,)).fetchone() is None:
        return []
    return database.execute(f"{select} FROM {table}").fetchall()


def _event(
    category: str, name: str, start: int, end: int, thread: int = 0, correlation: int | None = None
) -> dict:
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
        events.append(_event("kernel", name, now, end))
        now = end
    return {"traceEvents": events}


def _number(text: str) -> float:
    """The function reads a number with or without separators of thousands."""
    return float(text.replace(",", ""))
