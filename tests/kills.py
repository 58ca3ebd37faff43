"""Processes that die: forked from a server that has torch loaded, killed for good.

Each start is a process of its own which runs a command as its command line does. A fork server
spares it the seconds of importing torch, so that many kills fit into a test.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hamner.cli import run_command

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])

PHASES = {
    "step": (
        "train/step.py",
        {"TrainStep.step", "TrainStep._take", "TrainStep._forward_backward", "TrainStep._update"},
    ),
    "update": (
        "train/optimizer.py",
        {"Optimizer.step", "Optimizer._step_adamw", "Optimizer.drop_gradients"},
    ),
    "evaluation": ("train/evaluation.py", {"validation_loss", "_mean_loss"}),
    "log line": (
        "train/log.py",
        {"TrainLog.record", "TrainLog.drain", "TrainLog._read", "TrainLog._write_line"},
    ),
    "log": ("checkpoint/run_folder.py", {"RecordLog.append", "RecordLog.flush", "append_record"}),
    "snapshot": ("checkpoint/writer.py", {"BackgroundSaver.begin", "BackgroundSaver._copy"}),
    "writer": (
        "checkpoint/format.py",
        {
            *("save", "_make_anew", "Writer.write", "finish_save", "find", "retain", "flush"),
            *("_remove", "_describe"),
        },
    ),
    "resume": ("checkpoint/run_folder.py", {"RunFolder.rewind", "RunFolder.start", "write_whole"}),
    "shards": ("data/prepare.py", {"prepare", "_write_shards", "_ShardPair.write", "_write"}),
}
"""where a process may be killed: file and functions, line by line"""


class LineTracer:
    """Counts the lines that run in a phase, and kills the process at one of them.

    Args:
        phase: of PHASES to be killed in, or None to count only.
        line: which of the phase's lines is the last.
    """

    def __init__(self, phase: str | None = None, line: int = 0) -> None:
        self.phase, self.line = phase, line
        self.counts: Counter[str] = Counter()
        sys.settrace(self.on_call)
        threading.settrace(self.on_call)

    def on_call(self, frame, event, argument):
        """Choose the functions to follow."""
        code = frame.f_code
        for phase, (file, names) in PHASES.items():
            if code.co_qualname in names and code.co_filename.endswith(f"hamner/{file}"):
                return lambda frame, event, argument: self.on_line(phase, event)
        return None

    def on_line(self, phase: str, event: str):
        """Count a line; the fatal one does not run."""
        if event == "line":
            self.counts[phase] += 1
            if phase == self.phase and self.counts[phase] == self.line:
                os.kill(os.getpid(), signal.SIGKILL)
        return lambda frame, event, argument: self.on_line(phase, event)


def start(command: str, args: Sequence[str], output: Path, *, counts=None, **tracing):
    """Start `python -m COMMAND ARGS` with its output in a file; see `LineTracer`.

    The file is emptied here, not by the process: one killed before it came to that would leave
    what an earlier start had printed. `counts` is a queue for the lines of each phase.
    """
    output.write_text("")
    process = CONTEXT.Process(target=_run, args=(command, list(args), output, tracing, counts))
    process.start()
    return process


def count_lines(command: str, args: Sequence[str], output: Path) -> Counter[str]:
    """Run to the end; the lines of each phase."""
    queue = CONTEXT.SimpleQueue()
    process = start(command, args, output, counts=queue)
    counts = queue.get()
    process.join()
    return counts


def _run(command: str, args: list[str], output: Path, tracing: dict, counts) -> None:
    """Body of the process."""
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [command, *args]
    main = importlib.import_module(f"{command}.__main__").main
    tracer = LineTracer(**tracing) if tracing or counts else None
    try:
        run_command(main)
    finally:
        if counts:
            counts.put(tracer.counts)
