"""`capture` traces warm steps of a run, as they run in training: real loader, clipping, optimizer.

docs/traces.md lists the files that a capture writes. With several processes they are those of
rank 0; the others take the same steps beside it.

Some steps are timed without the profiler, because its own cost widens the gaps it shows.
"""

import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hamner.config.train import TrainConfig
from hamner.data.loader import TrainLoader
from hamner.errors import UserError
from hamner.files import writing
from hamner.parallel.processes import open_processes
from hamner.parallel.tensors import local
from hamner.plan.costs import flops_per_token
from hamner.profile import memory, report
from hamner.profile.ranges import Ranges
from hamner.profile.steps import is_on_gpu, open_steps, synchronize, take, time_steps, warm_up
from hamner.profile.summary import Summary, summarize
from hamner.profile.trace import METADATA_KEY, read_trace, with_callers_of
from hamner.train.step import TrainStep

TIMED_STEPS = 10
SNAPSHOT_EVENTS = 1_000_000


def capture(config: TrainConfig, out: Path, *, steps: int, warmup: int) -> Summary | None:
    """`capture` traces `steps` steps of a run after `warmup` others, and writes what they show.

    Args:
        config: the run whose steps are traced; nothing is written to its run folder.
        out: folder to write.
        steps: to trace.
        warmup: steps before anything is timed.

    Returns:
        The summary; None in all processes but rank 0.

    Raises:
        UserError: the configuration or the folder does not allow it.
    """
    ranges = Ranges()
    with open_processes(config) as processes:
        processes.from_main(lambda: _require_new(out))
        with open_steps(config, processes, ranges) as (step, loader):
            processes.from_main(lambda: _make(out))
            run = TracedRun(step, loader, ranges)
            is_graphed = step.is_graphed
            step.launch_one_by_one()
            take(step, loader, warmup)
            run.trace_memory(out)
            if is_graphed:
                run.trace_time(out / "launches.json.gz", steps)
                step.record_graph()
                warm_up(step, loader, warmup)
            times = time_steps(step, loader, TIMED_STEPS)
            run.metadata["unprofiled_step_ms"] = statistics.median(times)
            run.trace_time(out / "trace.json.gz", steps)
        if not processes.rank.is_main:
            return None
        trace = read_trace(out / "trace.json.gz")
        if is_graphed:
            trace = with_callers_of(trace, read_trace(out / "launches.json.gz"))
        summary = summarize(trace)
        timeline = memory.memory_timeline(read_trace(out / "memory.json.gz"))
        memory.draw(timeline, out / "memory.png")
        text = f"{report.describe(summary)}\n\n{report.describe_memory(timeline)}\n"
        (out / "summary.md").write_text(text, encoding="utf-8")
        values = {"config": config.to_json(), "summary": asdict(summary), "peak": timeline.peak}
        (out / "summary.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        print(text, end="")
        return summary


def run_for_nsight(config: TrainConfig, *, steps: int, warmup: int) -> None:
    """The same steps run with NVTX ranges between cudaProfilerStart and Stop; nothing is written.

    docs/traces.md says how nsys and ncu are run on it.

    Raises:
        UserError: there is no GPU, or the configuration does not allow it.
    """
    if not torch.cuda.is_available():
        raise UserError("--tool nsight needs a CUDA GPU; --tool torch works on a CPU")
    ranges = Ranges()
    with (
        open_processes(config) as processes,
        open_steps(config, processes, ranges) as (step, loader),
    ):
        warm_up(step, loader, warmup)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        with ranges.named(step):
            for number in range(steps):
                # As torch-profiler marks steps, so that `read_trace` finds them.
                with torch.cuda.nvtx.range(f"ProfilerStep#{number}"):
                    take(step, loader, 1)
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()


def _require_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} already holds something: give a new folder")


def _make(out: Path) -> None:
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)


class TracedRun:
    """A run's steps are traced with ranges that say what each part of the trace is for."""

    def __init__(self, step: TrainStep, loader: TrainLoader, ranges: Ranges) -> None:
        self.step, self.loader, self.ranges = step, loader, ranges
        config, optimizer = step.config, step.optimizer
        weights, state = optimizer.parameters.values(), optimizer.state_tensors().values()
        self.metadata = {
            "option": config.option,
            "tokens_per_step": config.tokens_per_step,
            "gpus": step.processes.rank.world_size,
            "flops_per_token": flops_per_token(config.model, config.seq_len),
            "precision": step.compute.precision,
            "weight_bytes": sum(local(w).nbytes for w in weights),
            "optimizer_bytes": sum(local(t).nbytes for t in state),
        }

    @contextlib.contextmanager
    def _profiler(self, path: Path, **settings) -> Iterator[profile]:
        """While it is open, a profiler traces; then rank 0 writes its trace to a file."""
        with profile(**settings) as profiler, self.ranges.named(self.step):
            yield profiler
        if self.step.processes.rank.is_main:
            profiler.export_chrome_trace(str(path))

    def trace_time(self, path: Path, steps: int) -> None:
        """The times of `steps` steps are written to a file."""
        activities = [ProfilerActivity.CPU]
        if is_on_gpu(self.step):
            activities.append(ProfilerActivity.CUDA)
        # One step to let the tracing itself warm up.
        plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
        settings = {"activities": activities, "schedule": plan, "record_shapes": True}
        with self._profiler(path, **settings) as profiler:
            take(self.step, self.loader, 1)
            synchronize(self.step)  # or what still runs would be counted to the traced steps
            profiler.step()
            # Only a profiler that records takes it.
            profiler.add_metadata_json(METADATA_KEY, json.dumps(self.metadata))
            for left in reversed(range(steps)):
                take(self.step, self.loader, 1)
                if not left:
                    synchronize(self.step)
                profiler.step()

    def trace_memory(self, out: Path) -> None:
        """The allocations of one step are written into a folder."""
        on_gpu = is_on_gpu(self.step)
        synchronize(self.step)
        if on_gpu:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=SNAPSHOT_EVENTS)
        settings = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
        with self._profiler(out / "memory.json.gz", **settings) as profiler:
            profiler.add_metadata_json(METADATA_KEY, json.dumps(self.metadata))
            take(self.step, self.loader, 1)
            synchronize(self.step)
        if on_gpu:
            if self.step.processes.rank.is_main:
                torch.cuda.memory._dump_snapshot(str(out / "memory_snapshot.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
