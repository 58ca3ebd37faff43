"""`python -m hamner.evaluate` says how good a model is, or several side by side."""

import sys

if __package__ != "hamner.evaluate":
    print("error: start this with python -m hamner.evaluate", file=sys.stderr)
    raise SystemExit(2)

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hamner.cli import for_terminal, read_flags, run_command
from hamner.config.model import flag
from hamner.config.train import MAX_STEP_TOKENS
from hamner.errors import UserError
from hamner.files import require_writable, write_output, writing
from hamner.progress import Status, waiting

if TYPE_CHECKING:
    from rich.console import Console

    from hamner.checkpoint.saved_model import SavedModel
    from hamner.config.train import TrainConfig
    from hamner.data.tokenizer import Tokenizer
    from hamner.evaluate.evaluation import HeldOut, Kind, Sample, SourceResult

LISTS = ("--checkpoint", "--data", "--conversations", "--tasks")
BEGINS = b'{\n "models": ['
"""what `--output` holds"""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a model, or several side by side.

    Validation loss, perplexity and bits per byte of every source, loss by position, and samples.
    """

    checkpoint: tuple[Path, ...]
    """runs, or checkpoints of theirs; of a run the best checkpoint, or the newest where none was
    looked for"""
    data: tuple[str, ...] = ()
    """SPEC ... of text: builtin; a file, folder or glob; hf:...; shards:DIR. Default what the
    models were pre-trained on"""
    conversations: tuple[str, ...] = ()
    """SPEC ... of conversations: builtin; a .jsonl or .parquet file, folder or glob; hf:... Default
    what the models were fine-tuned on"""
    val_fraction: float | None = None
    """share of the documents, chosen by their hash; default what every model held out. 1 is
    everything, for data that none has seen"""
    seq_len: int | None = None
    """tokens per sequence; default the longest that a model was trained with"""
    eval_tokens: int | None = None
    """most tokens of a source; default as in training"""
    tasks: tuple[str, ...] = ()
    """tasks of lm-evaluation-harness: hellaswag arc_easy ... (pip install -e '.[harness]')"""
    task_folder: Path | None = None
    """folder of task files to take the tasks from"""
    task_limit: int | None = None
    """most examples of a task"""
    output: Path | None = None
    """JSON file to write the results to"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to compute"""

    def __post_init__(self) -> None:
        for name in ("seq_len", "eval_tokens", "task_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{flag(name)} {value} must be above 0")
        if self.seq_len is not None and self.seq_len > MAX_STEP_TOKENS:
            raise UserError(f"--seq-len {self.seq_len} must be at most {MAX_STEP_TOKENS:,}")
        for name in ("task_folder", "task_limit"):
            if getattr(self, name) is not None and not self.tasks:
                raise UserError(f"--{flag(name)} {getattr(self, name)} needs --tasks beside it")
        if self.val_fraction is not None and not 0 < self.val_fraction <= 1:
            raise UserError(f"--val-fraction {self.val_fraction} must be above 0 and at most 1")
        if self.output is not None:
            require_writable(self.output, "--output", begins=BEGINS)


@dataclass(frozen=True)
class ModelResult:
    """The result holds all that was found out about one model."""

    checkpoint: str
    option: str
    parameters: int
    is_chat: bool
    sources: "list[SourceResult]"
    samples: "list[Sample]"
    tasks: dict[str, dict[str, float]]


def evaluate(config: EvaluateConfig) -> list[ModelResult]:
    """The function evaluates every checkpoint on the same held-out data.

    Raises:
        UserError: a checkpoint, a source or a task that cannot be read.
    """
    from hamner.checkpoint.saved_model import find_saved_model
    from hamner.export.hf import unsupported_reason
    from hamner.parallel.device import select_device

    # What --tasks needs is asked for early. The last two packages are what the harness's model
    # class for Hugging Face's format needs.
    packages = ("lm_eval", "transformers", "accelerate") if config.tasks else ()
    if not all(map(importlib.util.find_spec, packages)):
        raise UserError("--tasks needs lm-evaluation-harness: pip install -e '.[harness]'")
    device = select_device(config.device)
    models = [find_saved_model(path) for path in config.checkpoint]
    for saved in models if config.tasks else ():
        if reason := unsupported_reason(saved.config.model):
            raise UserError(
                f"--tasks: lm-evaluation-harness cannot read {saved.checkpoint.path}: {reason}"
            )
    return [_evaluate_model(saved, models, config, device) for saved in models]


def _evaluate_model(
    saved: "SavedModel", models: "list[SavedModel]", config: EvaluateConfig, device: Any
) -> ModelResult:
    from hamner.evaluate import evaluation

    with waiting("reading what was held out") as status:
        held_out = _open_held_out("text", saved.tokenizer, models, config=config, status=status)
        held_out += _open_held_out(
            "conversations", saved.tokenizer, models, config=config, status=status
        )
    tasks = {}
    if config.tasks:
        from hamner.evaluate.harness import run_tasks

        # Before the model is built, so that the device holds one of the two at a time.
        chosen = {"folder": config.task_folder, "limit": config.task_limit}
        tasks = run_tasks(saved, config.tasks, device=device, **chosen)
    model, sources = saved.build(device), []
    for source in held_out:
        with waiting(f"evaluating {saved.checkpoint.path} on {source.name}") as status:
            sources.append(evaluation.evaluate_source(model, saved.tokenizer, source, status))
    with waiting(f"sampling from {saved.checkpoint.path}") as status:
        samples = evaluation.samples(model, saved.tokenizer, is_chat=saved.is_chat, status=status)
    return ModelResult(
        checkpoint=str(saved.checkpoint.path),
        option=saved.config.option,
        parameters=saved.config.model.num_parameters(),
        is_chat=saved.is_chat,
        sources=sources,
        samples=samples,
        tasks=tasks,
    )


