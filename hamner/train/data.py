"""The data is what a run trains and is evaluated on; the run has a position in it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hamner.checkpoint.run_folder import RunFolder
from hamner.config.train import TrainConfig
from hamner.data.batch import Batch
from hamner.data.conversations.loader import ConversationLoader
from hamner.data.loader import TrainLoader
from hamner.data.tokenizer import Tokenizer
from hamner.data.validation import ValidationSet
from hamner.errors import UserError
from hamner.parallel.processes import SingleProcess
from hamner.progress import Status

Loader = TrainLoader | ConversationLoader
"""gives endless training batches and resumes exactly"""


@dataclass(frozen=True)
class RunData:
    """The data of a run is what it trains and is evaluated on."""

    loader: Loader
    validation: Batch
    keep: Callable[[], None] = lambda: None
    """called once the run's folder is there: writes what the next start need not gather again"""


OpenData = Callable[[TrainConfig, Tokenizer, bool, Status], RunData]
"""(config, tokenizer, whether to pin memory, what shows how far it is) -> what to train on"""


def open_loader(
    config: TrainConfig, tokenizer: Tokenizer, pin_memory: bool, bad_rows_file: Path | None = None
) -> TrainLoader:
    """The function opens the batches of documents that a run pre-trains on.

    Raises:
        UserError: the data does not allow it.
    """
    return TrainLoader(config, tokenizer, pin_memory=pin_memory, bad_rows_file=bad_rows_file)


def open_documents(
    config: TrainConfig, tokenizer: Tokenizer, pin_memory: bool, status: Status
) -> RunData:
    """The function opens the data of pre-training; see `OpenData`."""
    run = RunFolder(config.folder)
    loader = open_loader(config, tokenizer, pin_memory, run.bad_rows)
    validation = ValidationSet(run.validation, loader, config.eval_tokens, status)
    return RunData(loader, validation.rows, validation.keep)


class DataPosition:
    """The position is that in the data after the last finished step.

    Args:
        loader: whose position it is.
        config: says whether other data than the checkpoint's is read from its start.
        messages: get a warning then.
    """

    def __init__(self, loader: Loader, config: TrainConfig, messages: list[str]) -> None:
        self.loader, self.config, self.messages = loader, config, messages
        self.advance()

    def require_same_data(self, processes: SingleProcess) -> None:
        """Every process must have opened the data that rank 0 has.

        Raises:
            UserError: see `SingleProcess.require_same`.
        """
        sentence = "--data is not here what rank 0 reads: copy its files to this machine"
        processes.require_same(self.position, lambda _: sentence)

    def advance(self) -> None:
        """A step has been finished: the position is the loader's."""
        self.position = self.loader.state_dict()

    def state_dict(self) -> dict:
        return {"data": self.position}

    def load_state_dict(self, state: dict) -> None:
        """The loader goes on where the checkpoint was.

        Raises:
            UserError: it was other data, and `--allow-data-change` was not given.
        """
        try:
            self.loader.load_state_dict(state["data"])
        except UserError as error:
            if not self.config.allow_data_change:
                raise UserError(
                    f"{error}; --allow-data-change goes on with the new data from its start"
                ) from error
            self.messages.append(
                f"WARNING: --allow-data-change: the data is read from its start ({error})"
            )
        self.advance()
