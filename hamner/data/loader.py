"""Batches for training and validation, with a state that resumes token for token.

`TrainLoader` runs the pipeline of `stages` in a background thread (the tokenizer works without the
GIL) behind a short queue. Each batch travels with its state, so batches that were prefetched but
never handed out do not count.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from hamner.data import stages
from hamner.data.background import NotReady, Prefetcher
from hamner.data.batch import Batch
from hamner.data.documents import TokenSource
from hamner.data.shuffle import State, check_count
from hamner.data.sources import open_source
from hamner.data.specs import Spec, parse_specs
from hamner.data.tokenizer import Tokenizer
from hamner.errors import UserError

logger = logging.getLogger(__name__)

STATE_VERSION = 2
#: How often a wait for a batch looks whether to go on waiting.
POLL_SECONDS = 0.1
#: Validation reads the same documents whatever the seed, so that runs compare.
VALIDATION_SEED = 0


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to batch it.

    Attributes:
        specs: values of `--data`, `SPEC[=WEIGHT]`; without any, the built-in corpus.
        seq_len: tokens a row.
        batch_size: rows a batch.
        seed: of the order of documents.
        val_fraction: share of documents held out for validation. Shards have their own, from when
            they were prepared.
    """

    specs: tuple[str, ...]
    seq_len: int
    batch_size: int
    seed: int
    val_fraction: float = 0.01


