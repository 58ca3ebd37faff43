"""Traces warm steps of a trainer, as they run in training: real loader, clipping, optimizer.

A capture writes into its folder

    trace.json.gz          the steps, with shapes: Perfetto, chrome://tracing, hamner.profile read
    memory.json.gz         one more step, with its allocations (a GPU: memory_snapshot.pickle too,
                           which pytorch.org/memory_viz shows)
    memory.png             memory over that step by kind
    summary.md, .json      what is printed

The steps before are timed without the profiler, because its own cost widens the gaps it shows.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hamner.config import TrainConfig
from hamner.errors import UserError
from hamner.profiling import memory, report
from hamner.profiling.ranges import Phases, named
from hamner.profiling.summary import Summary, summarize
from hamner.profiling.trace import METADATA_KEY, read_trace
from hamner.run_folder import RunFolder
from hamner.trainer import Trainer

TIMED_STEPS = 10
LR = 1e-5
"""a step's time does not depend on it"""
SNAPSHOT_EVENTS = 1_000_000


class _NeverInterrupted:
    requested = False


def capture(config: TrainConfig, out: Path, *, steps: int, warmup: int) -> Summary:
    """Trace `steps` steps of a run after `warmup` others, and write what they show.

    Args:
        config: the run whose steps are traced; nothing is written to its run folder.
        out: folder to write.
        steps: to trace.
        warmup: steps before anything is timed.

    Raises:
        UserError: the configuration or the folder does not allow it.
    """
    _require_new(out)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _build(config, Path(scratch))
        try:
            out.mkdir(parents=True, exist_ok=True)
            for _ in range(warmup):
                _step(trainer, None)
            unprofiled = statistics.median(_time_steps(trainer))
            metadata = _metadata(trainer) | {"unprofiled_step_ms": unprofiled}
            _trace_time(trainer, out / "trace.json.gz", steps, metadata)
            _trace_memory(trainer, out, metadata)
        finally:
            trainer.close()
    summary = summarize(read_trace(out / "trace.json.gz"))
    timeline = memory.memory_timeline(read_trace(out / "memory.json.gz"))
    memory.draw(timeline, out / "memory.png")
    text = f"{report.describe(summary)}\n\n{report.describe_memory(timeline)}\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    values = {"config": config.to_json(), "summary": asdict(summary), "peak": timeline.peak}
    (out / "summary.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(text, end="")
    return summary


def run_for_nsight(config: TrainConfig, *, steps: int, warmup: int) -> None:
    """Run the same steps with NVTX ranges between cudaProfilerStart and Stop, and write nothing.

    For `nsys profile --capture-range cudaProfilerApi` and `ncu --profile-from-start off`, which
    cannot share the GPU's counters with torch-profiler.

    Raises:
        UserError: there is no GPU, or the configuration does not allow it.
    """
    if not torch.cuda.is_available():
        raise UserError("--tool nsight needs a CUDA GPU; --tool torch works on a CPU")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _build(config, Path(scratch))
        try:
            for _ in range(warmup):
                _step(trainer, None)
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            with named(trainer) as phases:
                for _ in range(steps):
                    _step(trainer, phases)
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        finally:
            trainer.close()


def _require_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} already holds something: give a new folder")


def _build(config: TrainConfig, scratch: Path) -> Trainer:
    # Its folder goes when the capture ends; no step reads validation rows.
    config = replace(config, run_dir=scratch, eval_tokens=1)
    return Trainer(config, RunFolder(scratch))


def _step(trainer: Trainer, phases: Phases | None) -> None:
    if phases is not None:
        phases.enter("data")
    trainer.train_step(next(trainer.loader), LR, _NeverInterrupted())
    trainer.step += 1


def _time_steps(trainer: Trainer) -> list[float]:
    """Milliseconds of TIMED_STEPS steps, as in training: one after the other without waiting."""
    if trainer.compute.device.type == "cpu":
        return [_milliseconds(lambda: _step(trainer, None)) for _ in range(TIMED_STEPS)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_STEPS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        _step(trainer, None)
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]


def _milliseconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1e3


def _metadata(trainer: Trainer) -> dict:
    config, optimizer = trainer.config, trainer.optimizer
    weights = optimizer.parameters.values()
    return {
        "option": config.option,
        "tokens_per_step": config.tokens_per_step,
        "flops_per_token": config.model.flops_per_token(config.seq_len),
        "precision": trainer.compute.precision,
        "weight_bytes": sum(w.nbytes for w in weights),
        "optimizer_bytes": sum(t.nbytes for t in optimizer.state_tensors().values()),
    }


def _trace_time(trainer: Trainer, path: Path, steps: int, metadata: dict) -> None:
    activities = [ProfilerActivity.CPU]
    if trainer.compute.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        profile(
            activities=activities,
            # One step to let the tracing itself warm up.
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            record_shapes=True,
            # Called with the profiler running: metadata goes into the trace only then.
            on_trace_ready=lambda profiler: _export(profiler, path),
        ) as profiler,
        named(trainer) as phases,
    ):
        for number in range(1 + steps):
            if number == 1:
                profiler.add_metadata_json(METADATA_KEY, json.dumps(metadata))
            _step(trainer, phases)
            if number == steps:
                phases.enter(None)
                _synchronize(trainer)
            profiler.step()


def _export(profiler: profile, path: Path) -> None:
    profiler.export_chrome_trace(str(path))


def _trace_memory(trainer: Trainer, out: Path, metadata: dict) -> None:
    on_gpu = trainer.compute.device.type == "cuda"
    if on_gpu:
        _synchronize(trainer)
        torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        named(trainer) as phases,
    ):
        profiler.add_metadata_json(METADATA_KEY, json.dumps(metadata))
        _step(trainer, phases)
        phases.enter(None)
        _synchronize(trainer)
    profiler.export_chrome_trace(str(out / "memory.json.gz"))
    if on_gpu:
        torch.cuda.memory._dump_snapshot(str(out / "memory_snapshot.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


def _synchronize(trainer: Trainer) -> None:
    if trainer.compute.device.type == "cuda":
        torch.cuda.synchronize()
