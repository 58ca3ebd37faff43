"""`python -m hamner.train` pre-trains an option from scratch, resumes a run, replays a bad step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import tyro

from hamner.cli import flag_value, gather_data, run_command
from hamner.config.options import find_option, for_option
from hamner.config.train import CONFIG_FILE, TrainConfig, run_of
from hamner.errors import EXIT_BAD_STEPS, EXIT_INTERRUPTED, UserError
from hamner.parallel.ranks import resume_after_restart


def parse(args: Sequence[str]) -> TrainConfig:
    """The function reads the command line.

    The defaults are those of `--option`, or with `--resume` and `--replay` those the run was
    started with, so that `--resume --run-dir runs/a` alone continues a run and any other flag
    changes it. With `--init-from` model and tokenizer are those of the run that it names.

    Raises:
        UserError: values that make no sense, alone or together.
        SystemExit: code 2 on unknown flags, 0 after --help.
    """
    args = gather_data(args)
    option, init_from = flag_value(args, "--option"), flag_value(args, "--init-from")
    default = for_option(option or TrainConfig.option)
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
    elif init_from is not None:
        default = for_initial(Path(init_from), option)
    find_option(default.option)
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[TrainConfig],
        default=default,
        args=args,
        prog="python -m hamner.train",
        config=(tyro.conf.HelptextFromCommentsOff,),
    )
    if config.resume and saved.is_file() and config.init_from != default.init_from:
        raise UserError(
            f"--init-from {config.init_from} starts a new run, and --resume goes on with one that "
            f"started from {default.init_from or 'random weights'}: leave one of the two out"
        )
    return config


def for_initial(path: Path, option: str | None) -> TrainConfig:
    """The function gives the defaults of a run from the weights of another run or checkpoint.

    Raises:
        UserError: `path` is neither.
    """
    if not (run_of(path) / CONFIG_FILE).is_file():
        raise UserError(
            f"--init-from {path} is neither a run's folder nor one of its checkpoints (step_*)"
        )
    base = TrainConfig.read(run_of(path) / CONFIG_FILE)
    default = for_option(option or base.option)
    model = default.model if option else base.model
    return replace(
        default,
        model=model,
        tokenizer=base.tokenizer,
        text_tags=base.text_tags,
        seq_len=min(default.seq_len, model.max_seq_len),
    )


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
