"""`python -m hamner.export`: a run's model in the formats that others read."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hamner.cli import run_command
from hamner.errors import UserError

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
    """Export as `config` says; returns what was written.

    Raises:
        UserError: there is no such model, the format has no place for it, or the output cannot be
            written; nothing is left behind then.
    """
    from hamner.checkpoint.saved_model import find_saved_model

    if config.output.exists():
        raise UserError(f"{config.output} exists already: name another output, or remove it")
    saved = find_saved_model(config.checkpoint)
    write = {"hf": _write_hugging_face, "gguf": _write_gguf}[config.to]
    _write_whole(config.output, lambda path: write(path, saved))
    return config.output


def _write_hugging_face(folder: Path, saved: "SavedModel") -> None:
    from safetensors.torch import save_file

    from hamner.data.chat_template import END_TOKEN, JINJA_TEMPLATE
    from hamner.data.tokenizer import SPECIAL_TOKENS
    from hamner.export.hf import hugging_face_config, to_hugging_face

    tokenizer, shape = saved.tokenizer, saved.config.model
    weights = saved.weights()
    end_of_text = tokenizer.text_of(tokenizer.eot_id)
    eos_ids = [tokenizer.eot_id]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": saved.config.seq_len,
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    if saved.is_chat:
        eos_ids.append(tokenizer.special_id(END_TOKEN))
        tokenizer_config["additional_special_tokens"] = list(SPECIAL_TOKENS[1:])
        tokenizer_config["chat_template"] = JINJA_TEMPLATE
    model_config = hugging_face_config(
        shape,
        dtype=weights["embed.weight"].dtype,
        context=saved.config.seq_len,
        eos_ids=eos_ids,
    )
    folder.mkdir()
    tensors = {name: t.contiguous() for name, t in to_hugging_face(shape, weights).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(folder / "tokenizer.json")
    generation_config = {"eos_token_id": model_config["eos_token_id"], "pad_token_id": eos_ids[0]}
    for name, values in (
        ("config.json", model_config),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config),
    ):
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


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


def _write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder under another name, then give it its own."""
    temporary = output.with_name(f".{output.name}.new")
    _remove(temporary)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.rename(output)
    except OSError as error:
        _remove(temporary)
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def parse(args: Sequence[str]) -> ExportConfig:
    """Read the command line."""
    return tyro.cli(ExportConfig, args=args, prog="python -m hamner.export")


def main(args: Sequence[str]) -> None:
    """Export as the command line says."""
    config = parse(args)
    print(f"wrote {export(config)}")


if __name__ == "__main__":
    run_command(main)
