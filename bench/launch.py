"""A module runs in one process or, by torchrun, in several of this machine, for a limited time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.5
TOO_LONG = "it took too long"
LEAVE_SECONDS = 40.0
"""that torchrun has to end its processes, of which it gives them 30"""


def launch(
    command: Sequence[str],
    count: int,
    said: Path,
    *,
    limit: float,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> str | None:
    """`python -m COMMAND` runs in `count` processes until it ends or time is up.

    Args:
        command: a module and its arguments.
        count: processes.
        said: file for what they print; it is emptied.
        limit: of `time.monotonic`.
        environment: variables beside this process's own.
        meanwhile: called again and again.

    Returns:
        Why it failed, or None.
    """
    module = ["-m", *command]
    if count > 1:
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
        module = ["-m", *launcher, *module]
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *module],
            stdout=file,
            stderr=file,
            env={**os.environ, **(environment or {})},
        )
        try:
            while process.poll() is None and time.monotonic() < limit:
                time.sleep(POLL_SECONDS)
                meanwhile()
            if process.returncode is None:
                return TOO_LONG
        finally:  # also where this process is interrupted
            if process.returncode is None:
                _end(process)
    return None if process.returncode == 0 else reason(said, process.returncode)


def _end(process: subprocess.Popen) -> None:
    """The process ends with those that it started: they have sessions of their own, so a signal to
    it alone lets it end them first."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def reason(said: Path, code: int) -> str:
    """The function gives the sentence of a failed job, or else its exit code."""
    lines = said.read_text(errors="replace").splitlines()
    sentence = next((line for line in lines if line.startswith("error: ")), None)
    return sentence or f"exit code {code}, see {said}"
