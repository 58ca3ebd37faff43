"""The services people already use get the metrics, when installed."""

import importlib
import importlib.metadata
import secrets
from collections.abc import Sequence
from pathlib import Path

from hamner.config.train import TrainConfig
from hamner.errors import UserError
from hamner.files import write_whole
from hamner.train.beside import Beside
from hamner.train.metrics import Record


class TensorBoard:
    """The records of a run become event files in RUN/tensorboard."""

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier start reported beyond its last checkpoint is not shown.
        self.writer = SummaryWriter(config.folder / "tensorboard", purge_step=first_step)

    def report(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        self.writer.close()


class Tracker:
    """The service has wandb's interface: it is wandb itself, or trackio.

    Every start of a run goes on with one run there, which trackio knows by its name and wandb by an
    id, kept in RUN/wandb-id.
    """

    def __init__(self, module: str, config: TrainConfig) -> None:
        self.module = importlib.import_module(module)
        by = {"id": _kept_id(config.folder / "wandb-id")} if module == "wandb" else {}
        self.module.init(
            project="hamner", name=config.folder.name, config=config.to_json(), resume="allow", **by
        )

    def report(self, record: Record) -> None:
        self.module.log(_numbers(record), step=record.step)

    def close(self) -> None:
        self.module.finish()


Reporter = TensorBoard | Tracker


def require_installed(names: Sequence[str]) -> None:
    """The function refuses services that are missing, before anything is opened or written.

    Raises:
        UserError: says how to install the first that is not there.
    """
    for name in names:
        try:
            # Not by importing: wandb leaves a folder of its name, which Python would import.
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"--report-to {name}: it is not installed; run pip install -e '.[{name}]'"
            ) from error


def open_reporters(config: TrainConfig, beside: Beside, first_step: int) -> list[Reporter]:
    """The function opens the services that `--report-to` names, in the run's folder, but for those
    that fail; records begin with `first_step`."""
    reporters: list[Reporter] = []
    for name in config.report_to:
        with beside(f"--report-to {name}", then="training goes on without it"):
            is_ours = name == "tensorboard"
            reporters.append(TensorBoard(config, first_step) if is_ours else Tracker(name, config))
    return reporters


def _kept_id(path: Path) -> str:
    """The function reads an id, or makes one where there is none and writes it."""
    if path.exists() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    made = secrets.token_hex(8)
    write_whole(path, made + "\n")
    return made


def _numbers(record: Record) -> dict[str, float]:
    return {n: v for n, v in record.to_json().items() if isinstance(v, int | float)}
