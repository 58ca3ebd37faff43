"""`python -m hamner.checkpoint import OLD.pt` makes a run of the earlier trainer's .pt file."""

import sys

if __package__ != "hamner.checkpoint":
    print("error: start this with python -m hamner.checkpoint", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hamner.cli import NameOrPath, read_flags, run_command
from hamner.errors import UserError
from hamner.progress import waiting


@dataclass(frozen=True)
class ImportConfig:
    """Turn a .pt checkpoint of the earlier trainer into a run: to chat, fine-tune, evaluate and
    export. Only tensors and plain values are read from it, nothing is unpickled."""

    file: Annotated[Path, tyro.conf.Positional]
    """the .pt checkpoint"""
    run_dir: Path
    """folder of the run to make; must not exist"""
    tokenizer: NameOrPath
    """the one the model was trained with: builtin, a tokenizer.json, or a Hugging Face name
    owner/name"""


def main(args: Sequence[str]) -> int:
    """The command imports as its flags say and returns 0.

    Raises:
        UserError: the first word is not `import`, or see `import_checkpoint`.
    """
    if args[:1] in (["--help"], ["-h"]):
        print(f"{__doc__}\n\nusage: python -m hamner.checkpoint import --help")
        return 0
    if args[:1] != ["import"]:
        raise UserError(
            "python -m hamner.checkpoint takes `import`: python -m hamner.checkpoint import OLD.pt"
        )
    config = read_flags(ImportConfig, args[1:], "hamner.checkpoint import")
    # Torch takes a second or more to load.
    from hamner.checkpoint.english import GUESSING_SHARE, english_loss, loss_of_guessing
    from hamner.checkpoint.import_pt import describe, import_checkpoint

    with waiting(f"importing {config.file}") as status:
        imported = import_checkpoint(config.file, config.run_dir, config.tokenizer, status)
    state = imported.checkpoint.state()
    print(
        f"imported {imported.config.model.num_parameters():,} parameters of step "
        f"{state['step']:,} ({state['tokens']:,} tokens) into {imported.checkpoint.path}"
    )
    print(describe(imported))
    guessing = loss_of_guessing(imported.config.model)
    try:
        with waiting("loading it to try it on built-in English") as status:
            loss = english_loss(imported, status)
    except UserError as error:
        print(f"WARNING: the tokenizer was not tried on English ({error})")
        return 0
    print(f"loss on built-in English: {loss:.2f} nats a token (guessing: {guessing:.2f})")
    if not loss < GUESSING_SHARE * guessing:
        print(
            f"WARNING: that is little better than guessing: --tokenizer {config.tokenizer} is not "
            "the one the model was trained with, or it was trained on no English or hardly at all"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
