"""Files of the hub, read to their end.

`huggingface_hub` takes an answer that is shorter than the range it asked for as the end of the
file: the rest of the documents would be missing without a word. Here that is an error.
"""

import fsspec
from huggingface_hub import HfFileSystem
from huggingface_hub.hf_file_system import HfFileSystemFile


class WholeRangeFile(HfFileSystemFile):
    """A file of a repository, read by ranges, each of which must arrive whole."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data = super()._fetch_range(start, end)
        expected = min(end, self.size) - start
        if len(data) != expected:
            raise EOFError(
                f"{self.path}: {len(data):,} bytes came instead of {expected:,} from {start:,} on"
            )
        return data


class WholeRangeFileSystem(HfFileSystem):
    """The hub as fsspec's `hf://`, with `WholeRangeFile`s."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs):
        if mode != "rb" or block_size == 0:  # written, or read as one stream of unknown length
            return super()._open(path, mode=mode, block_size=block_size, **kwargs)
        if block_size is not None:
            kwargs["block_size"] = block_size
        return WholeRangeFile(self, path, mode=mode, **kwargs)


def register() -> None:
    """Have everything that opens `hf://` paths use it, `datasets` among them."""
    fsspec.register_implementation("hf", WholeRangeFileSystem, clobber=True)
