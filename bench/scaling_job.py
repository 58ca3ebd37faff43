"""The processes that `bench.scaling` starts take the steps of its rows, one by one.

    torchrun --nproc-per-node 2 -m bench.scaling_job JOB.json

Every row builds its own step; the processes, and what they have loaded, are those of them all.
"""

import gc
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from bench.conditions import conditions
from hamner.checkpoint.run_folder import append_record
from hamner.cli import run_command
from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.hardware import GIB
from hamner.parallel.device import uses_gpu
from hamner.parallel.processes import SingleProcess, open_processes
from hamner.plan.communication import all_reduce_bytes
from hamner.profile.capture import TracedRun
from hamner.profile.ranges import Ranges
from hamner.profile.steps import is_on_gpu, open_steps, time_calls, time_steps, warm_up
from hamner.profile.summary import Summary, summarize
from hamner.profile.trace import read_trace
from hamner.train import __main__ as train

LOSSES_LR = 1e-4
"""of the steps whose losses are compared: what is wrong with a gradient shows in a loss in
proportion to it, and at the 1e-5 of steps that are timed no more than rounding does"""
ALL_REDUCE_BYTES = 256 * 2**20
ALL_REDUCES = 10
TRACED_STEPS = 3


@dataclass(frozen=True)
class Row:
    """A row is one measurement."""

    option: str
    engine: Literal["one", "ddp", "fsdp"]
    """one: a single GPU"""
    gpus: int
    steps: int
    """that are timed"""
    micro_batches: int = 1
    """a step, in each process; each as large as the option's batch"""
    bucket_mib: int = TrainConfig.ddp_bucket_mib
    transport: str = "links"
    """what NCCL sends through; see `bench.scaling.TRANSPORTS`"""
    losses: int = 0
    """of the first so many steps, kept to be compared, and as many gradient norms"""
    warm_up: int = 4
    """least steps before those that are timed"""
    trace: bool = False
    """trace TRACED_STEPS more, for what of its messages is exposed"""
    again: bool = False
    """measure once more, when all others have been"""
    data: str | None = None
    """SPEC that it reads instead of what the flags say"""

    @property
    def name(self) -> str:
        """The name is unlike that of any other row."""
        size = f"{self.micro_batches}x, {self.bucket_mib} MiB"
        again = ", again" if self.again else ""
        return f"{self.option}, {self.engine} on {self.gpus}, {self.transport}, {size}{again}"

    @property
    def trace_file(self) -> str:
        """The trace has this name in the folder of the results."""
        return f"{self.option}-{self.engine}-{self.gpus}.trace.json.gz"


def configure(row: Row, flags: list[str]) -> TrainConfig:
    """The function gives the row's run: the option as it trains, on as many rows a step as it says.

    Raises:
        UserError: the flags make no sense.
    """
    config = train.parse([*flags, "--option", row.option])
    return replace(
        config,
        data=(row.data,) if row.data else config.data,
        batch_size=config.batch_size * row.gpus * row.micro_batches,
        micro_batch_size=config.batch_size,
        parallel="auto" if row.engine == "one" else row.engine,
        ddp_bucket_mib=row.bucket_mib,
    )


class TimedBatches:
    """The batches of a loader are given, and what the CPU waits for them is added up."""

    def __init__(self, loader: Iterator[Batch]) -> None:
        self.loader, self.seconds = loader, 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self.loader)
        self.seconds += time.perf_counter() - started
        return batch


