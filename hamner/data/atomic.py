"""Files that are whole or not there."""

import os
from pathlib import Path

TEMPORARY = ".new"


def write_whole(path: Path, data: bytes | bytearray) -> None:
    """Writes a file so that readers see the old one or the whole new one.

    Raises:
        OSError: the disk does not take it; the old one is as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
