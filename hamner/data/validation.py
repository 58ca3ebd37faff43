"""The validation set of a run is kept in its folder.

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
from hamner.progress import SILENT, Status

logger = logging.getLogger(__name__)

FIELDS = {"inputs": torch.int64, "targets": torch.int64, "document_ids": torch.int32}


class ValidationSet:
    """The rows that a run is evaluated on come from its folder, or are gathered from its sources.

    A file of other data, another tokenizer, sequence length or size, or one that is damaged, does
    not count.

    Args:
        path: of the file, a safetensors of int32 (R, T), whether it is there or not.
        loader: of the run.
        max_tokens: as for `TrainLoader.validation_rows`.
        status: shows how far the gathering is.

    Raises:
        UserError: a source that cannot be read, or one without a document to train on.
    """

    def __init__(
        self, path: Path, loader: TrainLoader, max_tokens: int, status: Status = SILENT
    ) -> None:
        self._path = path
        self._key = json.dumps(loader.validation_key(max_tokens), sort_keys=True)
        stored = self._read()
        self._is_stored = stored is not None
        self.rows: Batch = stored or loader.validation_rows(max_tokens, status)
        if not stored and not len(self.rows.inputs):
            # Perhaps there is nothing at all: better said now than at the first batch.
            loader.require_documents()

    def keep(self) -> None:
        """The file is written unless it is there; without it the next start gathers again."""
        if self._is_stored:
            return
        tensors = {name: getattr(self.rows, name).to(torch.int32) for name in FIELDS}
        try:
            write_whole(self._path, save(tensors, {"digest": self._digest(tensors)}))
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
        """The digest covers the rows and what they were gathered from: it fits these or none."""
        digest = hashlib.sha256(self._key.encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()
