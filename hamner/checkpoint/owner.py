"""A run's folder has one owner: the process that writes into it, for as long as it lives.

The operating system holds the lock and releases it with the process, however that ends. The file
stays; what it says counts only while it is locked.
"""

import contextlib
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from hamner.errors import UserError
from hamner.files import writing

LOCK_FILE = "run.lock"
WAIT_SECONDS = 3.0
"""a process that was killed takes so long to be gone, with the memory it had"""

logger = logging.getLogger(__name__)


class Owner:
    """The owner of a folder is this process once it has taken it.

    Args:
        folder: of the run; must be there when it is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: BinaryIO | None = None

    @property
    def is_owner(self) -> bool:
        """The answer is whether this process has taken the folder."""
        return self.file is not None

    def take(self) -> None:
        """The folder belongs to this process from now on; without locks there, that is a warning.

        Raises:
            UserError: it belongs to another one, or cannot be written.
        """
        if self.is_owner:
            return
        with writing(f"--run-dir {self.folder}"):
            file = (self.folder / LOCK_FILE).open("ab+", buffering=0)
        deadline = time.monotonic() + WAIT_SECONDS
        while not _lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise self._refusal(file)
            time.sleep(0.1)
        self.file = file
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def require_free(self) -> None:
        """The method refuses a folder that belongs to another process.

        Raises:
            UserError: says whose it is.
        """
        if self.is_owner:
            return
        with contextlib.suppress(OSError), (self.folder / LOCK_FILE).open("rb") as file:
            if not _lock(file, fcntl.LOCK_SH):
                raise self._refusal(file)

    def release(self) -> None:
        """Others may take the folder."""
        if self.is_owner:
            self.file.close()
            self.file = None

    def _refusal(self, file: BinaryIO) -> UserError:
        file.seek(0)
        name = file.read(200).decode(errors="replace").strip() or "another process"
        return UserError(
            f"--run-dir {self.folder} is in use by {name}: wait for its end or stop it, or name "
            "another folder with --run-dir FOLDER"
        )


def _lock(file: BinaryIO, kind: int) -> bool:
    """The function locks a file, or returns False because another has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning(
            "WARNING: the file system of %s has no locks (%s): nothing keeps a second start from "
            "writing there",
            file.name,
            error.strerror,
        )
    return True
