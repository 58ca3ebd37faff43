"""`python -m hamner.train`: pre-train an option from scratch, or resume a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from hamner.cli import EXIT_INTERRUPTED, flag_value, gather_data, run_command
from hamner.config import CONFIG_FILE, TrainConfig


def parse(args: Sequence[str]) -> TrainConfig:
    """Read the command line.

    The defaults are those of `--option`, or with `--resume` those the run was started with, so
    that `--resume --run-dir runs/a` alone continues a run and any other flag changes it.

    Raises:
        UserError: values that make no sense, alone or together.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    args = gather_data(args)
    option = flag_value(args, "--option") or TrainConfig.option
    default = TrainConfig.for_option(option)
    run_dir = flag_value(args, "--run-dir")
    saved = (Path(run_dir) if run_dir else default.folder) / CONFIG_FILE
    if "--resume" in args and saved.is_file():
        default = replace(TrainConfig.read(saved), resume=True, stop_after=None)
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        default=default,
        args=args,
        prog="python -m hamner.train",
        config=(tyro.conf.HelptextFromCommentsOff,),
    )


def main(args: Sequence[str]) -> int:
    """Train as the command line says; returns the exit code."""
    config = parse(args)
    # Torch takes a second or more to load: only now, so that --help and refusals are immediate.
    from hamner.trainer import train

    result = train(config)
    return EXIT_INTERRUPTED if result.interrupted else 0


if __name__ == "__main__":
    run_command(main)
