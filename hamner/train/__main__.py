"""`python -m hamner.train` pre-trains an option from scratch, resumes a run, replays a bad step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from hamner.cli import flag_value, gather_data, run_command
from hamner.config.options import find_option, for_option
from hamner.config.train import CONFIG_FILE, TrainConfig
from hamner.errors import EXIT_BAD_STEPS, EXIT_INTERRUPTED, UserError
from hamner.parallel.ranks import resume_after_restart


def parse(args: Sequence[str]) -> TrainConfig:
    """The function reads the command line.

    The defaults are those of `--option`, or with `--resume` and `--replay` those the run was
    started with, so that `--resume --run-dir runs/a` alone continues a run and any other flag
    changes it.

    Raises:
        UserError: values that make no sense, alone or together.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    args = gather_data(args)
    default = for_option(
        flag_value(args, "--option") or TrainConfig.option,
        flag_value(args, "--recipe") or TrainConfig.recipe,
    )
    run_dir, replay = flag_value(args, "--run-dir"), flag_value(args, "--replay")
    folder = Path(run_dir) if run_dir else default.folder
    args, saved = resume_after_restart(args, folder), folder / CONFIG_FILE
    if replay:
        if not Path(replay).is_file():
            raise UserError(f"--replay {replay}: no such file; RUN/bad_steps/ has those of a run")
        # RUN/bad_steps/FILE
        saved = Path(replay).parent.parent / CONFIG_FILE
        default = replace(TrainConfig.read(saved), run_dir=saved.parent)
    elif "--resume" in args and saved.is_file():
        default = replace(
            TrainConfig.read(saved), resume=True, stop_after=None, allow_data_change=False, sft=None
        )
    find_option(default.option)
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        default=default,
        args=args,
        prog="python -m hamner.train",
        config=(tyro.conf.HelptextFromCommentsOff,),
    )
    if config.recipe != default.recipe:
        raise UserError(
            f"--recipe {config.recipe} is not the {default.recipe} that the run was started with; "
            "leave it out and give the flags that are to change"
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
    if result.diagnosis:
        return EXIT_BAD_STEPS
    return EXIT_INTERRUPTED if result.interrupted else 0


if __name__ == "__main__":
    run_command(main)
