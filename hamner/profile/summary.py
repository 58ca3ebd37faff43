"""A step's trace shows where its time goes. The module is torch-free.

    step = busy + idle                 busy: at least one kernel runs
    idle = waiting for the CPU         the next kernel was launched after the last one had ended
         + between kernels             it was queued already: the GPU's own latency

Kernels that run side by side (several streams) count in full each, so categories may add up to more
than busy. Messages between GPUs are best sent beside arithmetic:

    communication = hidden              something else runs at the same time
                  + exposed             nothing else does: the step is longer by this
"""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hamner.errors import UserError
from hamner.hardware import Gpu, identify
from hamner.plan.costs import Cost
from hamner.profile.categories import CATEGORIES, category_of, is_collective
from hamner.profile.trace import PHASES, Activity, Trace
from hamner.profile.work import work_of

TOP_KERNELS = 20
LONG_GAP_US = 10.0


@dataclass(frozen=True)
class KernelRow:
    """A row has one kernel over a step; in a trace without a GPU it has an operation of the CPU."""

    name: str
    category: str
    calls: float
    milliseconds: float
    tflop_per_s: float | None
    """achieved; None where the work is unknown or only traffic"""
    gb_per_s: float | None
    """achieved (10^9 bytes); None where the work is unknown"""
    floor_ms: float | None
    """least time on this GPU, by peak and bandwidth; None where either is unknown"""


@dataclass(frozen=True)
class Gaps:
    """The gaps say when the GPU was idle, per step."""

    waiting_for_cpu_ms: float
    between_kernels_ms: float
    long_gaps: float
    """gaps above LONG_GAP_US"""
    longest_us: float
    head_start_us: float | None
    """median time between a kernel's launch and its start: how far ahead the CPU was"""


@dataclass(frozen=True)
class Communication:
    """The times of messages between GPUs, per step, include waiting for other GPUs."""

    milliseconds: float
    exposed_ms: float
    """of them, those in which nothing else ran on this GPU"""


@dataclass(frozen=True)
class Summary:
    """A summary describes a step of a trace, averaged over the traced steps."""

    source: str
    device: str | None
    steps: int
    step_ms: float
    busy_ms: float
    categories: dict[str, float]
    """milliseconds by category, in CATEGORIES' order, without idle"""
    phases: dict[str, float]
    """milliseconds of device work by phase of the step; empty for traces without them"""
    kernels: list[KernelRow]
    """by time"""
    launches: float
    gaps: Gaps | None
    """None without a GPU"""
    communication: Communication | None
    """None where no GPU sends anything"""
    gpus: int
    """that train together; 1 for traces that do not say"""
    waits: dict[str, tuple[float, float]]
    """calls in which the CPU waits for the GPU: times and milliseconds"""
    counted_tflops: float | None
    """FLOPs of the operations with known shapes, over the step's time, TFLOP/s"""
    tokens_per_second: float | None
    mfu: float | None
    unprofiled_step_ms: float | None
    """median step before the profiler was switched on; known for captures of ours"""

    @property
    def idle_ms(self) -> float:
        """The property gives milliseconds in which nothing ran."""
        return max(0.0, self.step_ms - self.busy_ms)


def summarize(trace: Trace, *, steps: int | None = None) -> Summary:
    """The function summarises a trace.

    Args:
        trace: from `read_trace`.
        steps: steps it holds; None counts the profiler's step annotations (none: one step).

    Raises:
        UserError: `steps` contradicts the trace's own.
    """
    annotated = len(trace.steps)
    if steps is not None and annotated and steps != annotated:
        raise UserError(
            f"--steps {steps}: {trace.path} marks {annotated} steps itself; leave out --steps"
        )
    count = annotated or steps or 1
    activities = trace.launched_in(trace.steps)
    gpu = identify(trace.device) if trace.device else None
    precision = trace.metadata.get("precision", "bf16")
    busy_us, step_us = _durations(trace, activities, count)
    rows, known = _kernels(activities, count, gpu, precision)
    unprofiled = trace.metadata.get("unprofiled_step_ms")
    # The profiler slows the CPU down, so where the step was also timed without it, that counts.
    step_seconds = (unprofiled / 1e3) if unprofiled else step_us / 1e6
    tokens = trace.metadata.get("tokens_per_step")
    speed = tokens / step_seconds if tokens else None
    gpus, flops = trace.metadata.get("gpus", 1), trace.metadata.get("flops_per_token")
    mfu = None
    if speed is not None and flops is not None and gpu is not None:
        mfu = speed / gpus * flops / (gpu.peak_tflops(precision) * 1e12)
    return Summary(
        source=str(trace.path),
        device=trace.device,
        steps=count,
        step_ms=step_us / 1e3,
        busy_ms=busy_us / 1e3,
        categories=_sums(CATEGORIES, ((row.category, row.milliseconds) for row in rows)),
        # What runs late was still asked for in the phase that launched it.
        phases=_sums(
            PHASES, ((trace.phase_at(a.issued), a.duration / count / 1e3) for a in activities)
        ),
        kernels=rows,
        launches=len(activities) / count,
        gaps=_gaps(activities, count) if trace.device else None,
        communication=_communication(activities, count),
        gpus=gpus,
        waits=_waits(trace, count),
        counted_tflops=known.flops / count / step_us / 1e6 if known.flops else None,
        tokens_per_second=speed,
        mfu=mfu,
        unprofiled_step_ms=unprofiled,
    )


