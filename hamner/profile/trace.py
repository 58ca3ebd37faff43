"""The module reads a step's trace: what the GPU ran, what launched it, what memory it took.

The format is that of `torch.profiler` (Kineto's Chrome trace, JSON, gzipped or not), whoever wrote
it; `nsight` brings Nsight's formats into it. Torch-free.

    CPU thread    ProfilerStep > range > operation > ... > launch call --correlation--> GPU event

Times are microseconds on one clock, the CPU's and the GPU's alike.
"""

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path

from hamner.errors import UserError
from hamner.files import refuse_pipe
from hamner.profile import nsight

METADATA_KEY = "hamner"
"""top-level key under which a capture of ours says what it traced"""
STEP_NAME = re.compile(r"ProfilerStep#\d+")
PHASES = ("data", "forward", "backward", "graph", "accumulate", "optimizer")
"""annotations that a capture of ours divides a step into; "graph" is forward and backward in one"""

_RANGES = ("cpu_op", "user_annotation")
_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_WAITS = re.compile(r"(Stream|Device|Event|Ctx)Synchronize")


@dataclass(slots=True, eq=False)
class Range:
    """A range is an operation or an annotation on a CPU thread. Ranges are compared by identity."""

    name: str
    start: float
    end: float
    is_operation: bool
    """False for an annotation (`record_function`)"""
    parent: "Range | None" = None
    dims: Sequence = ()
    """shape of every argument, [] where it has none; empty if shapes were not recorded"""
    types: Sequence[str] = ()
    """type of every argument, "" for None"""
    values: Sequence[str] = ()
    """value of every scalar argument, as text"""

    def chain(self) -> "Iterator[Range]":
        """The method gives the range itself and what it lies in, innermost first."""
        current: Range | None = self
        while current is not None:
            yield current
            current = current.parent


@dataclass(slots=True, eq=False)
class Activity:
    """The device's work is a kernel, a copy or a fill; on a CPU an operation's own time.

    A call in which the CPU waits for the GPU is written as one too.
    """

    name: str
    start: float
    duration: float
    launched: float | None = None
    """when the launch call returned, or None if it is not in the trace"""
    caller: Range | None = None
    """innermost operation or annotation around the launch"""

    @property
    def end(self) -> float:
        return self.start + self.duration

    @property
    def issued(self) -> float:
        """An activity is issued when it is launched, as far as that is known, else as it starts."""
        return self.start if self.launched is None else self.launched


@dataclass(slots=True)
class MemoryEvent:
    """An event is memory taken or, with `size` below 0, given back."""

    time: float
    address: int
    size: int
    """bytes"""
    allocated: int
    """bytes in all, after the event"""


@dataclass(frozen=True)
class Trace:
    """A trace has all that the summaries read, in order of time."""

    path: Path
    device: str | None
    """the driver's name of the GPU; None if the trace holds no GPU work"""
    activities: list[Activity]
    ranges: list[Range]
    waits: list[Activity]
    memory: list[MemoryEvent]
    """of the GPU if there is any, else of the CPU"""
    metadata: dict
    """what a capture of ours says of itself; empty for other traces"""

    @property
    def steps(self) -> list[Range]:
        """The property gives the profiler's step annotations."""
        return [r for r in self.ranges if not r.is_operation and STEP_NAME.fullmatch(r.name)]

    def launched_in(self, steps: Sequence[Range]) -> list[Activity]:
        """The method gives the work launched inside steps that follow each other, else all."""
        if not steps:
            return self.activities
        first, last = steps[0].start, steps[-1].end
        return [a for a in self.activities if first <= a.issued <= last] or self.activities

    @cached_property
    def phases(self) -> list[Range]:
        """The property gives the annotations of PHASES, which follow each other."""
        return [r for r in self.ranges if not r.is_operation and r.name in PHASES]

    def phase_at(self, time: float) -> str | None:
        """The method names the phase that covers `time`."""
        position = bisect_right(self.phases, time, key=attrgetter("start")) - 1
        covered = position >= 0 and time <= self.phases[position].end
        return self.phases[position].name if covered else None


def with_callers_of(trace: Trace, launches: Trace) -> Trace:
    """The function gives a CUDA graph's trace the callers of the same steps launched one by one.

    A graph's kernels are launched by one call that knows nothing of operations and shapes. Of each
    kernel's name, the n-th call stands for the n-th of the other trace, as long as a step has
    equally many in both, and the other trace has as many steps or more.
    """
    callers = defaultdict(list)
    for activity in launches.activities:
        callers[activity.name].append(activity.caller)
    our_steps, their_steps = max(1, len(trace.steps)), max(1, len(launches.steps))
    # Each call gets an operation of its own: their work adds up over the steps.
    known = {
        name: iter(callers[name])
        for name, calls in Counter(a.name for a in trace.activities).items()
        if calls * their_steps == len(callers[name]) * our_steps and len(callers[name]) >= calls
    }
    activities = [
        replace(a, caller=next(known[a.name])) if a.name in known else a for a in trace.activities
    ]
    return replace(trace, activities=activities)


