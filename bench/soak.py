"""A long run that is killed, starved and cut off is compared with the same run left in peace.

    python -m bench.soak --minutes 30
    python -m bench.soak --minutes 8 --device cuda --option a --save-every 100

The first third of the time trains undisturbed. Then the same run starts again on a slow disk that
fails, with a source that stalls and breaks, and is killed at random moments until it has made the
same steps. It must end with the same losses and the same weights, bit for bit; memory and file
handles must stay flat within each start.
"""

import json
import math
import random
import signal
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from bench.faulty_train import Faults
from bench.restarts import RestartedRun, is_same, make_output
from hamner.cli import read_flags, run_command
from hamner.errors import EXIT_INTERRUPTED

WARM_UP_SECONDS = 45.0
"""of a start, before its memory and handles are looked at"""
LARGEST_GROWTH = 0.02
"""of the memory within the time it was watched"""
ERRORS = 1.65
"""standard errors by which a growth must exceed that: one-sided, 95%"""
MOST_FILES = 4
"""by which the handles may differ: a save and a source open some"""
BAD_DAY = Faults(flush_seconds=1.0, disk_failure=0.05, source_stall=0.002, source_failure=0.0005)
STEPS = "1000000"
"""of the schedule: neither run gets there"""


class Growth(NamedTuple):
    """Memory has grown within the starts."""

    slope: float
    """MiB an hour"""
    share: float
    """of the mean level, in the longest time that a start was watched"""
    error: float
    """standard error of the share; 0 of one start"""

    @property
    def is_flat(self) -> bool:
        """Short starts differ by more than a run grows: what they may do by chance is no growth."""
        return self.share - ERRORS * self.error <= LARGEST_GROWTH


@dataclass(frozen=True)
class Soak:
    """Train under kills, a failing disk and a failing source; compare with the undisturbed run."""

    minutes: float = 30.0
    """in all"""
    option: str = "tiny"
    """of hamner.train"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to train"""
    data: str = "builtin"
    """SPEC of hamner.train"""
    save_every: int = 25
    """steps between checkpoints"""
    kill_every: float = 90.0
    """mean seconds of training between two kills"""
    seed: int = 0
    """of the kills"""
    output: Path = Path("runs/soak")
    """folder; an earlier result in it is replaced"""


