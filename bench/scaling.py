"""Several GPUs of this machine are compared with one of them: speed, losses, messages, resumed
runs.

    python -m bench.scaling --output scaling --options a c [flags of hamner.train]

For each option one GPU, then DDP and FSDP2 on several of them with the same batch for each, default
flags, real data through the real loader, and last one GPU again. Without --data that is the
built-in corpus, tokenized beforehand. One GPU also takes the first steps of the others' whole
batch, in micro-batches: theirs must have its losses and gradient norms. A trace of three more steps
says how long messages take, what of that nothing hides, and what else takes longer than on one GPU.
Then the first option is killed on all GPUs and resumed on one, and the other way round. Where
--transports names slow links, option --slow-option follows with DDP where NCCL is held back to what
a PCIe-class link carries, by micro-batches a step and size of DDP's buckets.

    shards-N/         the built-in corpus in tokens, by size of the vocabulary
    results.jsonl     one object a row, as soon as it is measured; a row that is there is not
                      measured again, so a run that was cut off goes on
    moves.jsonl       the same of the runs that were killed and resumed
    report.md         the tables, which are printed last
    scaling.png       times one GPU, by GPUs
    *.trace.json.gz   for `hamner.profile read`
    *.txt             what the processes said
"""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro

from bench import launch, moves
from bench.scaling_job import Row, configure
from bench.scaling_report import describe, draw, row_of
from hamner.cli import FLAG_RULES, run_command
from hamner.config.train import TrainConfig
from hamner.data.prepare import prepare
from hamner.data.tokenizer import load_tokenizer
from hamner.errors import UserError
from hamner.files import read_objects
from hamner.parallel.device import uses_gpu
from hamner.train.initial import with_chat_tokens

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
NO_TIME = "no time was left"
RESULTS = "results.jsonl"


def numbers_to_compare(found: int) -> tuple[int, ...]:
    """The function gives the numbers of GPUs that are measured by default: all, and of 8 also 4."""
    return (4, 8) if found == 8 else (found,)


@dataclass(frozen=True)
class Scaling:
    """Measure DDP and FSDP2 on several GPUs of this machine, and DDP on slow links."""

    output: Path = Path("runs/scaling")
    """folder; rows that it holds are not measured again"""
    options: tuple[str, ...] = ("a", "c")
    """of hamner.train"""
    steps: int = 30
    """timed in a row; a third of them on slow links"""
    gpus: tuple[int, ...] = numbers_to_compare(torch.cuda.device_count())
    """of this machine, at least 2; default all, and of 8 also 4. Several numbers are measured one
    after another, and what is measured once is measured on the last"""
    moves: bool = True
    """kill runs of the first option and resume them on other numbers of GPUs"""
    slow_option: str = "a"
    """that trains on slow links"""
    transports: tuple[str, ...] = ()
    """slow links, of shm, shm-1 and sockets"""
    minutes: float = 8.0
    """after which nothing new is started"""

    def __post_init__(self) -> None:
        if min(self.gpus, default=0) < 2:
            given = " ".join(map(str, self.gpus)) or "empty"
            raise UserError(f"--gpus is {given}; a comparison needs at least 2")
        unknown = set(self.transports) - set(TRANSPORTS)
        if unknown:
            raise UserError(f"--transports {min(unknown)} is not one of {', '.join(TRANSPORTS)}")
        if not self.options:
            raise UserError("--options is empty; name one or more of hamner.train's")
        if self.steps < 2:
            raise UserError(f"--steps {self.steps} has no deciles; use 2 or more")
        for name in ("options", "gpus", "transports"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"--{name} {' '.join(map(str, values))} names one twice")


