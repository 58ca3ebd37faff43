"""Processes of a job give each other signs of life, so that it ends soon and with one message.

A collective whose partner is gone waits, on a GPU even out of Python's reach. So each process has a
thread that lets the others know, through the launcher's store, that it lives and where it is, and
that ends the process once another is dead or has failed.
"""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

import hamner
from hamner.errors import EXIT_FAILED
from hamner.parallel.ranks import Rank

INTERVAL = 1.0
"""seconds between signs of life"""
SILENT = 30.0
"""seconds without one, after which a process of another machine or container counts as dead; of
those that this one sees, the operating system is asked"""
GRACE = 10.0
"""seconds that a process has to leave by itself once another has failed"""
CLAIM_POLL = 0.05
"""seconds between two looks for a message of another process"""
_PACKAGE = str(Path(hamner.__file__).parent)
_HERE = str(Path(__file__).parent)


class FailureWatch:
    """A watch looks after the other processes, and ends this one once one of them has failed.

    Args:
        store: shared by all, but of this object only, since its calls may block.
    """

    def __init__(self, store: dist.Store, rank: Rank) -> None:
        self.store, self.rank = store, rank
        self.step = 0
        """the last one this process has finished"""
        self._beats = 0
        self._is_leaving = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hamner-failures", daemon=True)
        self._give_sign()

    def watch(self) -> None:
        """The watch starts to look after the others, which have all given a sign."""
        self._thread.start()

    def mark_leaving(self) -> None:
        """The others learn that this process may be gone soon, with nothing wrong."""
        self._is_leaving = True
        self._give_sign()

    def close(self) -> None:
        """The watch stops looking after the others."""
        self._stop.set()
        self._thread.join()

    def claim(self) -> bool:
        """`claim` is true in the first process to fail, which is the one that says why; where
        nobody can know who that is, in the first process of each machine."""
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:  # the store is gone with the launcher, and maybe rank 0 with it
            return self.rank.local_rank == 0

    def end(self, cause: str) -> None:
        """The job ends; `cause` is the message, which names the rank that is to blame."""
        # Who claims must speak at once, for the others leave, and the store with them.
        if self.claim():
            say(f"{cause}; the job ends; the last checkpoint is whole, --resume goes on")
        self.exit(EXIT_FAILED)

    def exit(self, code: int) -> None:
        """This process ends whatever its other threads wait for."""
        sys.stderr.flush()
        os._exit(code)

    def wait_for_cause(self) -> None:
        """The watch has time to find why a collective failed; it ends the process if it does."""
        self._stop.wait(4 * INTERVAL)

    def wait_for_claim(self) -> None:
        """This process stays until another has begun to say why the job ends: the launcher sends
        all a signal once one is gone, and who has not begun would not speak any more."""
        deadline = time.monotonic() + GRACE
        with contextlib.suppress(RuntimeError):  # the store is gone with who has spoken
            while not self.store.check(["failures"]) and time.monotonic() < deadline:
                time.sleep(CLAIM_POLL)

    def where_it_hangs(self) -> str:
        """The function says which ranks hold up the others: those behind that wait for nobody."""
        signs = self._signs()
        first = min(sign["step"] for sign in signs.values())
        behind = {rank: sign for rank, sign in signs.items() if sign["step"] == first}
        busy = {rank: sign for rank, sign in behind.items() if not sign["waits"]} or behind
        return ", ".join(
            f"rank {rank} on {sign['host']} is at {sign['frame']} in step {sign['step'] + 1:,}"
            for rank, sign in busy.items()
        )

    def _watch(self) -> None:
        """The thread runs this function."""
        changes: dict[int, tuple[int, int]] = {}
        """each rank's last sign that was another than before, and how many this one had given when
        it was seen: a clock would count the time in which all processes were stopped"""
        while not self._stop.wait(INTERVAL):
            try:
                self._give_sign()
                signs = self._signs()
                has_failed = self.store.check(["failures"])
            except RuntimeError:
                if not self._stop.wait(INTERVAL):
                    self.end("the launcher of this job does not answer any more")
                return
            if has_failed:
                if not self._stop.wait(GRACE):
                    self.exit(EXIT_FAILED)
                return
            del signs[self.rank.global_rank]
            for rank, sign in signs.items():
                if rank not in changes or changes[rank][0] != sign["beats"]:
                    changes[rank] = sign["beats"], self._beats
                silent = INTERVAL * (self._beats - changes[rank][1])
                if not sign["leaves"] and _is_dead(sign, silent):
                    self.end(
                        f"rank {rank} on {sign['host']} is dead (killed, or its machine is gone); "
                        f"rank {self.rank.global_rank} was in step {self.step + 1:,}"
                    )

    def _give_sign(self) -> None:
        self._beats += 1
        frame, waits = _where_main_thread_is()
        sign = {
            "beats": self._beats,
            "host": socket.gethostname(),
            "system": _system(),
            "pid": os.getpid(),
            "step": self.step,
            "frame": frame,
            "waits": waits,
            "leaves": self._is_leaving,
        }
        self.store.set(str(self.rank.global_rank), json.dumps(sign))

    def _signs(self) -> dict[int, dict]:
        """The function reads the last sign of every process, by rank."""
        ranks = range(self.rank.world_size)
        values = self.store.multi_get([str(rank) for rank in ranks])
        return {rank: json.loads(value) for rank, value in zip(ranks, values, strict=True)}


@functools.cache
def _system() -> str:
    """The function names the system whose processes this one sees: a machine's, or a container's.

    Containers and machines may share a host name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _is_dead(sign: dict, silent: float) -> bool:
    """A process of this system is dead if that says so, another after `silent` seconds."""
    if sign["system"] != _system():
        return silent > SILENT
    try:
        state = Path(f"/proc/{sign['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _where_main_thread_is() -> tuple[str, bool]:
    """The function finds its innermost line in Hamner, and whether it waits for others."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "its start or end", False
    file = frame.f_code.co_filename
    line = f"{Path(file).relative_to(_PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
    return line, file.startswith(_HERE)


def say(message: str) -> None:
    """The one message of a failed job is printed."""
    os.write(2, f"error: {message}\n".encode())
