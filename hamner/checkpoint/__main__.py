"""`python -m hamner.checkpoint import OLD.pt` works on checkpoints from the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hamner.cli import run_command, waiting
from hamner.errors import UserError


@dataclass(frozen=True)
class ImportConfig:
    """Turn a .pt checkpoint of the earlier trainer into a run: to chat, fine-tune, evaluate and
    export. Only tensors and plain values are read from it, nothing is unpickled."""

    file: Annotated[Path, tyro.conf.Positional]
    """the .pt checkpoint"""
    run_dir: Path
    """folder of the run to make; must not exist"""
    tokenizer: str
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
    config = tyro.cli(ImportConfig, args=args[1:], prog="python -m hamner.checkpoint import")
    # Torch takes a second or more to load.
    from hamner.checkpoint.import_pt import add_chat_tokens, import_checkpoint

    with waiting(f"importing {config.file}"):
        imported = import_checkpoint(config.file, config.run_dir, config.tokenizer)
    state = imported.checkpoint.state()
    print(
        f"imported {imported.config.model.num_parameters():,} parameters of step "
        f"{state['step']:,} ({state['tokens']:,} tokens) into {imported.checkpoint.path}"
    )
    if add_chat_tokens(imported.tokenizer) is None:
        print(
            f"--tokenizer {config.tokenizer} has no room for the tokens of conversations: the "
            "model can complete text, but not be fine-tuned to chat"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