def _durations(trace: Trace, activities: list[Activity], steps: int) -> tuple[float, float]:
    """The function gives a step's microseconds: busy on any stream, and from end to end."""
    if trace.device is None:
        # An operation's own time is interrupted by the operations inside it: only its sum is known.
        whole = trace.steps or trace.ranges
        span = max(r.end for r in whole) - whole[0].start
        return sum(activity.duration for activity in activities) / steps, span / steps
    end = max(activity.end for activity in activities)
    return _busy(activities) / steps, (end - activities[0].start) / steps


def _busy(activities: list[Activity]) -> float:
    """The function gives the microseconds in which at least one of them runs."""
    busy, end = 0.0, -math.inf
    for activity in activities:
        busy += max(0.0, activity.end - max(end, activity.start))
        end = max(end, activity.end)
    return busy


def _kernels(
    activities: list[Activity], steps: int, gpu: Gpu | None, precision: str
) -> tuple[list[KernelRow], Cost]:
    """The function gives rows by time, and the known work of them all.

    An operation's work is shared by its kernels of one category in proportion to their time, so
    they all show the rate of their operation.
    """
    work_for = []
    together: dict[tuple[int, str], float] = defaultdict(float)
    for activity in activities:
        category = category_of(activity)
        operation, work = work_of(category, activity.caller) or (None, None)
        work_for.append((activity, (id(operation), category), work))
        together[id(operation), category] += activity.duration

    groups: dict[tuple[str, str], list[tuple[Activity, Cost | None]]] = defaultdict(list)
    total = Cost()
    for activity, key, work in work_for:
        share = None
        if work is not None and together[key] > 0:
            part = activity.duration / together[key]
            share = work * part
            total += share
        groups[short_name(activity.name), key[1]].append((activity, share))
    rows = [
        _row(*names, calls, steps, gpu=gpu, precision=precision) for names, calls in groups.items()
    ]
    return sorted(rows, key=lambda row: -row.milliseconds), total


def _row(
    name: str, category: str, calls: list, steps: int, gpu: Gpu | None, precision: str
) -> KernelRow:
    microseconds = sum(activity.duration for activity, _ in calls)
    known = [work for _, work in calls if work is not None]
    tflops = gbs = floor = None
    # A rate of some of the calls only would be misleading.
    if len(known) == len(calls) and microseconds > 0:
        work = sum(known, Cost())
        tflops = work.flops / microseconds / 1e6 if work.flops else None
        gbs = work.bytes / microseconds / 1e3 if work.bytes else None
        if gpu is not None:
            floor = sum(work.floor_seconds(gpu, precision) for work in known) * 1e3 / steps
    return KernelRow(
        name,
        category=category,
        calls=len(calls) / steps,
        milliseconds=microseconds / steps / 1e3,
        tflop_per_s=tflops,
        gb_per_s=gbs,
        floor_ms=floor,
    )


def short_name(name: str) -> str:
    """Return type, template arguments, parameters and namespaces leave a kernel's name."""
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    name = re.sub(r"\(.*", "", name, flags=re.DOTALL)
    head, _, arguments = name.partition("<")
    head = head.removeprefix("at::native::").removeprefix("cutlass::")
    # Generic wrappers are distinguished by the functor they are given.
    functors = re.findall(r"\w*(?:Functor\w*|Ops?|_kernel(?:_cuda)?|Kernel|Epilogue)\b", arguments)
    inner = next((functor for functor in functors if functor not in head), None)
    return f"{head}<{inner}>" if inner else head


def _sums(names: Sequence[str], times: Iterable[tuple[str | None, float]]) -> dict[str, float]:
    """The function adds up times by name, in the order of `names`, and leaves out other names."""
    totals = dict.fromkeys((*names, None), 0.0)
    for name, time in times:
        totals[name] += time
    return {name: totals[name] for name in names if totals[name] > 0}


def _gaps(activities: list[Activity], steps: int) -> Gaps:
    waiting = between = longest = 0.0
    long_gaps = 0
    end = activities[0].start
    for activity in activities:
        gap = activity.start - end
        if gap > 0:
            if activity.launched is not None and activity.launched > end:
                waiting += gap
            else:
                between += gap
            long_gaps += gap > LONG_GAP_US
            longest = max(longest, gap)
        end = max(end, activity.end)
    ahead = [a.start - a.launched for a in activities if a.launched is not None]
    return Gaps(
        waiting_for_cpu_ms=waiting / steps / 1e3,
        between_kernels_ms=between / steps / 1e3,
        long_gaps=long_gaps / steps,
        longest_us=longest,
        head_start_us=statistics.median(ahead) if ahead else None,
    )


def _communication(activities: list[Activity], steps: int) -> Communication | None:
    sending = [a for a in activities if is_collective(a)]
    if not sending:
        return None
    exposed = _busy(activities) - _busy([a for a in activities if not is_collective(a)])
    return Communication(_busy(sending) / steps / 1e3, exposed / steps / 1e3)


def _waits(trace: Trace, steps: int) -> dict[str, tuple[float, float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for wait in trace.waits:
        if not trace.steps or trace.steps[0].start <= wait.start <= trace.steps[-1].end:
            found[wait.name].append(wait.duration)
    return {name: (len(t) / steps, sum(t) / steps / 1e3) for name, t in found.items()}
