"""`python -m hamner.train` pre-trains an option from scratch, resumes a run, replays a bad step."""

import sys

if __package__ != "hamner.train":
    print("error: start this with python -m hamner.train", file=sys.stderr)
    raise SystemExit(2)

from collections.abc import Callable, Sequence
from dataclasses import replace

from hamner.cli import read_ahead, read_flags, run_command
from hamner.config.options import find_option
from hamner.config.train import TrainConfig, require_sequence
from hamner.errors import UserError
from hamner.parallel.ranks import is_restart
from hamner.train.flags import Origin, refuse_without_effect

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
    for name in ("option", "recipe"):
        given, saved = getattr(config, name), getattr(default, name)
        if given != saved:
            raise UserError(
                f"--{name} {given} is not the {saved} that {default.folder} was started with; "
                "leave the flag out, or start another run with --run-dir FOLDER"
            )
    refuse_without_effect(config, default)
    lengths = [(each.eval_tokens, each.seq_len) for each in (config, default)]
    evaluates = config.eval_every and config.val_fraction
    if evaluates and lengths[0] != lengths[1]:
        require_sequence(config.eval_tokens, config.seq_len)
    if origin.has_run and config.init_from != default.init_from:
        raise UserError(
            f"--init-from {config.init_from} starts a new run, and --resume goes on with one that "
            f"started from {default.init_from or 'random weights'}: leave one of the two out"
        )
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
