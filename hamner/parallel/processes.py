"""The processes of a job know who they are, agree on what they do, and end together.

Agreement goes through the CPU (gloo), so it never waits for a GPU. Between steps it costs one
message of a few bytes.
"""

import contextlib
import datetime
import logging
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from hamner.config.model import flag
from hamner.config.train import TrainConfig
from hamner.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError
from hamner.parallel.device import uses_gpu
from hamner.parallel.failures import FailureWatch, say
from hamner.parallel.ranks import Rank

T = TypeVar("T")

COLLECTIVE_TIMEOUT = 1.5
"""times --hang-minutes, after which PyTorch itself gives a collective up: the second net"""
FOREVER = datetime.timedelta(days=7)
SHOWN = 4
"""flags that differ, which a message names"""
_LOST_PROCESS = ("gloo", "NCCL", "ProcessGroup", "Connection closed", "Connection reset")
"""in what a collective raises when another process is gone"""


class FoundElsewhere(UserError):
    """The exception is bad input that another process has found, and speaks of."""


class SingleProcess:
    """The only process of a run agrees with itself."""

    rank = Rank()
    log: TextIO | None = None

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """The result is each number's largest value over the processes."""
        return list(numbers)

    def any(self, flag: bool) -> bool:
        """The answer says whether it is true in any process. Every process must ask."""
        return bool(self.all_reduce_max([flag])[0])

    def all(self, flag: bool) -> bool:
        """The answer says whether it is true in every process. Every process must ask."""
        return not self.any(not flag)

    def all_reduce_min(self, number: int) -> int:
        """The result is the number's smallest value over the processes."""
        return -self.all_reduce_max([-number])[0]

    def from_main(self, function: Callable[[], T]) -> T:
        """The result is what `function` returns in rank 0, the only one to call it.

        Raises:
            UserError: `function` raised it; in the others a `FoundElsewhere` that says the same.
        """
        return function()

    def require_same(self, ours: T, sentence: Callable[[T], str]) -> None:
        """What this process has must be what rank 0 has. Every process must ask.

        Args:
            ours: can be pickled and compared.
            sentence: says, given rank 0's, what is wrong here.

        Raises:
            UserError: it is not; in the processes where it is, a `FoundElsewhere`.
        """
        theirs = self.from_main(lambda: ours)
        differs = ours != theirs
        if self.any(differs):
            raise UserError(sentence(theirs)) if differs else FoundElsewhere("another rank differs")

    def sum_(self, tensor: Tensor) -> None:
        """A tensor on the device becomes its sum over the processes, without waiting for it."""

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process gets its part of `items`, in order; ranks before it have those before.

        Args:
            items: as many as a multiple of the processes.
        """
        count = len(items) // self.rank.world_size
        return items[self.rank.global_rank * count : (self.rank.global_rank + 1) * count]

    def open_log(self, folder: Path) -> tuple[Console | None, Console | None]:
        """Each of several processes writes down what it says in rank_N.txt of `folder`.

        Returns:
            Where a `Display` writes to (None: the terminal), and its log, if any.
        """
        return None, None

    def step_done(self, step: int) -> None:
        """The others learn how far this process is."""

    def give_up(self, minutes: float) -> None:
        """A job of several processes ends, because no step has ended for so long."""


class MultipleProcesses(SingleProcess):
    """This is one of the processes that torchrun started.

    Raises:
        UserError: the machine has fewer GPUs than processes.
    """

    def __init__(self, rank: Rank, config: TrainConfig) -> None:
        self.rank = rank
        backend = "gloo"
        if uses_gpu(config.device):
            if rank.local_world_size > torch.cuda.device_count():
                raise UserError(
                    f"torchrun started {rank.local_world_size} processes on a machine with "
                    f"{torch.cuda.device_count()} GPUs; lower --nproc-per-node"
                )
            torch.cuda.set_device(rank.local_rank)
            # All work goes to one stream that a CUDA graph can record, unlike the default one: what
            # FSDP2 and DDP tie to the stream they are built on then belongs to the recording.
            torch.cuda.set_stream(torch.cuda.Stream())
            backend = "cpu:gloo,cuda:nccl"
        minutes = COLLECTIVE_TIMEOUT * config.hang_minutes
        self.timeout = datetime.timedelta(minutes=minutes) if minutes else FOREVER
        store, *_ = next(dist.rendezvous("env://"))
        # torchrun's store outlives a failed start, with the addresses of processes that are gone.
        store = dist.PrefixStore(f"start_{rank.restarts}", store)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("collectives", store),
            rank=rank.global_rank,
            world_size=rank.world_size,
            timeout=self.timeout,
        )
        if not rank.is_main:
            logging.getLogger().addHandler(logging.NullHandler())
        self.failures = FailureWatch(dist.PrefixStore("failures", store.clone()), rank)
        self.any(False)  # nobody looks for one that is not there yet
        self.failures.watch()

    def all_reduce_max(self, numbers):
        values = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def from_main(self, function):
        value = found = None
        if self.rank.is_main:
            try:
                value = function()
            except UserError as error:
                found = error
        outcome = [value, found and str(found)]
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if found is not None:
            raise found
        value, sentence = outcome
        if sentence is not None:
            raise FoundElsewhere(sentence)
        return value

    def require_same_start(self, config: TrainConfig) -> None:
        """What would train another model in one process than in the others is refused.

        Raises:
            UserError: this process has other flags than rank 0, or its machine another number of
                processes or no GPU; see `require_same`.
        """
        ours: dict[str, Any] = {"nproc_per_node": self.rank.local_world_size}
        for name, value in config.to_json().items():
            ours |= value if isinstance(value, dict) else {name: value}
        ours["device"] += " (a GPU)" if uses_gpu(config.device) else " (the CPU)"
        # Every process may have its own memory: the smallest counts for all.
        del ours["vram_budget"]

        def differences(theirs: dict[str, Any]) -> str:
            different = [
                f"--{flag(name)} {ours.get(name)} (there {theirs.get(name)})"
                for name in dict.fromkeys((*ours, *theirs))
                if ours.get(name) != theirs.get(name)
            ]
            more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
            return (
                f"started otherwise than rank 0: {', '.join(different[:SHOWN])}{more}; give all "
                "processes of a job the same flags, on machines with as many processes each that "
                "see --run-dir"
            )

        self.require_same(ours, differences)

    def sum_(self, tensor):
        dist.all_reduce(tensor)

    def open_log(self, folder):
        """Rank 0 has the terminal and its log, the others their logs only."""
        path = folder / f"rank_{self.rank.global_rank}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            self.log = path.open("a", encoding="utf-8", errors="replace", buffering=1)
        except OSError as error:
            raise UserError(
                f"--run-dir: {path} cannot be written ({error.strerror}); every machine of the job "
                "must see the run's folder"
            ) from error
        handlers: list[logging.Handler] = [logging.StreamHandler(self.log)]
        if self.rank.is_main:
            handlers.append(logging.StreamHandler())
        logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
        log = Console(file=self.log, highlight=False, width=200)
        return (None, log) if self.rank.is_main else (log, None)

    def step_done(self, step):
        self.failures.step = step

    def give_up(self, minutes):
        try:
            where = self.failures.where_it_hangs()
        except RuntimeError:  # the store is gone with the process that ended the job
            self.failures.exit(EXIT_FAILED)
        self.failures.end(f"no step for {minutes:g} minutes: {where}")

    def leave(self) -> None:
        """The processes part in order: nobody before the others."""
        self.failures.mark_leaving()
        self.any(False)
        self.failures.close()
        dist.destroy_process_group()

    def fail(self, error: BaseException) -> int:
        """This process of a job that has failed says why; the result is its exit code.

        The first to fail says why, in one line with its rank; the traceback is in its log. The
        others fail of its absence, and are silent.
        """
        # The launcher ends the others with a signal; the message must come first.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        is_bad_input = isinstance(error, UserError)
        if self.log is not None:
            traceback.print_exception(error, file=self.log)
        if isinstance(error, FoundElsewhere):
            self.failures.wait_for_claim()
            return EXIT_BAD_INPUT
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_PROCESS):
            # Another process has ended: its own message, or the watch's, says more than this one.
            self.failures.wait_for_cause()
        if self.failures.claim():
            text = str(error) if is_bad_input else f"{type(error).__name__}: {error}"
            where = "" if is_bad_input or self.log is None else f" (traceback in {self.log.name})"
            rank = f"rank {self.rank.global_rank} on {socket.gethostname()}"
            say(f"{rank}: {' '.join(text.split())}{where}")
            if self.log is None and not is_bad_input:
                traceback.print_exception(error)
        return EXIT_BAD_INPUT if is_bad_input else EXIT_FAILED


@contextlib.contextmanager
def open_processes(config: TrainConfig) -> Iterator[SingleProcess]:
    """The context gives the processes of this job: a single one, or those that torchrun started.

    If one of several fails, the job has one message, and this process ends here.

    Raises:
        UserError: see `MultipleProcesses`.
    """
    rank = Rank.read()
    if rank.world_size == 1:
        yield SingleProcess()
        return
    processes = MultipleProcesses(rank, config)
    try:
        processes.require_same_start(config)
        yield processes
        processes.leave()
    except Exception as error:
        code = processes.fail(error)
        sys.stdout.flush()
        processes.failures.exit(code)
