"""`python -m hamner.profile` traces warm steps, or reads any trace; see docs/traces.md."""

import sys

if __package__ != "hamner.profile":
    print("error: start this with python -m hamner.profile", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from hamner.cli import read_ahead, read_flags, run_command
from hamner.config.options import find_option
from hamner.config.recipe import RecipeConfig
from hamner.config.sft import part
from hamner.config.train import ComputeConfig, RunConfig, StartConfig, TaskConfig, TrainConfig
from hamner.errors import UserError
from hamner.files import PNG, require_writable, writing
from hamner.profile import memory, picture
from hamner.profile.report import describe, describe_difference, describe_memory
from hamner.profile.summary import summarize
from hamner.profile.trace import read_trace, with_callers_of
from hamner.train.flags import Origin, require_consistent

COMMAND = "hamner.profile"


@dataclass(frozen=True)
class TracedTask(TaskConfig):
    """These flags say which run's steps are traced, and how many."""

    steps: int | None = None
    """steps to trace; default 3"""


@dataclass(frozen=True)
class ProfileConfig:
    """Trace warm steps of a run: time by kind of work, kernels against their floors, memory.

    Takes every flag of hamner.train, so a training command is profiled by changing its module.
    `read TRACE` summarises any torch-profiler trace; `read --compare A B` the difference of two.
    """

    task: TracedTask
    recipe: RecipeConfig
    compute: ComputeConfig
    run: RunConfig
    start: StartConfig
    warmup: int = 10
    """steps before: compilation, launch tables, the allocator"""
    out: Path | None = None
    """folder for trace, memory and summary; default runs/OPTION-profile"""
    tool: Literal["torch", "nsight"] = "torch"
    """torch: torch.profiler; nsight: only mark the steps with NVTX ranges, under nsys or ncu"""

    def __post_init__(self) -> None:
        self.training()
        if self.warmup < 0:
            raise UserError(f"--warmup {self.warmup} must not be negative")

    def training(self) -> TrainConfig:
        """The method gives the run whose steps are traced; it is as long as its option's.

        Raises:
            UserError: The values make no sense, alone or together.
        """
        config = self.given()
        # A run that goes on has its own weights, and its folder is not read.
        start = None if config.resume else config.init_from
        changes = {"resume": False, "replay": None, "init_from": start}
        return replace(config, steps=None, tokens=None, **changes)

    def given(self) -> TrainConfig:
        """The method gives the run that hamner.train would make of the flags.

        Raises:
            UserError: The values make no sense, alone or together.
        """
        parts = (self.task, self.recipe, self.compute, self.run, self.start)
        return TrainConfig(**{key: value for part in parts for key, value in vars(part).items()})


@dataclass(frozen=True)
class ReadConfig:
    """Summarise a trace, ours or another trainer's.

    Of torch-profiler (JSON, gzipped or not), Nsight Systems (SQLite) or Nsight Compute (CSV).
    """

    trace: tyro.conf.Positional[Path | None] = None
    """the trace"""
    compare: tuple[Path, Path] | None = None
    """two traces: the difference, B - A"""
    steps: int | None = None
    """steps the trace holds, where it does not mark them itself; default 1"""
    launches: Path | None = None
    """the same steps launched one by one: tells what a CUDA graph's kernels are for"""
    memory: Path | None = None
    """also draw memory by kind here (PNG), if the trace has allocations (profile_memory=True)"""
    picture: Path | None = None
    """also draw when the GPU did what in the last step (PNG); with --compare both steps"""

    def __post_init__(self) -> None:
        if (self.trace is None) == (self.compare is None):
            raise UserError("read needs one TRACE, or --compare A B")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps {self.steps} must be above 0")
        for name in ("launches", "memory"):
            if self.compare is not None and getattr(self, name) is not None:
                raise UserError(f"--{name} is of one TRACE: leave it out beside --compare")
        for name in ("memory", "picture"):
            if path := getattr(self, name):
                require_writable(path, f"--{name}", begins=PNG)


def read(config: ReadConfig) -> None:
    """The function prints the summary of a trace, or the difference of two.

    Raises:
        UserError: a file is not a trace or holds no allocations to draw, or a picture cannot be
            written.
    """
    if config.compare is not None:
        traces = [read_trace(path) for path in config.compare]
        print(describe_difference(*(summarize(trace, steps=config.steps) for trace in traces)))
    else:
        trace = read_trace(config.trace)
        if config.launches is not None:
            trace = with_callers_of(trace, read_trace(config.launches))
        traces = [trace]
        print(describe(summarize(trace, steps=config.steps)))
        if config.memory is not None:
            timeline = memory.memory_timeline(trace)
            if timeline is None:
                raise UserError(
                    f"--memory: {trace.path} holds no allocations; trace with profile_memory=True"
                )
            print(f"\n{describe_memory(timeline)}")
            with writing(f"--memory {config.memory}"):
                memory.draw(timeline, config.memory)
    if config.picture is not None:
        with writing(f"--picture {config.picture}"):
            picture.draw(traces, config.picture)


def parse(args: Sequence[str]) -> ProfileConfig:
    """The function reads the flags of a capture, whose defaults are those of training.

    Raises:
        UserError: values that make no sense, alone or together.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    origin = read_ahead(Origin, args, COMMAND)
    run = replace(origin.defaults(), steps=None, tokens=None)
    classes = (TracedTask, RecipeConfig, ComputeConfig, RunConfig, StartConfig)
    parts = (part(cls, run) for cls in classes)
    config = read_flags(ProfileConfig, args, COMMAND, default=ProfileConfig(*parts))
    find_option(config.task.option)
    require_consistent(config.given(), run, origin)
    return config


def main(args: Sequence[str]) -> None:
    if args[:1] == ["read"] or args[:1] == ["--compare"]:
        args = args[1:] if args[0] == "read" else args
        read(read_flags(ReadConfig, args, f"{COMMAND} read"))
        return
    config = parse(args)
    # Torch takes a second or more to load.
    from hamner.profile.capture import capture, run_for_nsight

    run, steps = config.training(), config.task.steps or 3
    if config.tool == "nsight":
        run_for_nsight(run, steps=steps, warmup=config.warmup)
    else:
        out = config.out or Path("runs") / f"{run.option}-profile"
        capture(run, out, steps=steps, warmup=config.warmup)


if __name__ == "__main__":
    run_command(main)
