"""A trial of a recipe is trained by hamner.train itself, in this process, on shards made once."""

import contextlib
import gc
import hashlib
import json
import math
import shutil
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from bench.conditions import conditions
from bench.recipe_trials import DIMENSIONS, SHARING, WARMUP_SHARE, Trial
from hamner.checkpoint import format as checkpoint
from hamner.checkpoint.run_folder import RunFolder
from hamner.config.model import flag
from hamner.config.recipe import RecipeConfig
from hamner.config.train import TrainConfig
from hamner.data.bad_rows import BadRows
from hamner.data.batch import Batch
from hamner.data.prepare import prepare
from hamner.data.sources import open_source
from hamner.data.specs import parse_specs
from hamner.data.tokenizer import Tokenizer, load_tokenizer
from hamner.errors import UserError
from hamner.evaluate.evaluation import open_held_out
from hamner.files import read_records
from hamner.train import __main__ as train
from hamner.train.data import RunData, open_loader
from hamner.train.int8_guard import Int8Guard
from hamner.train.loop import train as run_training

ONE_SHARD = 2**40
"""tokens; one shard is shuffled as a whole, so that a short run is a sample of everything"""
CURVE_POINTS = 100
"""of a run, in its result"""
POINTS_AN_EVALUATION = 5
"""of a long run, which so is evaluated about twenty times; others are at their end only"""
OWN = (
    *("recipe", *DIMENSIONS, "seed", "run_dir", "resume"),
    *("steps", "warmup_steps", "eval_every", "log_every"),
)
"""what follows from a trial, so that no flag for all runs may set it"""
SAVE_EVERY = 2_000
"""steps: what a killed machine costs"""


@dataclass(frozen=True)
class Prepared:
    """The data of all trials is tokenized once, training apart from validation."""

    shards: Path
    digest: str
    """of the tokens on both sides"""
    train_tokens: int
    validation: Batch
    validation_bytes: int
    """of the text that the validation rows' targets are"""

    @property
    def validation_tokens(self) -> int:
        return self.validation.targets.numel()

    def bits_per_byte(self, loss: float) -> float:
        """The method converts nats per token, ends of documents counted among the tokens."""
        return loss * self.validation_tokens / self.validation_bytes / math.log(2)


def prepare_data(
    data: Sequence[str], validation: Path, config: TrainConfig, output: Path
) -> Prepared:
    """The function tokenizes what the runs of `config`'s tokenizer and row length train and are
    evaluated on; what an earlier call did is used again.

    Raises:
        UserError: a source that cannot be read, or a document that is on both sides.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    name = hashlib.sha256("\n".join((*data, tokenizer.fingerprint)).encode()).hexdigest()[:8]
    shards = output / f"shards-{name}"
    output.mkdir(parents=True, exist_ok=True)
    index = prepare(data, shards, tokenizer, shard_tokens=ONE_SHARD, val_fraction=0.0)
    held_out = {digest_of(ids) for ids in _documents(str(validation), tokenizer)}
    twice = sum(digest_of(ids) in held_out for ids in _documents(f"shards:{shards}", tokenizer))
    if twice:
        raise UserError(
            f"--validation {validation}: {twice:,} of its documents are in --data too, so its loss "
            "would say nothing: name other files"
        )
    (source,) = open_held_out(
        "text",
        [str(validation)],
        tokenizer,
        seq_len=config.seq_len,
        max_tokens=ONE_SHARD,
        val_fraction=1.0,
        document_mask=False,
    )
    rows = source.batch
    if not len(rows.inputs):
        raise UserError(f"--validation {validation} is shorter than a row of {config.seq_len}")
    targets = rows.targets.flatten()
    text = tokenizer.decode(targets[targets != tokenizer.eot_id].tolist())
    content = json.dumps([shard["sha256"] for shard in index["shards"]]).encode()
    return Prepared(
        shards=shards,
        digest=hashlib.sha256(content + targets.numpy().tobytes()).hexdigest()[:16],
        train_tokens=sum(shard["tokens"] for shard in index["shards"]),
        validation=rows,
        validation_bytes=len(text.encode()),
    )


def digest_of(ids: np.ndarray) -> bytes:
    """The function gives the digest of a document's tokens."""
    return hashlib.blake2b(ids.astype(np.int32).tobytes(), digest_size=16).digest()


