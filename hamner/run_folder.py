"""The files of a run: config.json, metrics.jsonl, samples.jsonl, plots/, checkpoints/."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from hamner.config import CONFIG_FILE, TrainConfig
from hamner.errors import UserError


class RunFolder:
    """One run's folder.

    Args:
        path: the folder, made when `start` is called.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG_FILE
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.plots = path / "plots"
        self.checkpoints = path / "checkpoints"

    def check(self, *, resume: bool) -> None:
        """Refuse to overwrite a run, or to resume one that is not there.

        Raises:
            UserError: says which flag decides.
        """
        if self.config.exists() and not resume:
            raise UserError(
                f"{self.path} already holds a run: continue it with --resume, "
                "or start another with --run-dir FOLDER"
            )
        if resume and not self.config.exists():
            raise UserError(
                f"--resume: {self.path} holds no run; start one by leaving out --resume, "
                "or name the run's folder with --run-dir FOLDER"
            )

    def start(self, config: TrainConfig) -> None:
        """Make the folder and write config.json.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.plots.mkdir(exist_ok=True)
            replace_text(self.config, json.dumps(config.to_json(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--run-dir {self.path} cannot be written: {error.strerror}") from error

    def rewind(self, step: int) -> None:
        """Drop metrics and samples after `step`: the resumed run writes them again."""
        for path in (self.metrics, self.samples):
            if path.exists():
                kept = [json.dumps(r) for r in read_records(path) if r["step"] <= step]
                replace_text(path, "".join(f"{line}\n" for line in kept))


def append_record(path: Path, record: dict) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> Iterable[dict]:
    """The objects of a JSON-lines file; a last line cut short by a crash is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def replace_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
