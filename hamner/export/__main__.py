"""`python -m hamner.export` writes a run's model in the formats that others read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hamner.cli import run_command
from hamner.errors import UserError
from hamner.files import made_whole

if TYPE_CHECKING:
    from hamner.checkpoint.saved_model import SavedModel


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's model as a folder for Hugging Face's transformers, or as a file for llama.cpp.

    Weights keep the precision they were trained in.
    """

    output: Annotated[Path, tyro.conf.Positional]
    """folder to make for hf, file to make for gguf; must not exist"""
    to: Literal["hf", "gguf"]
    """hf: safetensors, config, tokenizer and chat template that AutoModelForCausalLM and
    AutoTokenizer load; gguf: one file for llama.cpp"""
    checkpoint: Path | None = None
    """a run's folder or one of its checkpoints; default the run in runs/ that saved last"""


def export(config: ExportConfig) -> Path:
    """The function exports as `config` says and returns the path of what it wrote.

    Raises:
        UserError: there is no such model, the format has no place for it, or the output cannot be
            written; nothing is left behind then.
    """
    from hamner.checkpoint.saved_model import find_saved_model
    from hamner.export.hf import write_hugging_face

    if config.output.exists():
        raise UserError(f"{config.output} exists already: name another output, or remove it")
    saved = find_saved_model(config.checkpoint)
    write = write_hugging_face if config.to == "hf" else _write_gguf
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with made_whole(config.output) as path:
            write(path, saved)
    except OSError as error:
        raise UserError(f"{config.output} cannot be written: {error.strerror}") from error
    return config.output


def _write_gguf(file: Path, saved: "SavedModel") -> None:
    try:
        from hamner.export.gguf import write_gguf
    except ModuleNotFoundError as error:
        raise UserError(
            f"--to gguf needs the package {error.name}: pip install 'hamner[gguf]'"
        ) from error
    from hamner.data.chat_template import END_TOKEN

    write_gguf(
        file,
        saved.config.model,
        saved.weights(),
        saved.tokenizer,
        name=saved.name,
        context=saved.config.seq_len,
        end_of_turn=END_TOKEN if saved.is_chat else None,
    )


def parse(args: Sequence[str]) -> ExportConfig:
    """The function reads the command line."""
    return tyro.cli(ExportConfig, args=args, prog="python -m hamner.export")


def main(args: Sequence[str]) -> None:
    """The command exports as its flags say."""
    config = parse(args)
    print(f"wrote {export(config)}")


if __name__ == "__main__":
    run_command(main)
