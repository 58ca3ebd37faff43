"""`prepare` writes shards (see `shards`): every document of some sources, tokenized once.

A file is written under a temporary name, flushed to disk and renamed, so one with its final name
is whole. `progress.json` is replaced after each pair of shards: an interrupted preparation goes on
from there, and ends with the same bytes as one that was not.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from hamner.data.bad_rows import DEFAULT_SHARE, BadRowsFile
from hamner.data.documents import Split, TextSource
from hamner.data.shards import DTYPES, FORMAT, INDEX, OFFSET_DTYPE, PROGRESS, VERSION, Shard
from hamner.data.shuffle import State, check_counts
from hamner.data.sources import DOCUMENTS_PER_BATCH, describe, open_text_source, tokenized
from hamner.data.specs import Spec, parse_specs
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.files import TEMPORARY, read_json, write_whole
from hamner.progress import SILENT, Status

#: What lists the rows that were passed over, where there are any.
BAD_ROWS = "bad_rows.json"

_TEMPORARY_NAME = re.compile(
    r"((train|validation)-\d{5,}\.(tokens|offsets)|(index|progress)\.json)" + re.escape(TEMPORARY)
)


def prepare(
    specs: Sequence[str],
    output: Path,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = 100_000_000,
    val_fraction: float = 0.01,
    bad_rows: float = DEFAULT_SHARE,
    status: Status = SILENT,
) -> dict[str, Any]:
    """`prepare` tokenizes every document of the specs once, in the shuffled order of seed 0.

    Args:
        specs: SPECs of text, without weights.
        output: a new or empty folder, or one that an earlier call left unfinished.
        shard_tokens: a shard is closed by the document that reaches this size; it is in memory
            until then.
        val_fraction: share held out.
        bad_rows: share of a source's rows that may hold no document and are passed over.
        status: shows how much of each source is done.

    Returns:
        The index, as written to `index.json`.

    Raises:
        UserError: bad specs or input, or an output folder that holds something else.
    """
    parsed = _parse(specs)
    listed = BadRowsFile(output / BAD_ROWS, bad_rows)
    sources = [open_text_source(spec, listed.of(spec.text)) for spec in parsed]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
        "end_of_text": tokenizer.eot_id,
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "sources": [
            {"spec": spec.text, "identity": source.identity()}
            for spec, source in zip(parsed, sources, strict=True)
        ],
    }
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is not a folder: give a new or an empty one")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if (output / INDEX).exists():
            return _read_own(output / INDEX, header)
        progress = _resume(output, header)
        return _write_shards(output, progress, sources, tokenizer, listed=listed, status=status)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from error
    finally:
        listed.write()


def _parse(specs: Sequence[str]) -> list[Spec]:
    parsed = parse_specs(specs)
    for spec in parsed:
        if spec.kind == "shards":
            raise UserError(f"--data {spec.text}: these are shards already")
        if spec.weight != 1.0:
            raise UserError(
                f"--data {spec.text}: prepare writes every document once; give the weight when "
                "training, with one folder of shards for each source"
            )
    return parsed


def _write_shards(
    output: Path,
    progress: State,
    sources: Sequence[TextSource],
    tokenizer: Tokenizer,
    *,
    listed: BadRowsFile,
    status: Status,
) -> dict[str, Any]:
    """The function goes on from `progress` to the end of all sources."""
    tokens = sum(shard["tokens"] for shard in progress["shards"])
    documents = sum(shard["documents"] for shard in progress["shards"])
    pair = _ShardPair(progress)
    state = progress["state"]
    for number in range(progress["source"], len(sources)):
        spec = progress["sources"][number]["spec"]
        is_empty = state is None
        source, read = sources[number], 0
        _, total, unit = source.extent(0, 0, None)
        with status.task(f"tokenizing {spec}", total, unit) as task:
            stream = source.documents(0, 0, state)
            for split, ids, state in tokenized(stream, tokenizer, progress["val_fraction"]):
                pair.add(split, ids)
                if len(ids):
                    is_empty = False
                    tokens, documents = tokens + len(ids), documents + 1
                if read % DOCUMENTS_PER_BATCH == 0:
                    task.done = source.extent(0, 0, state).done
                read += 1
                task.note = f"{tokens:,} tokens of {documents:,} documents"
                if pair.offsets["train"][-1] >= progress["shard_tokens"]:
                    progress = pair.write(output) | {"source": number, "state": state}
                    write_whole(output / PROGRESS, json.dumps(progress, indent=1))
                    pair = _ShardPair(progress)
        if is_empty:
            raise UserError(f"--data {spec}: no document with text")
        state = None
    progress = pair.write(output)
    index = {key: progress[key] for key in progress if key not in ("source", "state", "pairs")}
    if counts := listed.counts():
        index["bad_rows"] = counts
    write_whole(output / INDEX, json.dumps(index, indent=1))
    (output / PROGRESS).unlink(missing_ok=True)
    return index


class _ShardPair:
    """A pair is the shard of training and the one of validation that are being filled."""

    def __init__(self, progress: State) -> None:
        self._progress = progress
        self._dtype = DTYPES[progress["dtype"]]
        self._data: dict[Split, bytearray] = {split: bytearray() for split in get_args(Split)}
        self.offsets: dict[Split, list[int]] = {split: [0] for split in get_args(Split)}
        self._skipped: int = progress["skipped"]

    def add(self, split: Split, ids: np.ndarray) -> None:
        """A document is added to its shard, and an empty one is counted."""
        if len(ids):
            self._data[split] += ids.astype(self._dtype).tobytes()
            self.offsets[split].append(self.offsets[split][-1] + len(ids))
        else:
            self._skipped += 1

    def write(self, folder: Path) -> State:
        """Both are put on disk; the progress counts them."""
        number, shards = self._progress["pairs"], list(self._progress["shards"])
        for split, offsets in self.offsets.items():
            if offsets[-1] == 0:
                continue
            name = f"{split}-{number:05d}"
            write_whole(folder / f"{name}.tokens", self._data[split])
            write_whole(folder / f"{name}.offsets", np.array(offsets, dtype=OFFSET_DTYPE).tobytes())
            shards.append(
                {
                    "split": split,
                    "file": f"{name}.tokens",
                    "offsets": f"{name}.offsets",
                    "tokens": offsets[-1],
                    "documents": len(offsets) - 1,
                    "sha256": hashlib.sha256(self._data[split]).hexdigest(),
                }
            )
        return self._progress | {"pairs": number + 1, "shards": shards, "skipped": self._skipped}


def _resume(output: Path, header: State) -> State:
    """The progress is that of an interrupted call, whose half-written files go, or a new one."""
    names = {path.name for path in output.iterdir()}
    unfinished = {name for name in names if _TEMPORARY_NAME.fullmatch(name)}
    progress = header | {"source": 0, "state": None, "pairs": 0, "shards": [], "skipped": 0}
    if PROGRESS in names:
        progress = _read_own(output / PROGRESS, header)
    elif names - unfinished:
        raise UserError(
            f"--output {output}: holds other files ({min(names - unfinished)}); "
            "give a new or an empty folder"
        )
    for name in unfinished:
        (output / name).unlink()
    # From here on the folder is known as ours.
    write_whole(output / PROGRESS, json.dumps(progress, indent=1))
    return progress


def _read_own(path: Path, header: State) -> State:
    """The function reads an index or progress, which must be of the very same preparation."""
    saved = read_json(path)
    for key, value in header.items():
        if saved.get(key) != value:
            raise UserError(
                f"--output {path.parent}: holds shards of another preparation "
                f"({_difference(key, saved.get(key), value)}); give another folder or repeat its "
                "command"
            )
    try:
        for shard in saved["shards"]:
            Shard(path.parent, shard, DTYPES[saved["dtype"]], saved["vocab_size"])
        check_counts(saved, "skipped")
        if path.name == PROGRESS:
            check_counts(saved, "pairs", "source")
            if saved["source"] >= len(saved["sources"]):
                raise ValueError(f"source {saved['source']}")
            if saved["state"] is not None:
                check_counts(saved["state"], "file", "block", "row")
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"--output {path.parent}: {path.name} is damaged ({error!r}); empty the folder and "
            "prepare it again"
        ) from error
    return saved


def _difference(key: str, saved: Any, now: Any) -> str:
    """The difference is in words; what the saved file holds may be damaged."""
    if key == "sources":
        return f"--data was {describe(saved)}, now {describe(now)}"
    return f"{key} was {_shown(saved)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    """Plain values are shown, fingerprints as short as elsewhere."""
    return str(value)[:12] if isinstance(value, str | int | float) else "damaged"
