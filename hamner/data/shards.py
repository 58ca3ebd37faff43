"""Shards hold documents that `prepare` tokenized once; they are read from disk one by one.

DIR/index.json                 format, tokenizer, dtype, split, and every shard with its sums
DIR/train-00000.tokens         token ids, little-endian, each document with its end-of-text
DIR/train-00000.offsets        uint64, where each document begins, and the end of the last
DIR/validation-00000.tokens    held-out documents, written along with the shard of training
DIR/progress.json              only while unfinished: where to go on
"""

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np

from hamner.data.documents import Split
from hamner.data.shuffle import State, check_counts, shuffled_documents
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.files import expand_home, read_json

FORMAT = "hamner-shards"
VERSION = 1
INDEX = "index.json"
PROGRESS = "progress.json"
OFFSET_DTYPE = np.dtype("<u8")
CHECKED_TOKENS = 2**22
"""of a shard that are in memory at once while it is checked"""
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class ShardSource:
    """A shard source gives the documents of a folder of prepared shards.

    Raises:
        UserError: not a folder of shards, damaged, unfinished, or of another tokenizer.
    """

    def __init__(self, location: str, tokenizer: Tokenizer) -> None:
        folder = expand_home(location, "--data shards:")
        if not (folder / INDEX).is_file():
            mend = (
                "its preparation was interrupted; repeat the command to finish it"
                if (folder / PROGRESS).exists()
                else "make one with `python -m hamner.data prepare`"
            )
            raise UserError(f"--data shards:{location}: no {INDEX} there; {mend}")
        index = read_json(folder / INDEX)
        if index.get("format") != FORMAT or index.get("version") != VERSION:
            raise UserError(
                f"--data shards:{location}: {INDEX} is not of format {FORMAT}, version {VERSION}"
            )
        if index.get("tokenizer") != tokenizer.fingerprint:
            raise UserError(
                f"--data shards:{location}: prepared with another tokenizer of "
                f"{index.get('vocab_size')} entries (fingerprint "
                f"{str(index.get('tokenizer'))[:12]}, the model's is "
                f"{tokenizer.fingerprint[:12]}); give its --tokenizer and --vocab-size"
            )
        try:
            dtype = DTYPES[index["dtype"]]
            shards = [Shard(folder, s, dtype, tokenizer.vocab_size) for s in index["shards"]]
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise UserError(
                f"--data shards:{location}: {INDEX} is damaged ({error!r}); prepare it again"
            ) from error
        self._shards = shards
        self._digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()

    def identity(self) -> State:
        tokens = sum(shard.tokens for shard in self._shards)
        return {"shards": len(self._shards), "tokens": tokens, "digest": self._digest}

    def tokens(
        self, split: Split, seed: int, epoch: int, state: State | None
    ) -> Iterator[tuple[np.ndarray, State]]:
        """The documents are shuffled within a shard; see `TokenSource`."""
        shards = [shard for shard in self._shards if shard.split == split]
        return shuffled_documents(shards, seed, epoch, state)


class Shard:
    """A shard lies on disk; its sizes are checked here, its content when it is first read.

    Raises:
        UserError: files that are missing or of another size.
        KeyError, OSError, TypeError, ValueError: an entry that is none, with what is wrong.
    """

    def __init__(self, folder: Path, entry: State, dtype: np.dtype, vocab_size: int) -> None:
        if entry["split"] not in get_args(Split):
            raise ValueError(f"split {entry['split']!r}")
        self.split: Split = entry["split"]
        check_counts(entry, "tokens", "documents")
        self.tokens: int = entry["tokens"]
        self._dtype = dtype
        self._vocab_size = vocab_size
        self._sha256 = entry["sha256"]
        self._path = _inside(folder, entry["file"])
        self._offsets_path = _inside(folder, entry["offsets"])
        self._is_checked = False
        sizes = {
            self._path: self.tokens * dtype.itemsize,
            self._offsets_path: (entry["documents"] + 1) * OFFSET_DTYPE.itemsize,
        }
        for path, size in sizes.items():
            found = path.stat().st_size if path.is_file() else 0
            if found != size or size == 0:
                raise UserError(f"--data shards: {path} has {found:,} bytes instead of {size:,}")

    def blocks(self, start: int, *key: int) -> Iterator["_ShardDocuments"]:
        """The shard is one block; see `BlockFile`."""
        if start > 0:
            return
        offsets = np.fromfile(self._offsets_path, dtype=OFFSET_DTYPE).astype(np.int64)
        # Not by memory map: there a disk that fails ends the process, without a word.
        with self._path.open("rb", buffering=0) as file:
            if not self._is_checked:
                self._check(file, offsets)
                self._is_checked = True
            yield _ShardDocuments(file, self._dtype, offsets)

    def _check(self, file: BinaryIO, offsets: np.ndarray) -> None:
        digest, count, highest = hashlib.sha256(), 0, 0
        while len(tokens := np.fromfile(file, self._dtype, CHECKED_TOKENS)):
            digest.update(tokens.data)
            count, highest = count + len(tokens), max(highest, tokens.max())
        is_whole = (
            digest.hexdigest() == self._sha256
            and highest < self._vocab_size
            and offsets[0] == 0
            and offsets[-1] == count
            and (np.diff(offsets) > 0).all()
        )
        if not is_whole:
            raise UserError(f"--data shards: {self._path} is damaged; prepare its folder again")


class _ShardDocuments(Sequence[np.ndarray]):
    """The documents of a shard are read one at a time."""

    def __init__(self, file: BinaryIO, dtype: np.dtype, offsets: np.ndarray) -> None:
        self._file, self._dtype, self._offsets = file, dtype, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """The method reads a document.

        Raises:
            OSError: the disk fails, or the file was cut short.
        """
        begin, end = map(int, self._offsets[index : index + 2])
        ids = np.empty(end - begin, self._dtype)
        if os.preadv(self._file.fileno(), [ids], begin * ids.itemsize) < ids.nbytes:
            raise OSError(errno.EIO, "it was cut short while it is read", self._file.name)
        return ids


def _inside(folder: Path, name: str) -> Path:
    """The path is that of the file in the folder, whatever the name pretends.

    Raises:
        ValueError: it is, or is a link to, a file elsewhere.
    """
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"{name!r} is not in the folder")
    return path
