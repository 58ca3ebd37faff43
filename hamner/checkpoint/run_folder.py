"""The module knows the files of a run.

They are config.json, tokenizer.json, metrics.jsonl, samples.jsonl, plots/, checkpoints/, and
plan.jsonl, what was projected beside what was measured. Every command finds in them what it needs:
paths in config.json say where things came from, and may be gone. run.lock says who writes them
(owner.py).

And, when something went wrong: bad_steps/ (batches for `--replay`), stacks.txt (of a hang),
*.jsonl.damaged (a log with lines that were no records) and *.jsonl.before (that of a run that was
started over). With several processes: logs/rank_N.txt, what each said. bad_rows.json lists the rows
of the data that were passed over.
"""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

from hamner.checkpoint.owner import Owner
from hamner.config.train import CHECKPOINTS, CONFIG_FILE, TOKENIZER_FILE, TrainConfig
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.errors import UserError
from hamner.files import read_records, write_whole
from hamner.parallel.ranks import Rank

logger = logging.getLogger(__name__)


class RunFolder:
    """The folder is one run's; `start` makes it.

    As a context it belongs to no process any more after its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = Owner(path)
        self.config = path / CONFIG_FILE
        self.tokenizer = path / TOKENIZER_FILE
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.plots = path / "plots"
        self.checkpoints = path / CHECKPOINTS
        self.bad_steps = path / "bad_steps"
        self.stacks = path / "stacks.txt"
        self.plan = path / "plan.jsonl"
        self.validation = path / "validation.safetensors"
        self.logs = path / "logs"
        self.bad_rows = path / "bad_rows.json"

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.owner.release()

    def open(self, *, resume: bool) -> None:
        """The method takes the folder of a run that goes on, for this process.

        Raises:
            UserError: see `check`, or another process has it.
        """
        self.check(resume=resume)
        if resume:
            self.owner.take()

    def check(self, *, resume: bool) -> None:
        """The method refuses to overwrite a run, or to resume one that is not there.

        Raises:
            UserError: says which flag decides.
        """
        if self.config.exists() and not resume:
            self.owner.require_free()
            raise UserError(
                f"{self.path} already holds a run: continue it with --resume, "
                "or start another with --run-dir FOLDER"
            )
        if resume and not self.config.exists():
            raise UserError(
                f"--resume: {self.path} holds no run; start one by leaving out --resume, "
                "or name the run's folder with --run-dir FOLDER"
            )

    def open_tokenizer(self, config: TrainConfig) -> Tokenizer:
        """The method loads the run's own tokenizer, or the one that `config` names.

        That is for runs that have not started, earlier versions' runs, which had none of their
        own, and a resume with another `--tokenizer`.

        Raises:
            UserError: there is no such tokenizer.
        """
        name = config.tokenizer
        if self.config.is_file() and self.tokenizer.is_file():
            is_same = TrainConfig.read(self.config).tokenizer == name
            name = str(self.tokenizer) if is_same else name
        return load_tokenizer(name, config.model.vocab_size, text_tags=config.text_tags)

    def start(self, config: TrainConfig, tokenizer: Tokenizer) -> None:
        """The method makes the folder, takes it and writes tokenizer.json and config.json.

        Raises:
            UserError: the folder cannot be written, or another process came first.
        """
        try:
            for folder in (self.plots, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            self.owner.take()
            self.check(resume=config.resume)
            tokenizer.save(self.tokenizer)
            write_whole(self.config, json.dumps(config.to_json(), indent=1) + "\n")
        except OSError as error:
            where = error.filename or self.path
            raise UserError(
                f"--run-dir {self.path} cannot be written: {where}: {error.strerror}"
            ) from error

    def stacks_of(self, rank: Rank) -> Path:
        """The file takes the stacks of a process that hangs; several processes have one each."""
        if rank.world_size == 1:
            return self.stacks
        return self.logs / f"stacks_{rank.global_rank}.txt"

    def rewind(self, step: int, *, keeps: bool = False) -> None:
        """The method drops metrics and samples after `step`: the resumed run writes them again.

        With `keeps` what they hold is kept beside, as NAME.before; with lines that are none, but
        for a torn last one, as NAME.damaged.
        """
        for path in (self.metrics, self.samples):
            if not path.exists():
                continue
            if keeps:
                _keep(path, "before")
            records = list(read_records(path))
            with path.open("rb") as file:
                lines = sum(line.endswith(b"\n") for line in file)
            if len(records) < lines:
                _keep(path, "damaged")
                logger.warning(
                    "%s has lines that are no records of a run (%d), which are left out; the file "
                    "as it was is %s.damaged beside it",
                    path,
                    lines - len(records),
                    path.name,
                )
            kept = [json.dumps(record) for record in records if record["step"] <= step]
            if kept:
                write_whole(path, "".join(f"{line}\n" for line in kept))
            else:
                path.unlink()  # as in a run that has just begun

    def amend(self, step: int, values: dict) -> None:
        """The last record of metrics.jsonl gets what was measured later, if it is of `step`."""
        records = list(read_records(self.metrics))
        if records and records[-1]["step"] == step:
            records[-1] |= values
            write_whole(self.metrics, "".join(f"{json.dumps(r)}\n" for r in records))


def _keep(path: Path, suffix: str) -> None:
    """What a file holds is kept beside it, behind what was kept before."""
    with path.open("rb") as file, path.with_name(f"{path.name}.{suffix}").open("ab") as kept:
        shutil.copyfileobj(file, kept)


class RecordLog:
    """The log appends to a JSON-lines file; what the disk refuses waits for the next append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[dict] = []

    def append(self, record: dict) -> OSError | None:
        """The method adds an object and returns the disk's error if it has to wait."""
        self.waiting.append(record)
        return self.flush()

    def flush(self) -> OSError | None:
        """The method writes what waits and returns the disk's error if it has to wait longer."""
        if self.waiting:
            try:
                append_record(self.path, *self.waiting)
            except OSError as error:
                return error
            self.waiting.clear()
        return None


def append_record(path: Path, *records: dict) -> None:
    """The function appends JSON objects as lines: all of them or, if the disk is full, none.

    Raises:
        OSError: the file is as it was.
    """
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    # Unbuffered: a killed process leaves whole lines, and a full disk is seen here.
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise
