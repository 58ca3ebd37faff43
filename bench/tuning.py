"""Launch configurations are compiled by all cores at once, then timed one by one and ranked.

What a launch table decides is a `Subject`, which bench/tune.py and bench/tune_flash_attention.py
list. Of its candidates those count that fit the GPUs they are for: within their shared memory, no
register spilled (as ptxas says). A configuration is timed as a CUDA graph of many calls on data
several times the L2; the fastest are then timed in turn with the table's row, which gives the
noise.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from bench.as_capability import LoadedKernel, as_capability
from bench.ceilings import MATMUL, Ceilings, measure
from bench.conditions import conditions
from bench.cubin import registers_and_stack
from bench.mma_matmul import CANDIDATES, MatmulTile, matmul
from bench.timing import ManyCalls, use_recordable_stream
from hamner.errors import UserError
from hamner.files import require_writable, write_whole, writing
from hamner.plan import costs
from hamner.plan.costs import Cost

COPIES = 3
"""of the data, used in turn, so that it is several times the L2"""
FINALISTS, ROUNDS = 4, 5
"""configurations timed again, in turn, and how often"""
SHOWN = 4
MATMUL_NAME = f"plain matmul {MATMUL}^3"


@dataclass(frozen=True)
class Subject:
    """The subject is what one or more fields of a launch table decide."""

    name: str
    candidates: Sequence[tuple]
    current: tuple | None
    """the table's row; None where there is no table"""
    build: Callable[[], Callable[[], object]]
    """makes inputs on the GPU, and gives the call to time"""
    install: Callable[[tuple], AbstractContextManager]
    """while it is open, calls use this configuration"""
    cost: Cost
    """of a call; its rate is that of the FLOPs, if there are any"""

    @property
    def configurations(self) -> list[tuple]:
        """Each configuration to try is there once, the table's own first."""
        current = [] if self.current is None else [self.current]
        return list(dict.fromkeys([*current, *self.candidates]))


Subjects = Callable[[], Sequence[Subject]]
"""makes them; picklable, because every process makes its own"""


class Timed(NamedTuple):
    """A configuration was timed: the median of a call, and the range of the rounds over it."""

    values: tuple
    microseconds: float
    spread: float


@dataclass(frozen=True)
class Ranking:
    """The ranking is of a subject's configurations."""

    subject: Subject
    finalists: list[Timed]
    """the fastest first; the table's row is one of them"""
    once: dict[tuple, float]
    """microseconds of all that fit, timed once"""
    misfits: dict[tuple, str]
    """why the others do not fit"""

    @property
    def best(self) -> Timed:
        return self.finalists[0]

    @property
    def ours(self) -> Timed:
        """The table's row; where there is no table, the best configuration."""
        found = (timed for timed in self.finalists if timed.values == self.subject.current)
        return next(found, self.best)

    def rate(self, timed: Timed) -> float:
        """The rate is in TFLOP/s of work that computes, else in GB/s."""
        if self.subject.cost.flops:
            return self.subject.cost.flops / timed.microseconds / 1e6
        return self.subject.cost.bytes / timed.microseconds / 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The function adds the flags that both commands have."""
    parser.add_argument(
        "--as-capability",
        metavar="8.6",
        help="tune the row of this older capability, whose code this newer GPU then executes: "
        "times are not those of the older GPU, but what starves or serialises does on both",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write all times here, as one JSON object"
    )


@contextlib.contextmanager
def tuning(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Iterator[None]:
    """While it is open, the GPU can be tuned for; without one, with flags that cannot be, or where
    no configuration fits, the command ends with a sentence and exit code 2."""
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU found; launch tables are measured on the GPU they are for")
    try:
        if arguments.output is not None:
            require_writable(arguments.output, "--output")
        with as_capability(arguments.as_capability):
            use_recordable_stream()
            yield
    except UserError as error:
        parser.error(str(error))


def mma_matmul_subject() -> Subject:
    """The function gives a square matmul, whose rate is a ceiling (bench/mma_matmul.py)."""
    installed: list[MatmulTile] = []

    @contextlib.contextmanager
    def install(values: tuple) -> Iterator[None]:
        installed.append(MatmulTile(*values))
        yield
        installed.pop()

    def build() -> Callable[[], object]:
        a, b = (torch.randn(MATMUL, MATMUL, device="cuda").bfloat16() for _ in range(2))
        return lambda: matmul(a, b, installed[-1])

    return Subject(
        MATMUL_NAME,
        [tuple(tile) for tile in CANDIDATES],
        current=None,
        build=build,
        install=install,
        cost=costs.matmul(MATMUL, MATMUL, MATMUL),
    )


class Worker:
    """A worker is a process that compiles what others, too, find in the caches on disk."""

    older_gpu: AbstractContextManager[list[LoadedKernel]]
    """kept, as it ends when it is garbage"""
    loaded: list[LoadedKernel]
    subjects: dict[str, Subject]

    @classmethod
    def start(cls, row: str | None, subjects: Subjects) -> None:
        """The worker begins, as a GPU of this capability."""
        cls.older_gpu = as_capability(row)
        cls.loaded = cls.older_gpu.__enter__()
        cls.subjects = {subject.name: subject for subject in subjects()}

    @staticmethod
    @functools.lru_cache(1)
    def call_of(name: str) -> Callable[[], object]:
        """The method makes the inputs of a subject."""
        return Worker.subjects[name].build()

    @staticmethod
    def compile(job: tuple[str, tuple]) -> str | None:
        """The method runs a configuration once, and says why it does not fit."""
        name, values = job
        call, before = Worker.call_of(name), len(Worker.loaded)
        try:
            with Worker.subjects[name].install(values):
                call()
        except (OutOfResources, PTXASError) as error:
            return str(error)
        stacks = [registers_and_stack(kernel.cubin)[1] for kernel in Worker.loaded[before:]]
        spilled = max(stacks, default=0)
        return f"spills {spilled} bytes a thread" if spilled else None


Misfits = dict[tuple[str, tuple], str]
"""a subject's name and a configuration of it that does not fit: why"""