def _documents(spec: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The iterator gives the tokens of every document of a source."""
    (parsed,) = parse_specs([spec])
    source = open_source(parsed, tokenizer, 0.0, BadRows(spec))
    return (ids for ids, _ in source.tokens("train", 0, 0, None) if len(ids))


def configure(trial: Trial, folder: Path, data: Prepared | None = None) -> TrainConfig:
    """The function gives the configuration of a trial's run in `folder`.

    Raises:
        UserError: the flags make no sense, or set what every run has its own of.
    """
    given = {text.partition("=")[0].replace("_", "-") for text in trial.flags}
    for name in OWN:
        if f"--{flag(name)}" in given:
            raise UserError(f"--{flag(name)} is chosen for each run: leave the flag out")
    flags = {
        **{name: getattr(trial, name) for name in (*DIMENSIONS, "seed")},
        # What `auto` finds fastest on the day rounds otherwise, so it would be another run.
        "attention": "triton" if torch.cuda.is_available() else "auto",
        "sample_every": 0,
        "keep": 1,
        "save_every": SAVE_EVERY,
    }
    values = [text for name, value in flags.items() for text in (f"--{flag(name)}", str(value))]
    if trial.part != "long":
        values.append("--no-qk-norm")  # the recipes of one model are compared; its flags come after
    config = train.parse(["--recipe", trial.arm, *values, *trial.flags])
    steps = max(1, trial.tokens // config.tokens_per_step)
    log_every = max(1, steps // CURVE_POINTS)
    return replace(
        config,
        run_dir=folder,
        resume=bool(checkpoint.find(folder / "checkpoints")),
        data=(f"shards:{data.shards}",) if data else config.data,
        steps=steps,
        tokens=None,
        warmup_steps=max(1, round(WARMUP_SHARE * steps)),
        eval_every=POINTS_AN_EVALUATION * log_every if trial.part == "long" else steps,
        log_every=log_every,
    )


def run(trial: Trial, data: Prepared, folder: Path, end: float) -> dict | None:
    """The function trains a trial, from where an earlier call left it.

    Args:
        folder: of the run, which stays.
        end: `time.monotonic()` at which the run saves and leaves.

    Returns:
        The result as a line of results.jsonl; None if time, or the user, came first.

    Raises:
        UserError: it could not be evaluated.
    """
    config = configure(trial, folder, data)
    if not config.resume and folder.exists():
        shutil.rmtree(folder)  # it was killed before its first save

    def look_at_clock(phase: str, step: int) -> None:
        """The observer stops the run as a Ctrl-C would, between two steps; after the last one
        comes only the evaluation. Not by SIGINT, which a script's background commands ignore."""
        if phase == "step done" and step < config.steps and time.monotonic() >= end:
            signal.raise_signal(signal.SIGTERM)

    try:
        with (
            folder.with_name(f"{folder.name}.txt").open("a") as said,
            contextlib.redirect_stdout(said),
        ):
            outcome = run_training(
                config,
                open_data=lambda config, tokenizer, pin_memory, status: RunData(
                    open_loader(config, tokenizer, pin_memory), data.validation
                ),
                on_phase=look_at_clock,
                keeps_end=trial.part == "long",
            )
    finally:
        # The next run's plan must not meet this one's memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    # The last evaluation may have failed, and left the loss of the one before.
    loss = outcome.val_loss if outcome.val_step == outcome.step else None
    diverged = outcome.diagnosis is not None
    is_whole = trial.part != "long" and loss is not None  # evaluated at their end only
    if outcome.interrupted and not is_whole:
        return None
    if loss is None and not diverged:
        raise UserError(f"{folder.name} could not be evaluated: see {folder}.txt, then start again")
    diverged |= loss is None or not math.isfinite(loss)
    return describe(trial, config, data, None if diverged else loss)


def describe(trial: Trial, config: TrainConfig, data: Prepared, loss: float | None) -> dict:
    """The function gives the line of a run that has ended: what it was, and what it came to.

    A trial of `tune` has no speed, as others may have shared its GPU.

    Args:
        loss: on the validation rows, nats per token; None if it diverged.
    """
    records = list(read_records(RunFolder(config.folder).metrics))
    # The first third has compilation, and a graph that is recorded, in it.
    speeds = [record["tokens_per_second"] for record in records[len(records) // 3 :]]
    has_speed = bool(speeds) and trial.part not in SHARING
    return {
        **{name: getattr(trial, name) for name in Trial.__dataclass_fields__},
        "val_loss": loss,
        "bits_per_byte": None if loss is None else round(data.bits_per_byte(loss), 5),
        "diverged": loss is None,
        "seconds": round(records[-1]["seconds"], 2) if records else None,
        "tokens_per_second": round(statistics.median(speeds)) if has_speed else None,
        "peak_vram_gib": records[-1]["peak_vram_gib"] if records else None,
        **settings_of(config),
        "data": {
            "digest": data.digest,
            "train_tokens": data.train_tokens,
            "validation_tokens": data.validation_tokens,
            "validation_bytes": data.validation_bytes,
            "epochs": round(trial.tokens / data.train_tokens, 3),
        },
        **({} if config.matmul == "bf16" else {Int8Guard.KEY: fallen_operands(config.folder)}),
        "curve": curve_of(records),
        "conditions": conditions(),
    }


def fallen_operands(folder: Path) -> list[list]:
    """The function gives the operands of a run that went back to bf16, as its last checkpoint has
    them: layer, linear layer, operand, and the first step in bf16."""
    saved = checkpoint.find(RunFolder(folder).checkpoints)
    return saved[-1].state().get(Int8Guard.KEY, []) if saved else []


def settings_of(config: TrainConfig) -> dict:
    """The function gives what a result says of its run's configuration."""
    recipe = {field.name: getattr(config, field.name) for field in fields(RecipeConfig)}
    recipe |= {"weight_decay": config.weight_decay, "grad_clip": config.grad_clip}
    return {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "recipe": recipe | {"qk_norm": config.model.qk_norm},
        "parameters": config.model.num_parameters(),
    }


def curve_of(records: Sequence[Mapping]) -> list[list]:
    """The function gives tokens, training loss and validation loss along a run; the latter only
    where it was measured, as later records repeat it."""
    return [
        [
            record["tokens"],
            _rounded(record["loss"]),
            _rounded(record["val_loss"]) if record["val_step"] == record["step"] else None,
        ]
        for record in records
    ]


def _rounded(loss: float | None) -> float | None:
    return None if loss is None else round(loss, 4)