def _open_held_out(
    kind: "Kind",
    tokenizer: "Tokenizer",
    models: "list[SavedModel]",
    *,
    config: EvaluateConfig,
    status: Status,
) -> "list[HeldOut]":
    """The function opens what the models trained on this kind of data held out of it."""
    from hamner.config.sft import SftConfig
    from hamner.config.train import TrainConfig, require_sequence
    from hamner.data.specs import parse_specs
    from hamner.evaluate.evaluation import open_held_out

    every = [saved.config for saved in models]
    trained = [saved.config for saved in models if saved.is_chat == (kind == "conversations")]
    runs = trained or every
    if kind == "text" and not trained and config.data:
        runs = [_pre_training(saved, config) for saved in models]
    specs = config.data if kind == "text" else config.conversations
    if not specs:
        # Each once and without weights.
        parsed = (spec.text for run in trained for spec in parse_specs(run.data, 1.0))
        specs = tuple(dict.fromkeys(parsed))
    seq_len = config.seq_len or max(run.seq_len for run in every)
    max_tokens = config.eval_tokens or max(run.eval_tokens for run in runs)
    if specs and kind == "text":
        require_sequence(max_tokens, seq_len)
    usual = SftConfig.bad_rows if kind == "conversations" else TrainConfig.bad_rows
    return open_held_out(
        kind,
        specs,
        tokenizer,
        seq_len=seq_len,
        max_tokens=max_tokens,
        val_fraction=config.val_fraction or min(run.val_fraction for run in runs),
        bad_rows=max(usual, *(run.bad_rows for run in runs)),
        document_mask=kind == "conversations" or any(run.document_mask for run in runs),
        status=status,
    )


def _pre_training(saved: "SavedModel", config: EvaluateConfig) -> "TrainConfig":
    """The function finds what a chat model was before it was fine-tuned, which says what of a text
    was held out.

    Raises:
        UserError: its run cannot be read, and no --val-fraction says it instead.
    """
    from hamner.config.train import TrainConfig

    run = saved.config
    try:
        while run.sft is not None:
            run = TrainConfig.of_run(run.sft.checkpoint, "--checkpoint")
    except UserError as error:
        if config.val_fraction is None:
            raise UserError(
                f"--data: what {saved.checkpoint.path} did not train on, the run that it was "
                f"fine-tuned from says, which cannot be read ({error}): name that beside it, or "
                "give --val-fraction"
            ) from error
    return run


def show(results: Sequence[ModelResult], console: "Console") -> None:
    """The function prints a table with a column for each model, then their samples."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("", overflow="fold")
    for result in results:
        table.add_column(result.checkpoint, justify="right", overflow="fold")
    columns = [_sections(result) for result in results]
    for section in dict.fromkeys(section for column in columns for section in column):
        parts = [column.get(section, {}) for column in columns]
        table.add_section()
        table.add_row(Text(section, "bold"))
        for name in dict.fromkeys(name for part in parts for name in part):
            table.add_row(Text(name), *(part.get(name, "-") for part in parts))
    console.print(table)
    for result in results:
        console.print(Text(f"\n{result.checkpoint}", "bold"), soft_wrap=True)
        for sample in result.samples:
            console.print(Text(f"> {sample.prompt}\n{for_terminal(sample.text)}"), soft_wrap=True)


def _sections(result: ModelResult) -> dict[str, dict[str, str]]:
    """The function words what the table says of one model: rows by section."""
    kind = "chat model" if result.is_chat else "base model"
    sections = {"model": {"kind": kind, "parameters": f"{result.parameters:,}"}}
    for source in result.sources:
        rows = {"tokens": f"{source.tokens:,}"}
        if source.tokens:
            rows["loss"] = f"{source.loss:.4f}"
            rows["perplexity"] = f"{source.perplexity:,.2f}"
        if source.bits_per_byte is not None:
            rows["bits per byte"] = f"{source.bits_per_byte:.4f}"
        for positions, loss in source.loss_by_position.items():
            rows[f"loss at {positions}"] = f"{loss:.4f}"
        sections[f"{source.kind}: {source.name}"] = rows
    for task, metrics in result.tasks.items():
        sections[f"task: {task}"] = {name: f"{value:.4f}" for name, value in metrics.items()}
    return sections


def main(args: Sequence[str]) -> None:
    config = read_flags(EvaluateConfig, args, "hamner.evaluate", lists=LISTS)
    from rich.console import Console

    results = evaluate(config)
    try:
        if config.output is not None:
            write(results, config.output)
    finally:
        # Last, as its reader may have seen enough; and what no file took is not lost.
        show(results, Console(highlight=False))
    if config.output is not None:
        print(f"\nwritten to {config.output}")


def write(results: Sequence[ModelResult], path: Path) -> None:
    """The function writes all that was found out as JSON.

    Raises:
        UserError: the file cannot be written; one that was there is as it was.
    """
    text = json.dumps({"models": [asdict(result) for result in results]}, indent=1) + "\n"
    with writing(f"--output {path}"):
        write_output(path, text.encode())


if __name__ == "__main__":
    run_command(main)
