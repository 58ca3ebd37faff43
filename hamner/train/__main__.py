"""`python -m hamner.train` pre-trains an option from scratch, resumes a run, replays a bad step."""

import sys

if __package__ != "hamner.train":
    print("error: start this with python -m hamner.train", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Callable, Sequence
from dataclasses import replace

from hamner.cli import read_ahead, read_flags, run_command
from hamner.config.options import find_option
from hamner.config.train import TrainConfig
from hamner.parallel.ranks import is_restart
from hamner.train.flags import Origin, require_consistent

COMMAND = "hamner.train"


def parse(args: Sequence[str]) -> TrainConfig:
    """The function reads the command line.

    The defaults are those of `--option`, or with `--resume` and `--replay` those the run was
    started with, so that `--resume --run-dir runs/a` alone continues a run and any other flag
    changes it. With `--init-from` model and tokenizer are those of the run that it names.

    Raises:
        UserError: values that make no sense, alone or together.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    origin = read_ahead(Origin, args, COMMAND)
    if is_restart(origin.folder):
        origin = replace(origin, resume=True)
    default = origin.defaults()
    config = read_flags(TrainConfig, args, COMMAND, default=default)
    find_option(config.option)
    require_consistent(config, default, origin)
    return config


def main(args: Sequence[str], on_phase: Callable[[str, int], None] | None = None) -> int:
    """The command trains as its flags say and returns the exit code.

    Args:
        args: the command line.
        on_phase: see `hamner.train.loop.TrainingLoop`; default nobody watches.
    """
    config = parse(args)
    # Torch takes a second or more to load: only now, so that --help and refusals are immediate.
    if config.replay:
        from hamner.train.replay import replay

        print(replay(config))
        return 0
    from hamner.train.loop import train

    result = train(config) if on_phase is None else train(config, on_phase=on_phase)
    return result.exit_code


if __name__ == "__main__":
    run_command(main)