def compile_ahead(subjects: Subjects, row: str | None) -> Misfits:
    """The function leaves all configurations in the caches on disk, and finds what does not fit."""
    jobs = [(subject.name, values) for subject in subjects() for values in subject.configurations]
    count, started = len(os.sched_getaffinity(0)), time.perf_counter()
    context, misfits = multiprocessing.get_context("spawn"), {}
    with ProcessPoolExecutor(count, context, Worker.start, initargs=(row, subjects)) as pool:
        for number, (job, why) in enumerate(zip(jobs, pool.map(Worker.compile, jobs), strict=True)):
            if why is not None:
                misfits[job] = why
            if (number + 1) % 50 == 0 or number + 1 == len(jobs):
                seconds = time.perf_counter() - started
                print(
                    f"compiled {number + 1} of {len(jobs)} configurations in {seconds:.0f} s on "
                    f"{count} processes",
                    flush=True,
                )
    return misfits


def rank(subject: Subject, misfits: Misfits) -> Ranking:
    """The function times a subject's configurations, and prints the fastest."""
    calls = [subject.build() for _ in range(COPIES)]

    def record(values: tuple) -> ManyCalls:
        with subject.install(values):
            return ManyCalls(calls)

    why = {values: why for (name, values), why in misfits.items() if name == subject.name}
    once = {
        values: 1e3 * record(values).milliseconds()
        for values in subject.configurations
        if values not in why
    }
    if not once:
        raise UserError(f"no configuration of {subject.name} fits this GPU")
    finalists = sorted(once, key=once.__getitem__)[:FINALISTS]
    finalists += [subject.current] if subject.current in once.keys() - set(finalists) else []
    recorded = {values: record(values) for values in finalists}
    rounds = [{v: 1e3 * many.milliseconds() for v, many in recorded.items()} for _ in range(ROUNDS)]
    timed = [summarize(values, [times[values] for times in rounds]) for values in finalists]
    ranking = Ranking(subject, sorted(timed, key=lambda one: one.microseconds), once, why)
    for one in ranking.finalists[:SHOWN]:
        print(f"{subject.name}: {one.microseconds:8.1f} us  {one.values}", flush=True)
    return ranking


def summarize(values: tuple, microseconds: Sequence[float]) -> Timed:
    """The function gives the median of a configuration's rounds, and their range over it."""
    median = statistics.median(microseconds)
    return Timed(values, median, (max(microseconds) - min(microseconds)) / median)


def table(rankings: Iterable[Ranking], ceilings: Ceilings) -> list[str]:
    """The function gives the short table: each row of the launch table against the best
    configuration that fits, and the rate of it against the ceiling of its kind.

    Args:
        rankings: with that of the plain matmul, the ceiling of work that computes.
        ceilings: of memory, and of cuBLAS's matmul.
    """
    rankings = list(rankings)
    plain = next(ranking for ranking in rankings if ranking.subject.name == MATMUL_NAME)
    peak = plain.rate(plain.best)
    lines = [f"{'':<26}{'ours us':>9} {'best us':>9} {'behind':>7} {'noise':>6}  rate of ours"]
    for ranking in rankings:
        ours, best, computes = ranking.ours, ranking.best, ranking.subject.cost.flops > 0
        rate = ranking.rate(ours)
        share = rate / (peak if computes else ceilings.copy_gb_per_s)
        unit = "TFLOP/s" if computes else "GB/s"
        line = (
            f"{ranking.subject.name:<26}{ours.microseconds:>9.1f} {best.microseconds:>9.1f} "
            f"{ours.microseconds / best.microseconds - 1:>7.1%} "
            f"{max(ours.spread, best.spread):>6.1%} {rate:>6.0f} {unit:<7} {share:>4.0%}"
        )
        lines.append(line + ("" if best is ours else f"  best: {best.values}"))
    return [
        *lines,
        f"100% is {peak:.0f} TFLOP/s, the plain matmul's, or {ceilings.copy_gb_per_s:,.0f} GB/s, a "
        f"copy's; cuBLAS, in the GPU's own code, reaches {ceilings.matmul_tflop_per_s:.0f} TFLOP/s",
    ]


def conclude(rankings: Sequence[Ranking], row: str, output: Path | None) -> None:
    """The function prints the short table, and writes all times."""
    ceilings = measure()
    print(f"# {torch.cuda.get_device_name()}, row {row}")
    for line in table(rankings, ceilings):
        print(line)
    if output is not None:
        results = {
            "conditions": conditions(),
            "as_capability": row,
            "copy_gb_per_s": ceilings.copy_gb_per_s,
            "cublas_tflop_per_s": ceilings.matmul_tflop_per_s,
            "subjects": [described(ranking) for ranking in rankings],
        }
        with writing(f"--output {output}"):
            write_whole(output, json.dumps(results, indent=1) + "\n")


def described(ranking: Ranking) -> dict:
    """The function gives all that was found out about a subject, for JSON."""
    subject = ranking.subject
    return {
        "name": subject.name,
        "flops": subject.cost.flops,
        "bytes": subject.cost.bytes,
        "table": subject.current,
        "finalists": [one._asdict() | {"rate": ranking.rate(one)} for one in ranking.finalists],
        "microseconds_once": [[values, us] for values, us in ranking.once.items()],
        "misfits": [[values, why] for values, why in ranking.misfits.items()],
    }