def measure(row: Row, flags: list[str], processes: SingleProcess, folder: Path) -> dict:
    """The function gives the row's figures, the same in every process but for its own clock.

    Args:
        folder: of its trace, which rank 0 writes.
    """
    config, ranges = configure(row, flags), Ranges()
    with open_steps(config, processes, ranges) as (step, loader):
        if is_on_gpu(step):
            torch.cuda.reset_peak_memory_stats()
        first = [step.step(next(loader), LOSSES_LR) for _ in range(row.losses)]
        warm_up(step, loader, max(0, row.warm_up - row.losses))
        batches = TimedBatches(loader)
        milliseconds = time_steps(step, batches, row.steps)
        peak = torch.cuda.max_memory_allocated() if is_on_gpu(step) else 0
        peak, waited_us = processes.all_reduce_max([peak, round(batches.seconds * 1e6)])
        is_graphed = step.is_graphed
        if row.trace:
            TracedRun(step, loader, ranges).trace_time(folder / row.trace_file, TRACED_STEPS)
    deciles = statistics.quantiles(milliseconds, n=10)
    return {
        "tokens_per_step": config.tokens_per_step,
        "p10_ms": round(deciles[0], 3),
        "p50_ms": round(statistics.median(milliseconds), 3),
        "p90_ms": round(deciles[-1], 3),
        "data_ms": round(waited_us / row.steps / 1e3, 3),
        "peak_gib": round(peak / GIB, 3),
        "cuda_graph": is_graphed,
        "losses": [result.loss.item() for result in first],
        "grad_norms": [result.grad_norm.item() for result in first],
        **(read_times(folder / row.trace_file) if row.trace and processes.rank.is_main else {}),
    }


def read_times(trace: Path) -> dict:
    """The function gives a step's milliseconds by what they go to, and where GPUs sent messages,
    those of the messages and those in which nothing else ran."""
    summary = summarize(read_trace(trace))
    times = {"parts_ms": {name: round(ms, 3) for name, ms in parts(summary).items()}}
    if (found := summary.communication) is not None:
        times["communication_ms"] = round(found.milliseconds, 3)
        times["exposed_ms"] = round(found.exposed_ms, 3)
    return times


def parts(summary: Summary) -> dict[str, float]:
    """The function divides a step into categories of kernels, messages that nothing hides, and idle
    time.

    Kernels that run side by side count in full each, hidden messages not at all.
    """
    found = dict(summary.categories)
    if summary.communication is not None:
        # Kernels that cut and join what FSDP2 sends are of this category too.
        copies = found.pop("communication") - summary.communication.milliseconds
        found["copies for messages"] = max(0.0, copies)
        found["messages, exposed"] = summary.communication.exposed_ms
    if summary.gaps is not None:
        found["idle, waiting for the CPU"] = summary.gaps.waiting_for_cpu_ms
        found["idle, between kernels"] = summary.gaps.between_kernels_ms
    return {"step": summary.step_ms, **found}


def bus_bandwidth(gpus: int) -> float:
    """The function gives GB/s that each GPU sends, and receives, in an all-reduce of
    ALL_REDUCE_BYTES.

    What nccl-tests call bus bandwidth; the median of ALL_REDUCES.
    """
    tensor = torch.zeros(ALL_REDUCE_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    dist.all_reduce(tensor)
    milliseconds = time_calls(lambda: dist.all_reduce(tensor), ALL_REDUCES, on_gpu=True)
    sent = all_reduce_bytes(ALL_REDUCE_BYTES, gpus)
    return round(sent / (statistics.median(milliseconds) * 1e6), 2)


def main(args: list[str]) -> None:
    """The command measures the rows of a job and appends each to its results as soon as it is
    there."""
    job = json.loads(Path(args[0]).read_text())
    rows = [Row(**row) for row in job["rows"]]
    config = configure(rows[0], job["flags"])
    with open_processes(config) as processes:
        is_main = processes.rank.is_main
        on_gpu = uses_gpu(config.device)
        several = processes.rank.world_size > 1
        link = bus_bandwidth(processes.rank.world_size) if several and on_gpu else None
        common = {"bus_gbs": link, "conditions": conditions() if is_main else None}
        for row in rows:
            result = measure(row, job["flags"], processes, Path(job["results"]).parent)
            # The next row's peak must not have this one's memory in it.
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()
            if is_main:
                append_record(Path(job["results"]), {**asdict(row), **result, **common})


if __name__ == "__main__":
    run_command(main)
