"""The validation set of a run, kept in its folder.

To gather it means to read every source until enough documents were held out, which can take long
where the source is a network. So a run gathers once, and evaluates on the same rows to its end.
"""

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from hamner.data.batch import Batch
from hamner.data.loader import TrainLoader
from hamner.files import write_whole

logger = logging.getLogger(__name__)

FIELDS = {"inputs": torch.int64, "targets": torch.int64, "document_ids": torch.int32}


class ValidationSet:
    """The rows that a run is evaluated on: from the run's folder, or gathered from its sources.

    A file of other data, another tokenizer, sequence length or size, or one that is damaged, does
    not count.

    Args:
        path: of the file, a safetensors of int32 (R, T), whether it is there or not.
        loader: of the run.
        max_tokens: as for `validation_rows`.

    Attributes:
        rows: of type `Batch`.

    Raises:
        UserError: a source that cannot be read.
    """

    def __init__(self, path: Path, loader: TrainLoader, max_tokens: int) -> None:
        self._path = path
        self._key = json.dumps(loader.validation_key(max_tokens), sort_keys=True)
        stored = self._read()
        self._is_stored = stored is not None
        self.rows = loader.validation_rows(max_tokens) if stored is None else stored

    def keep(self) -> None:
        """Writes the file unless it is there; without it the next start gathers again."""
        if self._is_stored:
            return
        tensors = {name: getattr(self.rows, name).to(torch.int32) for name in FIELDS}
        metadata = {"digest": self._digest(tensors)}
        try:
            write_whole(self._path, save(tensors, metadata))
        except OSError as error:
            logger.warning("%s could not be written (%s)", self._path, error.strerror)

    def _read(self) -> Batch | None:
        try:
            with safe_open(self._path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in FIELDS}
                digest = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError):
            return None
        if digest != self._digest(tensors):
            return None
        return Batch(**{name: tensor.to(FIELDS[name]) for name, tensor in tensors.items()})

    def _digest(self, tensors: dict[str, torch.Tensor]) -> str:
        """Of what the rows were gathered from and of the rows: it fits these or none."""
        digest = hashlib.sha256(self._key.encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()
