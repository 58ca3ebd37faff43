"""`hamner.train` has a bad day here: a slow disk that fails, a source that breaks; a diary is kept.

python -m bench.faulty_train FAULTS.json [flags of hamner.train]

FAULTS.json has `diary` (a file that gets memory and file handles every second) and the fields of
`Faults`. The faults are real exceptions and real waiting inside the process; what the operating
system does at a kill is up to `bench.soak`.
"""

import json
import os
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hamner.checkpoint import format as checkpoint
from hamner.checkpoint import run_folder, writer
from hamner.checkpoint.run_folder import append_record
from hamner.cli import run_command
from hamner.data import loader
from hamner.train.__main__ import main


@dataclass(frozen=True)
class Faults:
    """The faults say how bad the day is; chances are per call."""

    flush_seconds: float = 0.0
    """by which each of the six flushes of a checkpoint takes longer"""
    disk_failure: float = 0.0
    """of a flush of a checkpoint's file, or of an append to metrics.jsonl"""
    source_stall: float = 0.0
    """of half a second before a document"""
    source_failure: float = 0.0
    """of a connection error in the place of a document"""


def inject(faults: Faults) -> None:
    """The function puts the faults under the checkpoint writer, the records and the sources."""
    chance = random.Random()

    def fail_disk() -> None:
        if chance.random() < faults.disk_failure:
            raise OSError(28, os.strerror(28))

    real_flush, real_append, real_open = checkpoint.flush, append_record, loader.open_source

    def flush(path: Path) -> None:
        time.sleep(faults.flush_seconds)
        fail_disk()
        real_flush(path)

    def append(path: Path, *records: dict) -> None:
        fail_disk()
        real_append(path, *records)

    class FaultySource:
        def __init__(self, source) -> None:
            self.identity, self.source = source.identity, source

        def tokens(self, *args):
            for item in self.source.tokens(*args):
                if chance.random() < faults.source_stall:
                    time.sleep(0.5)
                if chance.random() < faults.source_failure:
                    raise ConnectionError("the soak's source has failed")
                yield item

    for module in (checkpoint, writer):
        module.flush = flush
    run_folder.append_record = append
    loader.open_source = lambda *args: FaultySource(real_open(*args))


def keep_diary(path: Path) -> None:
    """A thread writes down memory and file handles every second."""
    started = time.monotonic()
    page = os.sysconf("SC_PAGE_SIZE")

    def write() -> None:
        while True:
            time.sleep(1.0)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            is_gpu = torch.cuda.is_available()
            line = {
                "pid": os.getpid(),
                "seconds": time.monotonic() - started,
                "rss_mib": resident / 2**20,
                "vram_mib": torch.cuda.memory_allocated() / 2**20 if is_gpu else 0.0,
                "reserved_mib": torch.cuda.memory_reserved() / 2**20 if is_gpu else 0.0,
                "files": len(list(Path("/proc/self/fd").iterdir())),
            }
            append_record(path, line)

    threading.Thread(target=write, daemon=True).start()


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv.pop(1)).read_text())
    keep_diary(Path(settings.pop("diary")))
    inject(Faults(**settings))
    run_command(main)
