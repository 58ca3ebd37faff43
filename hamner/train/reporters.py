"""Metrics for the services people already use, when installed."""

import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import Protocol

from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.train.metrics import Record


class Reporter(Protocol):
    """Receives every record of a run."""

    def report(self, record: Record) -> None:
        """Send one record."""
        ...

    def close(self) -> None:
        """Flush and leave."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(config.folder / "tensorboard")

    def report(self, record: Record) -> None:
        """Write the record's numbers."""
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class Tracker:
    """A service with wandb's interface: wandb itself, or trackio."""

    def __init__(self, module: str, config: TrainConfig) -> None:
        self.module = importlib.import_module(module)
        self.module.init(
            project="hamner", name=config.folder.name, config=config.to_json(), resume="allow"
        )

    def report(self, record: Record) -> None:
        """Send the record's numbers."""
        self.module.log(_numbers(record), step=record.step)

    def close(self) -> None:
        """Finish the run."""
        self.module.finish()


def require_installed(names: Sequence[str]) -> None:
    """Refuse services that are missing, before anything is opened or written.

    Raises:
        UserError: says how to install the first that is not there.
    """
    for name in names:
        try:
            # Not by importing: wandb leaves a folder of its name, which Python would import.
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"--report-to {name}: it is not installed; run pip install 'hamner[{name}]'"
            ) from error


def open_reporters(config: TrainConfig) -> list[Reporter]:
    """The services `--report-to` names, in the run's folder."""
    return [
        TensorBoard(config) if name == "tensorboard" else Tracker(name, config)
        for name in config.report_to
    ]


def _numbers(record: Record) -> dict[str, float]:
    return {n: v for n, v in record.to_json().items() if isinstance(v, int | float)}
