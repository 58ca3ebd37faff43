"""All GPUs of this machine are compared with one of them, in tokens/s, and slow links with fast
ones.

    python -m bench.scaling --output scaling --options a c [flags of hamner.train]

For each option one GPU, then DDP and FSDP2 on all of them with the same batch for each, default
flags, real data through the real loader. One GPU also takes the first steps of the others' whole
batch, in micro-batches: theirs must have its losses. Then option --slow-option with DDP where NCCL
is held back to what a PCIe-class link carries, by micro-batches a step and size of DDP's buckets.

    results.jsonl   one object a row, as soon as it is measured; a row that is there is not measured
                    again, so a run that was cut off goes on
    report.md       the tables, which are printed last
    *.txt           what the processes said
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from bench.scaling_job import Row
from hamner.cli import PATHS, run_command
from hamner.errors import UserError
from hamner.profile.report import table

TRANSPORTS = {
    "links": {},
    "shm": {"NCCL_P2P_DISABLE": "1"},
    "shm-1": {"NCCL_P2P_DISABLE": "1", "NCCL_MAX_NCHANNELS": "1"},
    "sockets": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1"},
}
"""what NCCL sends through, by its environment: the GPUs' own links; host memory, as GPUs do that
cannot reach each other; the same on one channel; the loopback network"""
MICRO_BATCHES = (1, 2, 4, 8)
BUCKETS_MIB = (100, 400)
"""beside the default, in steps of one micro-batch"""
COMPARED_LOSSES = 10
START_SECONDS, ROW_SECONDS = 90, 60
"""longest that the start of a job and each of its rows may take"""


@dataclass(frozen=True)
class Scaling:
    """Measure DDP and FSDP2 on all GPUs of this machine, and DDP on slow links."""

    output: Path = Path("runs/scaling")
    """folder; rows that it holds are not measured again"""
    options: tuple[str, ...] = ("a", "c")
    """of hamner.train"""
    steps: int = 30
    """timed in a row; a third of them on slow links"""
    gpus: int = torch.cuda.device_count()
    """of this machine, at least 2"""
    slow_option: str = "a"
    """that trains on slow links"""
    transports: tuple[str, ...] = ("shm-1", "sockets")
    """slow links, of shm, shm-1 and sockets; none without values"""
    minutes: float = 8.0
    """after which nothing new is started"""

    def __post_init__(self) -> None:
        if self.gpus < 2:
            raise UserError(f"--gpus is {self.gpus}; a comparison needs at least 2")
        unknown = set(self.transports) - set(TRANSPORTS)
        if unknown:
            raise UserError(f"--transports {min(unknown)} is not one of {', '.join(TRANSPORTS)}")


def plan(settings: Scaling) -> list[list[Row]]:
    """The function gives the rows by job: those of a job share processes and transport."""
    several = [
        Row(option, engine, settings.gpus, settings.steps, losses=COMPARED_LOSSES)
        for option in settings.options
        for engine in ("ddp", "fsdp")
    ]
    # The reference's speed is of no interest; two steps are the fewest that have deciles.
    one = [
        row
        for option in settings.options
        for row in (
            Row(option, "one", 1, settings.steps),
            Row(option, "one", 1, 2, micro_batches=settings.gpus, losses=COMPARED_LOSSES),
        )
    ]
    steps = max(2, settings.steps // 3)
    slow = [
        [
            *(
                Row(
                    settings.slow_option,
                    engine="ddp",
                    gpus=settings.gpus,
                    steps=steps,
                    micro_batches=m,
                    transport=transport,
                )
                for m in MICRO_BATCHES
            ),
            *(
                Row(
                    settings.slow_option,
                    engine="ddp",
                    gpus=settings.gpus,
                    steps=steps,
                    micro_batches=1,
                    bucket_mib=mib,
                    transport=transport,
                )
                for mib in BUCKETS_MIB
            ),
        ]
        for transport in settings.transports
    ]
    return [one, several, *slow]


def run_job(name: str, rows: Sequence[Row], settings: Scaling, flags: Sequence[str], end: float):
    """The function measures rows in processes of their own, until all are there, one fails or time
    is up.

    Returns:
        Why it ended early, or None.
    """
    job, said = settings.output / f"{name}.json", settings.output / f"{name}.txt"
    results = settings.output / "results.jsonl"
    job.write_text(
        json.dumps({"rows": [asdict(r) for r in rows], "flags": flags, "results": str(results)})
    )
    launcher = ["-m", "bench.scaling_job", str(job)]
    if rows[0].gpus > 1:
        count = str(rows[0].gpus)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count] + (
            launcher
        )
    limit = min(end, time.monotonic() + START_SECONDS + ROW_SECONDS * len(rows))
    known = len(read(settings.output))
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *launcher],
            stdout=file,
            stderr=file,
            env={**os.environ, **TRANSPORTS[rows[0].transport]},
            start_new_session=True,
        )
        while process.poll() is None and time.monotonic() < limit:
            time.sleep(0.5)
            known = show(settings.output, known)
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "it took too long"
    show(settings.output, known)
    lines = [line for line in said.read_text().splitlines() if "error: " in line]
    reason = lines[0] if lines else f"exit code {process.returncode}, see {said}"
    return reason if process.returncode else None


def read(output: Path) -> list[dict]:
    """The function gives the rows measured so far."""
    path = output / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(output: Path, known: int) -> int:
    """The function prints the rows beyond the first `known`, and returns how many there are."""
    results = read(output)
    for result in results[known:]:
        print(f"{row_of(result).name}: {result['p50_ms']:.1f} ms a step", flush=True)
    return len(results)


def row_of(result: dict) -> Row:
    """The function gives the row that a result is of."""
    return Row(**{name: result[name] for name in Row.__dataclass_fields__})


def describe(results: Sequence[dict], failures: dict[str, str]) -> str:
    """The function gives the tables of what was measured, and what was not."""
    by_row = {
        (r["option"], r["engine"], r["micro_batches"]): r
        for r in results
        if r["transport"] == "links"
    }
    parts = [f"Conditions: {c}." for c in dict.fromkeys(map(_conditions, results))]
    rows = [
        _scaling_cells(r, by_row) for r in results if r["transport"] == "links" and _is_speed(r)
    ]
    if rows:
        head = ("option", "GPUs", "engine", "graph", "tokens/s", "p10-p90", "peak GiB")
        parts.append(table((*head, "x one GPU", "losses apart"), rows))
    slow = [_slow_cells(r, by_row) for r in results if r["transport"] != "links"]
    if slow:
        head = ("link", "GB/s", "option", "micro-batches", "bucket MiB", "ms a step", "tokens/s")
        parts.append(table((*head, "x one GPU"), slow))
    parts += [f"Not measured: {name}: {reason}." for name, reason in failures.items()]
    return "\n\n".join(parts)


def _is_speed(result: dict) -> bool:
    """The function says whether its speed counts: a reference has only losses."""
    return result["micro_batches"] == 1


def _conditions(result: dict) -> str:
    found = result["conditions"]
    return ", ".join(f"{name} {value}" for name, value in found.items() if "clock" not in name)


def _speed(result: dict, percentile: str = "p50") -> float:
    """The function gives tokens/s of all GPUs."""
    return result["tokens_per_step"] / result[f"{percentile}_ms"] * 1e3


def _times_one(result: dict, by_row: dict) -> str:
    one = by_row.get((result["option"], "one", 1))
    return f"{_speed(result) / _speed(one):.3f}" if one else ""


def _scaling_cells(result: dict, by_row: dict) -> tuple[str, ...]:
    reference = by_row.get((result["option"], "one", result["gpus"]))
    apart = ""
    if reference and result["losses"]:
        pairs = zip(reference["losses"], result["losses"], strict=True)
        apart = f"{max(abs(a - b) for a, b in pairs):.5f}"
    return (
        result["option"],
        str(result["gpus"]),
        result["engine"],
        "yes" if result["cuda_graph"] else "no",
        f"{_speed(result):,.0f}",
        f"{_speed(result, 'p90'):,.0f}-{_speed(result, 'p10'):,.0f}",
        f"{result['peak_gib']:.1f}",
        _times_one(result, by_row),
        apart,
    )


def _slow_cells(result: dict, by_row: dict) -> tuple[str, ...]:
    link = "" if result["bus_gbs"] is None else f"{result['bus_gbs']:.1f}"
    return (
        result["transport"],
        link,
        result["option"],
        str(result["micro_batches"]),
        str(result["bucket_mib"]),
        f"{result['p50_ms']:.1f}",
        f"{_speed(result):,.0f}",
        _times_one(result, by_row),
    )


def unmeasured(rows: Sequence[Row], output: Path) -> Iterator[Row]:
    """The function gives those that are not in the results yet."""
    done = {row_of(result).name for result in read(output)}
    return itertools.filterfalse(lambda row: row.name in done, rows)


def main(settings: Scaling, flags: Sequence[str]) -> int:
    """The command measures and prints; it returns 1 if a row is missing."""
    settings.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * settings.minutes
    failures: dict[str, str] = {}
    for number, rows in enumerate(plan(settings)):
        for attempt in itertools.count():
            todo = [r for r in unmeasured(rows, settings.output) if r.name not in failures]
            if not todo:
                break
            if time.monotonic() >= end:
                failures |= {row.name: "no time was left" for row in todo}
                break
            reason = run_job(
                f"job{number}_{attempt}", rows=todo, settings=settings, flags=flags, end=end
            )
            if reason is not None:
                # A row that fails takes its processes with it; the others get new ones.
                failed = next(unmeasured(todo, settings.output))
                failures[failed.name] = reason
                print(f"{failed.name}: {reason}", flush=True)
    text = describe(read(settings.output), failures)
    (settings.output / "report.md").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if failures else 0


if __name__ == "__main__":
    how = {"return_unknown_args": True, "registry": PATHS}
    run_command(lambda args: main(*tyro.cli(Scaling, args=args, **how)))
