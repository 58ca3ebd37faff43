"""`python -m hamner.sft` fine-tunes a pre-trained model on conversations, or resumes that."""

import sys

if __package__ != "hamner.sft":
    print("error: start this with python -m hamner.sft", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hamner.cli import read_ahead, read_flags, run_command
from hamner.config.options import OPTIONS
from hamner.config.sft import SftConfig
from hamner.config.train import CONFIG_FILE, TrainConfig
from hamner.errors import UserError
from hamner.parallel.ranks import is_restart
from hamner.train.flags import refuse_without_effect

COMMAND = "hamner.sft"


@dataclass(frozen=True)
class Origin:
    """These flags decide what the others are by default."""

    checkpoint: Path | None = None
    run_dir: Path | None = None
    resume: bool = False

    def defaults(self) -> SftConfig:
        """The method gives the configuration of a start without any other flag.

        Raises:
            UserError: the run to fine-tune or to go on with cannot be read.
        """
        default = SftConfig(model=OPTIONS[TrainConfig.option].model)
        if self.checkpoint is not None:
            default = SftConfig.for_checkpoint(self.checkpoint)
        folder = self.run_dir if self.run_dir is not None else default.run_dir
        if folder is None or not (self.resume or is_restart(folder)):
            return default
        if not (folder / CONFIG_FILE).is_file():
            return default
        saved = SftConfig.read(folder / CONFIG_FILE)
        run = replace(saved.run, resume=True, stop_after=None, allow_data_change=False)
        return replace(saved, run_dir=folder, run=run)


def parse(args: Sequence[str]) -> SftConfig:
    """The function reads the command line.

    The defaults follow from the run that `--checkpoint` names, or with `--resume` they are those
    the run was started with.

    Raises:
        UserError: values that make no sense, alone or together.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    default = read_ahead(Origin, args, COMMAND).defaults()
    config = read_flags(SftConfig, args, COMMAND, default=default)
    if config.run.replay is not None:
        raise UserError(
            f"--replay {config.run.replay}: replay a fine-tuning run's batch with "
            f"python -m hamner.train --replay {config.run.replay}"
        )
    refuse_without_effect(config.training(), default.training())
    if config.sft.checkpoint is None and not config.run.resume:
        raise UserError("--checkpoint is needed: name the run to fine-tune, such as runs/a")
    if config.run.resume and config.run_dir is None:
        raise UserError("--resume needs --run-dir, the run to go on with, such as runs/a-sft")
    return config


def main(args: Sequence[str]) -> int:
    """The command fine-tunes as the command line says, and returns the exit code."""
    config = parse(args)
    # Torch takes a second or more to load: only now, so that --help and refusals are immediate.
    from hamner.sft.fine_tuning import fine_tune

    return fine_tune(config).exit_code


if __name__ == "__main__":
    run_command(main)
