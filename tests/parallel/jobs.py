"""Jobs of several processes run on this machine's CPU, with a limit on their time.

The processes come from the fork server of `tests.kills`, which has torch loaded; what torchrun
would put into their environment is put there.
"""

import os
import random
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hamner.config.sft import SftConfig
from hamner.config.train import TrainConfig
from hamner.sft.fine_tuning import fine_tune
from hamner.train.loop import train
from tests.kills import CONTEXT

PORTS = range(20_000, 32_768)
"""Below those that Linux gives to outgoing connections (ip_local_port_range), of which a job makes
dozens: a port of theirs, free when it was chosen, may be taken when a process comes to listen."""


def train_together(
    configs: Sequence[TrainConfig | SftConfig], count: int, output: Path, **options
) -> None:
    """`count` processes train one configuration after another; see `run_job`."""
    codes = run_job(_train_all, count, output, list(configs), **options)
    assert codes == [0] * count, said(output, count)


def run_job(
    function: Callable,
    count: int,
    output: Path,
    *args,
    machines: int = 1,
    timeout: float = 120,
) -> list[int | None]:
    """Every process of a job calls `function(ports, *args)`.

    Args:
        function: at the top of a module.
        count: processes.
        output: folder for what each says, rank_N.txt.
        machines: that the processes are to believe they are on.
        timeout: seconds, after which the processes are killed.

    Returns:
        Exit codes by rank.
    """
    output.mkdir(parents=True, exist_ok=True)
    ports = list(filter(_is_free, random.SystemRandom().sample(PORTS, 64)))
    processes = [
        CONTEXT.Process(target=_run, args=(function, rank, count, machines, ports, output, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not late, f"ranks {late} did not end in {timeout} s\n{said(output, count)}"
    return [process.exitcode for process in processes]


def run_module(ports: list[int], command: Sequence[str]) -> None:
    """A process runs `python -m COMMAND`; the function is its body."""
    enter(ports)
    sys.argv = list(command)
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def said(output: Path, count: int) -> str:
    """`said` gives what all processes printed."""
    return "".join((output / f"rank_{rank}.txt").read_text() for rank in range(count))


def enter(ports: list[int]) -> None:
    """A process takes the next port: each `train` opens the processes' group anew."""
    os.environ["MASTER_PORT"] = str(ports.pop(0))


def _train_all(ports: list[int], configs: list[TrainConfig | SftConfig]) -> None:
    for config in configs:
        enter(ports)
        if isinstance(config, SftConfig):
            fine_tune(config)
        else:
            train(config)


def _run(function, rank, count, machines, ports, output, args) -> None:
    """The function is the body of a process."""
    with (output / f"rank_{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank % (count // machines)),
        "LOCAL_WORLD_SIZE": str(count // machines),
        "MASTER_ADDR": "localhost",
    }
    function(ports, *args)


def _is_free(port: int) -> bool:
    with socket.socket() as found:
        try:
            found.bind(("localhost", port))
        except OSError:
            return False
    return True