def read_trace(path: Path) -> Trace:
    """The function reads a trace of torch-profiler, Nsight Systems or Nsight Compute.

    Raises:
        UserError: the file is not readable or not such a trace.
    """
    refuse_pipe(path, str(path))
    document = _read_document(path)
    header = document if isinstance(document, dict) else {"traceEvents": document}
    events = header.get("traceEvents")
    if not isinstance(events, list):
        raise UserError(
            f"{path} is not a torch-profiler trace: it has no traceEvents; write one with "
            "torch.profiler's export_chrome_trace or with python -m hamner.profile"
        )
    complete = [e for e in events if isinstance(e, dict) and e.get("ph") == "X" and "dur" in e]
    ranges, launches = _nest(complete)
    gpu_work = [
        _activity(e, *launches.get(_correlation(e), (None, None)))
        for e in complete
        if e.get("cat") in _GPU_WORK
    ]
    activities = gpu_work or _cpu_activities(ranges)
    if not activities:
        raise UserError(f"{path} holds neither GPU work nor operations: nothing to summarise")
    waits = [
        _activity(e) for e in complete if e.get("cat") in _LAUNCHES and _WAITS.search(e["name"])
    ]
    metadata = header.get(METADATA_KEY)
    return Trace(
        path=path,
        device=_device_name(header) if gpu_work else None,
        activities=sorted(activities, key=attrgetter("start")),
        ranges=sorted(ranges, key=attrgetter("start")),
        waits=sorted(waits, key=attrgetter("start")),
        memory=_memory_events(events),
        metadata=metadata if isinstance(metadata, dict) else {},
    )


def _read_document(path: Path) -> object:
    try:
        content = path.read_bytes()
        # By content: some tools gzip without saying so in the name.
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content.startswith(nsight.SQLITE_MAGIC):
            return nsight.read_systems(path)
        if content.lstrip()[:1] in (b"{", b"["):
            return json.loads(content)
        return nsight.read_compute(path, content)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is not a torch-profiler trace (JSON, gzipped or not), Nsight Systems' SQLite "
            f"export or Nsight Compute's CSV: {error}"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _nest(events: list[dict]) -> tuple[list[Range], dict[int, tuple[float, Range | None]]]:
    """Ranges get their parents, each correlation id when and in what its launch ended."""
    by_thread = defaultdict(list)
    for event in events:
        if event.get("cat") in (*_RANGES, *_LAUNCHES):
            by_thread[event.get("pid"), event.get("tid")].append(event)
    ranges: list[Range] = []
    launches: dict[int, tuple[float, Range | None]] = {}
    for thread in by_thread.values():
        # Of two that start together, the longer is the outer one.
        thread.sort(key=lambda e: (float(e["ts"]), -float(e["dur"])))
        current: Range | None = None
        for event in thread:
            start = float(event["ts"])
            end = start + float(event["dur"])
            while current is not None and current.end <= start:
                current = current.parent
            if event["cat"] in _LAUNCHES:
                if _correlation(event) is not None:
                    launches[_correlation(event)] = end, current
                continue
            arguments = event.get("args", {})
            current = Range(
                name=event["name"],
                start=start,
                end=end,
                is_operation=event["cat"] == "cpu_op",
                parent=current,
                dims=arguments.get("Input Dims", ()),
                types=arguments.get("Input type", ()),
                values=arguments.get("Concrete Inputs", ()),
            )
            ranges.append(current)
    return ranges, launches


def _correlation(event: dict) -> int | None:
    return event.get("args", {}).get("correlation")


def _activity(event: dict, launched: float | None = None, caller: Range | None = None) -> Activity:
    start, duration = float(event["ts"]), float(event["dur"])
    return Activity(event["name"], start, duration, launched=launched, caller=caller)


def _cpu_activities(ranges: list[Range]) -> list[Activity]:
    """Without a GPU the device's work is each operation outside those inside it."""
    operations = [r for r in ranges if r.is_operation]
    inner: dict[Range, float] = defaultdict(float)
    for operation in operations:
        _, *outer = (r for r in operation.chain() if r.is_operation)
        if outer:
            inner[outer[0]] += operation.end - operation.start
    own = {r: r.end - r.start - inner[r] for r in operations}
    return [Activity(r.name, r.start, own[r], caller=r) for r in operations if own[r] > 0]


def _memory_events(events: list) -> list[MemoryEvent]:
    by_device = defaultdict(list)
    for event in events:
        if isinstance(event, dict) and event.get("name") == "[memory]":
            time, values = float(event["ts"]), event["args"]
            fields = (values[name] for name in ("Addr", "Bytes", "Total Allocated"))
            by_device[values["Device Type"]].append(MemoryEvent(time, *fields))
    # c10::DeviceType: CUDA, CPU.
    return sorted(by_device[1] or by_device[0], key=attrgetter("time"))


def _device_name(header: dict) -> str | None:
    properties = header.get("deviceProperties")
    if isinstance(properties, list) and properties and isinstance(properties[0], dict):
        return properties[0].get("name")
    return "unknown GPU"