def plan(settings: Scaling) -> list[list[Row]]:
    """The function gives the rows by job: those of a job share processes and transport."""
    # The reference's speed is of no interest; two steps are the fewest that have deciles.
    one = [
        row
        for option in settings.options
        for row in (
            Row(option, "one", 1, settings.steps, trace=True),
            *(
                Row(option, "one", 1, 2, micro_batches=gpus, losses=COMPARED_LOSSES)
                for gpus in settings.gpus
            ),
        )
    ]
    several = [
        [
            Row(option, engine, gpus, settings.steps, losses=COMPARED_LOSSES, trace=True)
            for option in settings.options
            for engine in ("ddp", "fsdp")
        ]
        for gpus in settings.gpus
    ]
    # One GPU's clocks may have changed by then: ratios to both say how much.
    again = [Row(option, "one", 1, settings.steps, again=True) for option in settings.options]
    slow = [slow_rows(settings, transport) for transport in settings.transports]
    return [one, *several, again, *slow]


def slow_rows(settings: Scaling, transport: str) -> list[Row]:
    """The function gives the rows of a slow link."""
    sizes = [{"micro_batches": count} for count in MICRO_BATCHES]
    sizes += [{"bucket_mib": mib} for mib in BUCKETS_MIB]
    steps = max(2, settings.steps // 3)
    return [
        Row(settings.slow_option, "ddp", settings.gpus[-1], steps, transport=transport, **size)
        for size in sizes
    ]


def require_measurable(row: Row, flags: Sequence[str]) -> None:
    """The function refuses a row before anything is measured.

    Raises:
        UserError: the flags make no sense, or this machine has too few GPUs.
        SystemExit: code 2 on unknown flags.
    """
    found = torch.cuda.device_count()
    if uses_gpu(configure(row, list(flags)).device) and row.gpus > found:
        raise UserError(f"--gpus {row.gpus}: this machine has {found}")


class Shards:
    """The built-in corpus is tokenized for the rows to read, once for each size of vocabulary.

    Every process tokenizes the batch of all of them, so with many GPUs the loader's time would be
    measured instead of theirs.

    Args:
        flags: of `hamner.train`; where they name data, that is read.
        output: folder of the measurement.
    """

    def __init__(self, flags: Sequence[str], output: Path) -> None:
        self.flags, self.output = list(flags), output
        self._prepared: dict[int, str] = {}

    def read_by(self, row: Row) -> Row:
        """The row reads them, unless it is to read something else."""
        config = configure(row, self.flags)
        return replace(row, data=self._spec(config)) if config.data == TrainConfig.data else row

    def _spec(self, config: TrainConfig) -> str:
        size = config.model.vocab_size
        if size not in self._prepared:
            folder = self.output / f"shards-{size}"
            tokenizer = with_chat_tokens(load_tokenizer(config.tokenizer, size), config)
            prepare(config.data, folder, tokenizer, val_fraction=config.val_fraction)
            self._prepared[size] = f"shards:{folder}"
        return self._prepared[size]


def read(output: Path) -> list[dict]:
    """The function gives the rows measured so far.

    Raises:
        UserError: they lack what is compared.
    """
    rows = list(read_objects(output / RESULTS))
    if any("grad_norms" not in row for row in rows):
        raise UserError(
            f"{output / RESULTS} has rows of an earlier version, without norms of gradients: take "
            "another --output"
        )
    return rows


def unmeasured(rows: Sequence[Row], output: Path) -> Iterator[Row]:
    """The function gives those that are not in the results yet."""
    done = {row_of(result).name for result in read(output)}
    return itertools.filterfalse(lambda row: row.name in done, rows)


class Measurement:
    """The rows are measured until time is up, and what fails is named.

    Args:
        settings: which rows.
        flags: of `hamner.train`.
        shards: what the runs that move read.
    """

    def __init__(self, settings: Scaling, flags: Sequence[str], shards: Shards) -> None:
        self.settings, self.output, self.flags = settings, settings.output, list(flags)
        self.shards = shards
        self.end = time.monotonic() + 60 * settings.minutes
        self.failures: dict[str, str] = {}
        self.shown = len(read(self.output))

    @property
    def is_over(self) -> bool:
        """Nothing new is started any more."""
        return time.monotonic() >= self.end

    def measure(self, rows: Sequence[Row]) -> None:
        """The rows of a job are measured; one that fails takes its processes with it, and those
        after it get new ones."""
        for attempt in itertools.count():
            todo = [r for r in unmeasured(rows, self.output) if r.name not in self.failures]
            if not todo:
                return
            if self.is_over:
                self.failures |= {row.name: NO_TIME for row in todo}
                return
            again = "-again" if todo[0].again else ""
            name = f"{todo[0].transport}-{todo[0].gpus}{again}-{attempt}"
            reason = self.run_job(name, todo)
            if reason is not None:
                failed = next(unmeasured(todo, self.output), None)
                self._note(failed.name if failed else f"the end of job {name}", reason)

    def run_job(self, name: str, rows: Sequence[Row]) -> str | None:
        """Rows are measured in processes of their own, until all are there, one fails or time is
        up.

        Returns:
            Why it ended early, or None.
        """
        job = self.output / f"{name}.json"
        results = str(self.output / RESULTS)
        rows_ = [asdict(row) for row in rows]
        job.write_text(json.dumps({"rows": rows_, "flags": self.flags, "results": results}))
        reason = launch.launch(
            ["bench.scaling_job", str(job)],
            rows[0].gpus,
            job.with_suffix(".txt"),
            limit=min(self.end, time.monotonic() + START_SECONDS + ROW_SECONDS * len(rows)),
            environment=TRANSPORTS[rows[0].transport],
            meanwhile=self.show,
        )
        self.show()
        return reason

    def show(self) -> None:
        """The rows that are new are printed."""
        results = read(self.output)
        for result in results[self.shown :]:
            print(f"{row_of(result).name}: {result['p50_ms']:.1f} ms a step", flush=True)
        self.shown = len(results)

    def move(self) -> None:
        """Runs of the first option are killed and resumed on another number of GPUs."""
        option, gpus = self.settings.options[0], self.settings.gpus[-1]
        row = self.shards.read_by(Row(option, "fsdp", gpus, 1))
        config = configure(row, self.flags)
        batch = ("--batch-size", str(config.batch_size))
        micro_batch = ("--micro-batch-size", str(config.micro_batch_size))
        data = ("--data", row.data) if row.data else ()
        flags = [*self.flags, *data, *batch, *micro_batch]
        runs = moves.Moves(self.output, option, gpus, flags)
        for move in runs.missing():
            reason = NO_TIME if self.is_over else runs.measure(move, self.end)
            if reason is not None:
                self._note(move.name, reason)

    def _note(self, name: str, reason: str) -> None:
        self.failures[name] = reason
        print(f"{name}: {reason}", flush=True)


def main(settings: Scaling, flags: Sequence[str]) -> int:
    """The command measures and prints; it returns 1 if a row is missing."""
    jobs = plan(settings)
    for row in itertools.chain(*jobs):
        require_measurable(row, flags)
    settings.output.mkdir(parents=True, exist_ok=True)
    shards = Shards(flags, settings.output)
    jobs = [[shards.read_by(row) for row in rows] for rows in jobs]
    measurement = Measurement(settings, flags, shards)
    of_links = len(jobs) - len(settings.transports)
    for rows in jobs[:of_links]:
        measurement.measure(rows)
    if settings.moves:
        measurement.move()
    for rows in jobs[of_links:]:
        measurement.measure(rows)
    results = read(settings.output)
    text = describe(results, moves.read(settings.output), measurement.failures)
    (settings.output / "report.md").write_text(text + "\n")
    draw(results, settings.output / "scaling.png")
    print(f"\n{text}")
    return 1 if measurement.failures else 0


if __name__ == "__main__":
    how = {"return_unknown_args": True, "registry": FLAG_RULES, "prog": "python -m bench.scaling"}
    run_command(lambda args: main(*tyro.cli(Scaling, args=args, **how)))
