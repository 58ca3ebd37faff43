"""`TrainLoader` gives batches for training and validation, and resumes token for token.

It runs the pipeline of `stages` in a background thread (the tokenizer works without the GIL) behind
a short queue. Each batch travels with its state, so batches that were prefetched but never handed
out do not count.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hamner.config.train import TrainConfig
from hamner.data import stages
from hamner.data.background import NotReady, Prefetcher
from hamner.data.bad_rows import DEFAULT_SHARE, BadRowsFile
from hamner.data.batch import Batch
from hamner.data.shuffle import State, check_counts
from hamner.data.sources import describe, open_source
from hamner.data.specs import parse_specs
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError
from hamner.progress import SILENT, Status

logger = logging.getLogger(__name__)

STATE_VERSION = 2
#: Batches made ahead.
PREFETCH = 8
#: How often a wait for a batch looks whether to go on waiting.
POLL_SECONDS = 0.1
#: Validation reads the same documents whatever the seed, so that runs compare.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class DataConfig:
    """A `DataConfig` is the part of a `TrainConfig` that says what to read and how to batch it.

    `val_fraction` does not hold for shards, which have their own, from when they were prepared.
    """

    data: tuple[str, ...]
    seq_len: int
    batch_size: int
    seed: int
    val_fraction: float = 0.01
    bad_rows: float = DEFAULT_SHARE


class TrainLoader:
    """The loader gives training batches without end. Iterate, and `close` at the end.

    Where several processes train one model, each reads the whole batches and trains on its part: so
    all know the step's targets, and the position holds for any number of processes.

    Args:
        config: what to read and how to batch it.
        tokenizer: of the model.
        pin_memory: whether batches are in pinned memory.
        bad_rows_file: where to list the bad rows, for people and for the next start.

    Raises:
        UserError: a source that cannot be read, here or from `next`.
    """

    def __init__(
        self,
        config: DataConfig | TrainConfig,
        tokenizer: Tokenizer,
        *,
        pin_memory: bool = False,
        bad_rows_file: Path | None = None,
    ) -> None:
        self._config = config
        self._pin_memory = pin_memory
        self._specs = parse_specs(config.data)
        self._bad_rows = BadRowsFile(bad_rows_file, config.bad_rows)
        self._sources = [
            open_source(spec, tokenizer, config.val_fraction, self._bad_rows.of(spec.text))
            for spec in self._specs
        ]
        self._header = {
            "version": STATE_VERSION,
            "tokenizer": tokenizer.fingerprint,
            "seed": config.seed,
            "val_fraction": config.val_fraction,
            "sources": [
                {"spec": spec.text, "weight": spec.weight, "identity": source.identity()}
                for spec, source in zip(self._specs, self._sources, strict=True)
            ],
        }
        self._position: State | None = None
        self._batches: Prefetcher[tuple[Batch, State]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()  # a batch always: nothing stops it

    def next_batch(self, is_stopped: Callable[[], bool] = lambda: False) -> Batch | None:
        """`next_batch` waits however long a source takes, and gives None once `is_stopped`.

        Raises:
            UserError: every source has failed; `state_dict` is still good.
        """
        if self._batches is None:
            self._batches = Prefetcher(self._pipeline(), PREFETCH, "hamner-data")
        while not is_stopped():
            try:
                batch, self._position = self._batches.get(timeout=POLL_SECONDS)
            except NotReady:
                continue
            return batch
        return None

    def _pipeline(self) -> Iterator[tuple[Batch, State]]:
        """The iterator goes on after the position; it must not keep the loader alive."""
        mixed = stages.mixture(self._specs, self._readers(), self._position)
        packed = stages.packed(mixed, self._config.batch_size, self._config.seq_len)
        if self._pin_memory:
            return ((batch.pin_memory(), state) for batch, state in packed)
        return packed

    def _readers(self) -> list[stages.Reader]:
        """The readers give the training documents of each source."""
        return [
            partial(stages.epochs, source, spec.text, self._config.seed)
            for spec, source in zip(self._specs, self._sources, strict=True)
        ]

    def state_dict(self) -> State:
        """The state is that after the last batch handed out: JSON, no prefetched batch counts."""
        return {**self._header, "position": self._position}

    def load_state_dict(self, state: State) -> None:
        """The loader goes on where `state_dict` was taken, also with other sizes of a batch.

        Raises:
            UserError: the state is of other data, another tokenizer, seed or validation split, or
                damaged.
        """
        if self._batches is not None:
            raise RuntimeError("load the state before the first batch")
        try:
            _check_same_data(state, self._header)
            if state["position"] is not None:
                _check_state(state["position"], len(self._specs))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--resume: the saved data position is damaged ({type(error).__name__}: {error})"
            ) from error
        self._position = state["position"]
        for spec, counts in self.progress().items():
            if counts["lost"]:
                logger.warning("--data %s: was lost before; still going on without it", spec)

    def progress(self) -> dict[str, State]:
        """The counters of each source are those up to the last batch handed out.

        Returns:
            By spec: `tokens` and `documents` read, `epochs` completed before the last document,
            empty documents `skipped`, and whether the source is `lost`: the others have its share.
            Of a source with bad rows also `bad_rows`: their number by file and kind.
        """
        self._bad_rows.write()
        bad_rows = self._bad_rows.counts()
        nothing = [None] * len(self._specs)
        documents = (self._position or {}).get("documents", {"sources": nothing, "lost": nothing})
        progress = {}
        columns = (self._specs, documents["sources"], documents["lost"])
        for spec, state, since in zip(*columns, strict=True):
            counts = state or stages.START
            progress[spec.text] = {
                "tokens": counts["tokens"],
                "documents": counts["documents"],
                "epochs": counts["epoch"],
                "skipped": counts["skipped"],
                "lost": since is not None,
            }
            if spec.text in bad_rows:
                progress[spec.text]["bad_rows"] = bad_rows[spec.text]
        return progress

    def validation_rows(self, max_tokens: int, status: Status = SILENT) -> Batch:
        """The validation set is of held-out documents, packed, the same whatever the seed is.

        The sources are mixed by the same weights as in training while they last.

        Args:
            max_tokens: size of the set; a smaller corpus gives what it has.
            status: shows the rows.

        Returns:
            A batch of (R, T) with R * T <= max_tokens; R = 0 when the corpus holds out less than a
            row.
        """
        seq_len = self._config.seq_len
        empty = torch.empty((0, seq_len), dtype=torch.int64)
        rows = [Batch(empty, empty, empty.int())]
        if self._config.val_fraction > 0:
            readers = [
                lambda _, source=source: stages.one_epoch(source, "validation", VALIDATION_SEED)
                for source in self._sources
            ]
            packed = stages.packed(stages.mixture(self._specs, readers, None), 1, seq_len)
            wanted = max_tokens // seq_len
            try:
                with status.task("gathering validation rows", wanted, "rows") as task:
                    for row, _ in itertools.islice(packed, wanted):
                        rows.append(row)
                        task.advance()
            finally:
                self._bad_rows.write()
        return Batch(
            **{name: torch.cat([vars(row)[name] for row in rows]) for name in vars(rows[0])}
        )

    def validation_key(self, max_tokens: int) -> State:
        """The key holds what decides `validation_rows`: JSON, equal for equal rows."""
        decisive = {key: value for key, value in self._header.items() if key != "seed"}
        return decisive | {"seq_len": self._config.seq_len, "max_tokens": max_tokens}

    def require_documents(self) -> None:
        """The function raises a `UserError` where a source has no document to train on."""
        try:
            for read in self._readers():
                next(read(None))
        finally:
            self._bad_rows.write()

    def close(self) -> None:
        """The background thread stops; the loader gives no more batches."""
        if self._batches is not None:
            self._batches.close()
        self._bad_rows.write()


def _check_state(position: State, num_sources: int) -> None:
    """The function refuses what is no state of `stages.packed`, which a damaged file may hold.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: with what is wrong.
    """
    check_counts(position, "used")
    documents = position["documents"]
    for key in stages.STATE_KEYS:
        if len(documents[key]) != num_sources:
            raise ValueError(f"{key} of {len(documents[key])} sources")
    if not all(math.isfinite(credit) and credit >= 0 for credit in documents["credit"]):
        raise ValueError("credit")
    for lost, used in zip(documents["lost"], documents["used"], strict=True):
        check_counts({"lost": 0 if lost is None else lost, "used": used}, "lost", "used")
    for source in documents["sources"]:
        if source is not None:
            check_counts(source, "epoch", "tokens", "documents", "skipped")
            if source["position"] is not None:
                check_counts(source["position"], "file", "block", "row")


def _check_same_data(saved: State, current: State) -> None:
    """The function refuses anything that would silently change what is read next."""
    if saved.get("version") != current["version"]:
        raise UserError(
            f"--resume: the saved data position has format {saved.get('version')}, "
            f"this version of Hamner reads format {current['version']}"
        )
    for key, what in {
        "tokenizer": "the tokenizer (--tokenizer, --vocab-size) of fingerprint",
        "seed": "--seed",
        "val_fraction": "a validation fraction of",
    }.items():
        if saved[key] != current[key]:
            raise UserError(
                f"--resume: the run was saved with {what} {saved[key]}, now it is {current[key]}; "
                "its data cannot go on from there"
            )
    contents = [
        [(source["weight"], source["identity"]) for source in state["sources"]]
        for state in (saved, current)
    ]
    if contents[0] != contents[1]:
        raise UserError(
            "--resume: --data is not what the run was saved with: "
            f"{describe(saved['sources'])} then, {describe(current['sources'])} now"
        )
