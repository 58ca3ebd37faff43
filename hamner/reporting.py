"""Metrics for the services people already use, when installed."""

import importlib
from typing import Protocol

from hamner.config import TrainConfig
from hamner.errors import UserError
from hamner.metrics import Record


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
        _import("tensorboard", "tensorboard")
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
        self.module = _import(module, module)
        self.module.init(
            project="hamner", name=config.folder.name, config=config.to_json(), resume="allow"
        )

    def report(self, record: Record) -> None:
        """Send the record's numbers."""
        self.module.log(_numbers(record), step=record.step)

    def close(self) -> None:
        """Finish the run."""
        self.module.finish()


def open_reporters(config: TrainConfig) -> list[Reporter]:
    """The services `--report-to` names.

    Raises:
        UserError: one is not installed.
    """
    return [
        TensorBoard(config) if name == "tensorboard" else Tracker(name, config)
        for name in config.report_to
    ]


def _import(module: str, extra: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--report-to {module}: it is not installed; run pip install 'hamner[{extra}]'"
        ) from error


def _numbers(record: Record) -> dict[str, float]:
    return {n: v for n, v in record.to_json().items() if isinstance(v, int | float)}