class Run(RestartedRun):
    """A run is one of the two, by `bench.faulty_train`, which keeps a diary of memory and
    handles."""

    def __init__(self, soak: Soak, name: str, faults: Faults) -> None:
        self.diary = soak.output / f"{name}_diary.jsonl"
        given = soak.output / f"{name}_faults.json"
        given.write_text(json.dumps({"diary": str(self.diary), **asdict(faults)}))
        flags = [
            *("--option", soak.option, "--device", soak.device, "--data", soak.data),
            *("--steps", STEPS, "--log-every", "5"),
            *("--eval-every", "50", "--sample-every", "100", "--save-every", str(soak.save_every)),
        ]
        super().__init__(soak.output, name, ["bench.faulty_train", str(given)], flags)

    def growth(self, field: str) -> Growth:
        """The method gives by how much a field grows within the starts: least squares with a level
        of its own for each, and the error from how much their slopes differ."""
        starts = self.watched()
        moments, squares, longest = [], [], 0.0
        for lines in starts:
            at = statistics.fmean(line["seconds"] for line in lines)
            level = statistics.fmean(line[field] for line in lines)
            moments.append(sum((line["seconds"] - at) * (line[field] - level) for line in lines))
            squares.append(sum((line["seconds"] - at) ** 2 for line in lines))
            longest = max(longest, lines[-1]["seconds"] - lines[0]["seconds"])
        slope = sum(moments) / sum(squares)
        error = 0.0
        if len(starts) > 1:
            pairs = zip(moments, squares, strict=True)
            scatter = sum((moment - square * slope) ** 2 for moment, square in pairs)
            error = math.sqrt(scatter * len(starts) / (len(starts) - 1)) / sum(squares)
        mean = statistics.fmean(line[field] for lines in starts for line in lines)
        share = longest / mean if mean else 0.0
        return Growth(3600 * slope, slope * share, error * share)

    def files(self) -> tuple[int, int]:
        """The method gives the fewest and most median file handles of the starts' first and last
        thirds."""
        medians = []
        for lines in self.watched():
            third = max(1, len(lines) // 3)
            for part in (lines[:third], lines[-third:]):
                medians.append(statistics.median_low([line["files"] for line in part]))
        return min(medians), max(medians)

    def watched(self) -> list[list[dict]]:
        """The method gives the diary's lines by start, after its warm-up, of starts that lasted
        on."""
        starts: dict[int, list[dict]] = {}
        for text in self.diary.read_text().splitlines():
            line = json.loads(text)
            if line["seconds"] > WARM_UP_SECONDS:
                starts.setdefault(line["pid"], []).append(line)
        return [lines for lines in starts.values() if len(lines) >= 10]


def train_in_peace(run: Run, seconds: float) -> int:
    """The function trains for so long, stops with SIGTERM and gives the step it came to."""
    process = run.start()
    try:
        process.wait(seconds)
        raise SystemExit(f"the undisturbed run ended by itself, see {run.output}")
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    if process.wait(120) != EXIT_INTERRUPTED:
        raise SystemExit(f"the undisturbed run did not stop in order, see {run.output}")
    return run.saved_step


def train_disturbed(run: Run, last_step: int, soak: Soak) -> dict[str, int]:
    """The run is killed and restarted until `last_step` is saved; returns how often each end of a
    start came."""
    chance = random.Random(soak.seed)
    ends = {"killed": 0, "terminated": 0, "failed": 0}
    patience = time.monotonic() + 3 * 60 * soak.minutes
    while run.saved_step < last_step:
        if time.monotonic() > patience:
            raise SystemExit(f"stuck at step {run.saved_step} of {last_step}, see {run.output}")
        process = run.start("--stop-after", str(last_step - run.saved_step))
        try:
            code = process.wait(chance.uniform(0, 2 * soak.kill_every))
            ends["failed"] += code != 0
        except subprocess.TimeoutExpired:
            number = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
            process.send_signal(number)
            process.wait(120)
            ends["killed" if number == signal.SIGKILL else "terminated"] += 1
    return ends


def main(soak: Soak) -> int:
    """The command runs both and prints the figures; it returns 1 if anything differs or grows."""
    make_output(soak.output, ("undisturbed", "disturbed"))
    started = time.monotonic()
    peace = Run(soak, "undisturbed", Faults())
    last_step = train_in_peace(peace, 60 * soak.minutes / 3)
    print(f"undisturbed: {last_step:,} steps in {time.monotonic() - started:.0f} s", flush=True)

    started = time.monotonic()
    disturbed = Run(soak, "disturbed", BAD_DAY)
    ends = train_disturbed(disturbed, last_step, soak)
    print(
        f"disturbed: {last_step:,} steps in {time.monotonic() - started:.0f} s; "
        + ", ".join(f"{count} {end}" for end, count in ends.items()),
        flush=True,
    )
    text = disturbed.output.read_text()
    warnings = ("could not be saved", "cannot be written", "source has failed")
    print("; ".join(f"{text.count(warning)} x '{warning}'" for warning in warnings))

    same = is_same(peace, disturbed)
    flat = [is_flat(run) for run in (peace, disturbed)]
    return 0 if same and all(flat) else 1


def is_flat(run: Run) -> bool:
    """The function says whether memory and handles stay level within the starts, and prints the
    figures."""
    name, flat = run.folder.name, True
    if not run.watched():
        print(f"{name}: no start was watched long enough to judge its memory")
        return False
    for field in ("rss_mib", "vram_mib", "reserved_mib"):
        grown = run.growth(field)
        flat &= grown.is_flat
        share = f"{grown.share:+.2%} (standard error {grown.error:.2%})"
        print(f"{name}: {field} {grown.slope:+.1f} MiB/h, {share} of its level while watched")
    fewest, most = run.files()
    print(f"{name}: {fewest} to {most} file handles")
    return flat and most - fewest <= MOST_FILES


if __name__ == "__main__":
    run_command(lambda args: main(read_flags(Soak, args, "bench.soak")))