class TrainLoader:
    """Endless training batches. Iterate, and `close` at the end.

    Where several processes train one model, each reads the whole batches and trains on its part: so
    all know the step's targets, and the position holds for any number of processes.

    Args:
        config: what to read.
        tokenizer: that of the model.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.
        prefetch: batches made ahead.

    Raises:
        UserError: a source that cannot be read, here or from `next`.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        pin_memory: bool = False,
        prefetch: int = 8,
    ) -> None:
        self._config = config
        self._pin_memory = pin_memory
        self._prefetch = prefetch
        self._specs = parse_specs(config.specs)
        self._sources = _open_sources(self._specs, tokenizer, config.val_fraction)
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
        batch = self.next_batch()
        assert batch is not None
        return batch

    def next_batch(self, is_stopped: Callable[[], bool] = lambda: False) -> Batch | None:
        """The next batch, however long a source takes, or None once `is_stopped`.

        Raises:
            UserError: every source has failed; `state_dict` is still good.
        """
        if self._batches is None:
            # The thread runs a function, not a method: it must not keep the loader alive.
            batches = _batches(
                self._config,
                specs=self._specs,
                sources=self._sources,
                position=self._position,
                pin_memory=self._pin_memory,
            )
            self._batches = Prefetcher(batches, self._prefetch, "hamner-data")
        while not is_stopped():
            try:
                batch, self._position = self._batches.get(timeout=POLL_SECONDS)
            except NotReady:
                continue
            return batch
        return None

    def state_dict(self) -> State:
        """The state after the last batch handed out: JSON, never counting prefetched batches."""
        return {**self._header, "position": self._position}

    def load_state_dict(self, state: State) -> None:
        """Goes on where `state_dict` was taken; batch size and sequence length may differ.

        Raises:
            UserError: the state is of other data, another tokenizer, seed or validation split, or
                damaged.
        """
        if self._batches is not None:
            raise RuntimeError("load the state before the first batch")
        try:
            _check_same_data(state, self._header)
            _check_position(state["position"], len(self._specs))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"--resume: the saved data position is damaged ({type(error).__name__}: {error})"
            ) from error
        self._position = state["position"]
        for spec, counts in self.progress().items():
            if counts["lost"]:
                logger.warning("--data %s: was lost before; still going on without it", spec)

    def progress(self) -> dict[str, State]:
        """Counters of each source up to the last batch handed out.

        Returns:
            By spec: `tokens` and `documents` read, `epochs` completed before the last document,
            empty documents `skipped`, and whether the source is `lost`: the others take its place.
        """
        documents = self._position["documents"] if self._position else None
        nothing = [None] * len(self._specs)
        states = documents["sources"] if documents else nothing
        lost = documents["lost"] if documents else nothing
        return {
            spec.text: {
                "tokens": state["tokens"] if state else 0,
                "documents": state["documents"] if state else 0,
                "epochs": state["epoch"] if state else 0,
                "skipped": state["skipped"] if state else 0,
                "lost": since is not None,
            }
            for spec, state, since in zip(self._specs, states, lost, strict=True)
        }

    def validation_rows(self, max_tokens: int) -> Batch:
        """As the function of that name, from the sources that are open already.

        Raises:
            UserError: also a source without a document to train on, where nothing was held out.
        """
        rows = _validation_rows(self._config, self._specs, self._sources, max_tokens)
        if not len(rows.inputs):
            # Perhaps there is nothing at all: better said now than at the first batch.
            for source, spec in zip(self._sources, self._specs, strict=True):
                next(stages.epochs(source, spec.text, self._config.seed, None))
        return rows

    def validation_key(self, max_tokens: int) -> State:
        """What decides `validation_rows`: JSON, equal for equal rows."""
        decisive = {key: value for key, value in self._header.items() if key != "seed"}
        return decisive | {"seq_len": self._config.seq_len, "max_tokens": max_tokens}

    def close(self) -> None:
        """Stops the background thread; the loader gives no more batches."""
        if self._batches is not None:
            self._batches.close()


def validation_rows(config: DataConfig, tokenizer: Tokenizer, max_tokens: int) -> Batch:
    """The validation set: held-out documents, packed, the same whatever `config.seed` is.

    Args:
        config: of the training run; sources are mixed by the same weights while they last.
        tokenizer: that of the model.
        max_tokens: size of the set; a smaller corpus gives what it has.

    Returns:
        A batch of (R, T) with R * T <= max_tokens; R = 0 when the corpus holds out less than a
        row.

    Raises:
        UserError: a source that cannot be read.
    """
    specs = parse_specs(config.specs)
    sources = _open_sources(specs, tokenizer, config.val_fraction)
    return _validation_rows(config, specs, sources, max_tokens)


def _validation_rows(
    config: DataConfig, specs: list[Spec], sources: list[TokenSource], max_tokens: int
) -> Batch:
    num_rows = max_tokens // config.seq_len if config.val_fraction > 0 else 0
    rows: list[stages.Rows] = []
    if num_rows:
        streams = [
            stages.WeightedStream(
                spec.text,
                spec.weight,
                lambda _, source=source: stages.one_epoch(source, "validation", VALIDATION_SEED),
            )
            for source, spec in zip(sources, specs, strict=True)
        ]
        documents = stages.mixture(streams, None)
        packed = stages.packed(documents, 1, config.seq_len)
        rows = [row for row, _ in itertools.islice(packed, num_rows)]
    empty = np.empty((0, config.seq_len), np.int64)
    return Batch(
        inputs=torch.from_numpy(np.concatenate([empty, *(row.inputs for row in rows)])),
        targets=torch.from_numpy(np.concatenate([empty, *(row.targets for row in rows)])),
        document_ids=torch.from_numpy(
            np.concatenate([empty.astype(np.int32), *(row.document_ids for row in rows)])
        ),
    )


def _open_sources(
    specs: list[Spec], tokenizer: Tokenizer, val_fraction: float
) -> list[TokenSource]:
    return [open_source(spec, tokenizer, val_fraction) for spec in specs]


def _batches(
    config: DataConfig,
    specs: list[Spec],
    sources: list[TokenSource],
    position: State | None,
    pin_memory: bool,
) -> Iterator[tuple[Batch, State]]:
    """The whole pipeline, going on after `position`."""
    streams = [
        stages.WeightedStream(
            spec.text, spec.weight, partial(stages.epochs, source, spec.text, config.seed)
        )
        for source, spec in zip(sources, specs, strict=True)
    ]
    documents, used = (position["documents"], position["used"]) if position else (None, 0)
    mixed = stages.mixture(streams, documents, used, stages.LOST_TOKENS)
    for rows, state in stages.packed(mixed, config.batch_size, config.seq_len):
        arrays = (rows.inputs, rows.targets, rows.document_ids)
        batch = Batch(*(torch.from_numpy(array.copy()) for array in arrays))
        yield batch.pin_memory() if pin_memory else batch, state


def _check_position(position: State | None, num_sources: int) -> None:
    """Refuses what is not the state of `stages.packed`, which a damaged file may hold.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: with what is wrong.
    """
    if position is None:
        return
    check_count(position, "used")
    documents = position["documents"]
    for key in ("sources", "credit", "lost", "used"):
        if len(documents[key]) != num_sources:
            raise ValueError(f"{key} of {len(documents[key])} sources")
    if not all(math.isfinite(credit) and credit >= 0 for credit in documents["credit"]):
        raise ValueError("credit")
    for key in ("lost", "used"):
        for value in documents[key]:
            if key == "used" or value is not None:
                check_count({key: value}, key)
    for source in documents["sources"]:
        if source is not None:
            _check_source(source)


def _check_source(source: State) -> None:
    """The function refuses what is not the state of a source; see `_check_position`."""
    for key in ("epoch", "tokens", "documents", "skipped"):
        check_count(source, key)
    if source["position"] is not None:
        for key in ("file", "block", "row"):
            check_count(source["position"], key)


def _check_same_data(saved: State, current: State) -> None:
    """Refuses to go on with anything that would silently change what is read next."""
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
            f"{_describe(saved)} then, {_describe(current)} now"
        )


def _describe(state: State) -> str:
    descriptions = []
    for source in state["sources"]:
        identity = ", ".join(f"{key} {value}" for key, value in source["identity"].items())
        descriptions.append(f"{source['spec']}={source['weight']:g} ({identity})")
    return " ".join(descriptions)
