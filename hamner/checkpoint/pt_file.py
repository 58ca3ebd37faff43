"""A `.pt` file of PyTorch is read without running what is in it, and only if it is whole."""

import warnings
import zipfile
from pathlib import Path

import torch

from hamner.errors import UserError
from hamner.progress import SILENT, Status

_CHUNK_BYTES = 2**24


def read_pt(file: Path, status: Status = SILENT) -> object:
    """The function reads what `torch.save` wrote, in its zip format or the older one.

    Tensors of the zip format stay on disk until they are used.

    Raises:
        UserError: the file cannot be read, is damaged, or holds more than tensors and plain values.
    """
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip:
            _require_intact(file, status)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises of every kind
        raise UserError(
            f"{file} is not a checkpoint of tensors and plain values, or is damaged; nothing else "
            "in it is loaded, because unpickling can run any program"
        ) from error


def _require_intact(file: Path, status: Status) -> None:
    """The function compares every part of the archive with its CRC-32, which `torch.load` does not.

    Raises:
        UserError: it names the part that is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise UserError(f"{file} was not written by torch.save: its parts are compressed")
        # `torch.serialization.set_crc32_options(False)` leaves them out.
        if not any(part.CRC for part in parts):
            return
        size = sum(part.file_size for part in parts)
        with status.task(f"checking {file}", size, "bytes") as task:
            for part in parts:
                try:
                    with archive.open(part) as stream:
                        while chunk := stream.read(_CHUNK_BYTES):
                            task.advance(len(chunk))
                except (zipfile.BadZipFile, EOFError) as error:
                    raise UserError(
                        f"{file} is damaged: its part {part.filename} does not match its checksum; "
                        "copy it again, or take an older checkpoint"
                    ) from error
