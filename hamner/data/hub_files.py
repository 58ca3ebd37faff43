"""The module reads files of the hub to their end.

`huggingface_hub` takes an answer that is shorter than the range it asked for as the end of the
file: the rest of the documents would be missing without a word. Here that is an error. Its file
system has a name of its own, so that whoever else opens `hf://` paths gets what they always got.
"""

import re
from typing import Any

import fsspec
from huggingface_hub import HfFileSystem
from huggingface_hub.hf_file_system import HfFileSystemFile


class WholeRangeFile(HfFileSystemFile):
    """A file of a repository is read by ranges, each of which must arrive whole."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data = super()._fetch_range(start, end)
        expected = min(end, self.size) - start
        if len(data) != expected:
            raise EOFError(
                f"{self.path}: {len(data):,} bytes came instead of {expected:,} from {start:,} on"
            )
        return data


class WholeRangeFileSystem(HfFileSystem):
    """The hub is a file system whose files are `WholeRangeFile`s."""

    protocol = "hamner-hf"

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs):
        if mode != "rb" or block_size == 0:  # written, or read as one stream of unknown length
            return super()._open(path, mode=mode, block_size=block_size, **kwargs)
        if block_size is not None:
            kwargs["block_size"] = block_size
        return WholeRangeFile(self, path, mode=mode, **kwargs)


fsspec.register_implementation(WholeRangeFileSystem.protocol, WholeRangeFileSystem)


def read_whole(builder: Any) -> None:
    """A `datasets.DatasetBuilder` is made to read files of the hub by `WholeRangeFileSystem`."""
    import datasets

    protocol = WholeRangeFileSystem.protocol
    for files in (builder.config.data_files or {}).values():
        files[:] = [re.sub("^hf://", f"{protocol}://", file) for file in files]
    options = {"endpoint": datasets.config.HF_ENDPOINT, "token": builder.token}
    builder.storage_options = {**(builder.storage_options or {}), protocol: options}
