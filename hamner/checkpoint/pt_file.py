"""A `.pt` file of PyTorch is read without running what is in it, and only if it is whole."""

import contextlib
import warnings
import zipfile
from pathlib import Path

import torch

from hamner.errors import UserError
from hamner.files import refuse_pipe
from hamner.progress import SILENT, Status

_CHUNK_BYTES = 2**24
_ZIP_MAGIC = b"PK\x03\x04"


def read_pt(file: Path, status: Status = SILENT) -> object:
    """The function reads what `torch.save` wrote, in its zip format or the older one.

    Tensors of the zip format stay on disk until they are used.

    Raises:
        UserError: the file cannot be read, is damaged, or holds more than tensors and plain values.
    """
    refuse_pipe(file, str(file))
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
        raise UserError(f"{file} {_fault(file, is_zip=is_zip)}") from error


def _fault(file: Path, *, is_zip: bool) -> str:
    """The text says what is wrong with a file that cannot be loaded, and what mends it."""
    if is_zip:
        # Its parts match their checksums.
        with contextlib.suppress(Exception):
            if found := sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)):
                return (
                    f"holds {', '.join(found)} beside tensors and plain values, and is not loaded, "
                    "because unpickling can run any program; save it again without what is of "
                    "these kinds"
                )
    elif _is_cut_short(file):
        return "is damaged: its end is missing; copy it again, or take an older checkpoint"
    return (
        "is not a checkpoint of tensors and plain values, or is damaged; nothing else in it is "
        "loaded, because unpickling can run any program"
    )


def _is_cut_short(file: Path) -> bool:
    """The answer is whether the file is empty, or begins like an archive and has no end of one."""
    with file.open("rb") as stream:
        return stream.read(len(_ZIP_MAGIC)) in (b"", _ZIP_MAGIC)


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
