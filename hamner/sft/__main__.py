"""`python -m hamner.sft` fine-tunes a pre-trained model on conversations, or resumes that."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from hamner.cli import flag_value, gather_data, run_command
from hamner.config.options import OPTIONS
from hamner.config.sft import SftConfig
from hamner.config.train import CONFIG_FILE, TrainConfig
from hamner.errors import EXIT_INTERRUPTED, UserError
from hamner.parallel.ranks import resume_after_restart


def parse(args: Sequence[str]) -> SftConfig:
    """The function reads the command line.

    The defaults follow from the run that `--checkpoint` names, or with `--resume` they are those
    the run was started with.

    Raises:
        UserError: values that make no sense, alone or together.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    args = gather_data(args)
    default = SftConfig(model=OPTIONS[TrainConfig.option].model)
    path, run_dir = flag_value(args, "--checkpoint"), flag_value(args, "--run-dir")
    if path is not None:
        default = SftConfig.for_checkpoint(Path(path))
    saved = Path(run_dir) if run_dir else default.run_dir
    if saved is not None:
        args = resume_after_restart(args, saved)
    if "--resume" in args and saved is not None and (saved / CONFIG_FILE).is_file():
        default = SftConfig.read(saved / CONFIG_FILE)
        default = replace(default, run=replace(default.run, resume=True, stop_after=None))
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[SftConfig],
        default=default,
        args=args,
        prog="python -m hamner.sft",
        config=(tyro.conf.HelptextFromCommentsOff, tyro.conf.SuppressFixed),
    )
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

    result = fine_tune(config)
    return EXIT_INTERRUPTED if result.interrupted else 0


if __name__ == "__main__":
    run_command(main)
