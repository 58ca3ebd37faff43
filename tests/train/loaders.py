"""Loaders that do something beside what the run's own does."""

from dataclasses import replace

from hamner.train.data import RunData, open_documents


class Wrapped:
    """A loader that does what another does, but for its batches."""

    def __init__(self, loader) -> None:
        self.loader, self.batches = loader, 0
        self.progress, self.close = loader.progress, loader.close
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict


def opened_by(wrapper: type[Wrapped]):
    """The run's own data through another loader, for `TrainingLoop`."""

    def open_data(*args) -> RunData:
        data = open_documents(*args)
        return replace(data, loader=wrapper(data.loader))

    return open_data
