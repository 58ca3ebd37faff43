"""`python -m hamner.export` writes a run's model in the formats that others read."""

import sys

if __package__ != "hamner.export":
    print("error: start this with python -m hamner.export", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hamner.cli import read_flags, run_command
from hamner.errors import UserError
from hamner.files import made_whole, writing

GgufType = Literal["bf16", "q8_0"]


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's model as a folder for Hugging Face's transformers, or as a file for llama.cpp.

    Weights keep the precision they were trained in, unless --type says otherwise.
    """

    output: Annotated[Path, tyro.conf.Positional]
    """folder to make for hf, file to make for gguf; must not exist"""
    to: Literal["hf", "gguf"]
    """hf: safetensors, config, tokenizer and chat template that AutoModelForCausalLM and
    AutoTokenizer load, with a model card; gguf: one file for llama.cpp"""
    checkpoint: Path | None = None
    """a run's folder or one of its checkpoints; default the run in runs/ that saved last"""
    type: GgufType | None = None
    """of gguf's matrices; q8_0: 8 bits a weight and a scale for 32 of them, about half of bf16;
    default as trained"""

    def __post_init__(self) -> None:
        if self.type and self.to != "gguf":
            raise UserError(f"--type {self.type} is of --to gguf: leave it out with --to {self.to}")


def export(config: ExportConfig) -> Path:
    """The function exports as `config` says and returns the path of what it wrote.

    Raises:
        UserError: there is no such model, the format cannot hold it, or the output cannot be
            written; nothing is left behind then.
    """
    from hamner.checkpoint.saved_model import find_saved_model

    if config.output.exists():
        raise UserError(f"{config.output} exists already: name another output, or remove it")
    saved = find_saved_model(config.checkpoint)
    if config.to == "hf":
        from hamner.export.hf import write_hugging_face as write
    else:
        try:
            from hamner.export.gguf import write_gguf
        except ModuleNotFoundError as error:
            raise UserError(
                f"--to gguf needs the package {error.name}: pip install -e '.[gguf]'"
            ) from error
        write = partial(write_gguf, matrices=config.type)
    with writing(str(config.output)):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with made_whole(config.output) as path:
            write(path, saved)
    return config.output


def main(args: Sequence[str]) -> None:
    config = read_flags(ExportConfig, args, "hamner.export")
    print(f"wrote {export(config)}")


if __name__ == "__main__":
    run_command(main)
