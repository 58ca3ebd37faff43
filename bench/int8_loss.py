"""What int8 costs in loss: the same runs in bf16, int8 and int8-all, on the same batches.

    python -m bench.int8_loss run --output FOLDER --data english/train-*.parquet
                                  --validation english/valid.parquet --seconds 550
    python -m bench.int8_loss run --output FOLDER --option a --tokens 250e6 --seeds 0 ...
    python -m bench.int8_loss report FOLDER

`run` trains what is not done yet and leaves before --seconds are over; called again, it goes on,
with a run that it left from its checkpoint. Runs of one seed have the same weights and batches,
whatever their arithmetic. Flags that are not its own go to `hamner.train`.

    FOLDER/results.jsonl    one object a finished run
    FOLDER/shards-*/        the data, tokenized once
    FOLDER/runs/            runs under way; bf16's of the first seed stays, for bench.int8_gradients

`report` gives the paired differences to bf16's: of the validation loss at the end, with a 95%
interval over the seeds (Student's t), beside the spread of bf16's seeds; and the slope over tokens
of the difference in training loss over the last two thirds of the runs, with one seed's interval
from the means of its parts. What the gap costs in tokens, at the tokens that the option is planned
for, is by the scaling law of hamner.plan; with --speed, how many times faster int8 is, it gives
what is left of that:

    python -m bench.int8_loss report FOLDER --speed int8 1.42
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

import tyro

from bench.recipe_trials import Trial, written
from bench.recipes import Job, read_results, whole, work
from hamner.cli import FLAG_RULES, run_command
from hamner.config.recipe import Recipe
from hamner.config.train import Matmul
from hamner.errors import UserError

COMMAND = "python -m bench.int8_loss"
PART = "long"
"""of `Trial`: evaluated twenty times in a run"""
MATMULS: tuple[Matmul, ...] = get_args(Matmul)


@dataclass(frozen=True)
class RunConfig(Job):
    """Run what is not done yet of the arms."""

    output: Path = Path("runs/int8")
    option: str = "current"
    """model; every step has 24 sequences"""
    recipe: Recipe = "muon"
    """as it is written"""
    tokens: float = 50e6
    """of a run; 2,034 steps of 24 x 1,024"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """one after the other, each with all arms"""
    matmuls: tuple[Matmul, ...] = MATMULS
    """arms"""


@dataclass(frozen=True)
class ReportConfig:
    """Print the paired differences."""

    folder: Annotated[Path, tyro.conf.Positional]
    """of results.jsonl"""
    speed: dict[str, float] = field(default_factory=dict)
    """int8 1.42 int8-all 1.7: times bf16's tokens/s on a card, as hamner.plan --matmul projects it;
    default: as the runs were"""


class MatmulTrial(Trial):
    """The trial is a run by one arithmetic, the last of its flags."""

    @property
    def matmul(self) -> str:
        return self.flags[-1]

    @property
    def name(self) -> str:
        option = self.flags[self.flags.index("--option") + 1]
        return f"{option}-{super().name}-{self.matmul}"


def trials(settings: RunConfig, extra: Sequence[str]) -> list[MatmulTrial]:
    """The function gives all runs, in order."""
    model = ("--option", settings.option, "--batch-size", "24")
    return [
        MatmulTrial(
            part=PART,
            arm=settings.recipe,
            seed=seed,
            tokens=whole(settings.tokens),
            **written(settings.recipe),
            # The user's flags first: the last of a flag counts.
            flags=(*model, *extra, "--matmul", matmul),
        )
        for seed in settings.seeds
        for matmul in settings.matmuls
    ]


def run(settings: RunConfig, extra: Sequence[str]) -> int:
    """The function runs trials until all are done or the time is up; it returns the exit code.

    Raises:
        UserError: flags or data do not allow it.
    """
    wanted = trials(settings, extra)

    def left(results: Sequence[dict]) -> list[Trial]:
        done = {Trial.of(result).key for result in results}
        return [trial for trial in wanted if trial.key not in done]

    todo = work(
        settings,
        PART,
        left,
        stays=lambda trial: trial.matmul == "bf16" and trial.seed == settings.seeds[0],
    )
    print(f"{len(todo)} runs are left" if todo else "done", flush=True)
    return 0


def report(settings: ReportConfig) -> int:
    """The function prints all groups of results; it returns the exit code.

    Raises:
        UserError: there is none, or some are not of `run`, or a speed is no number of times.
    """
    # Here, because it needs scipy, which a machine that trains may not have.
    from bench.int8_loss_report import describe, groups_of

    for matmul, speed in settings.speed.items():
        if matmul not in MATMULS[1:] or not 0 < speed < math.inf:
            raise UserError(
                f"--speed {matmul} {speed:g}: give one of {', '.join(MATMULS[1:])}, and a number "
                "above 0"
            )
    results = read_results(settings.folder)
    if not results:
        raise UserError(f"{settings.folder} has no *.jsonl with results")
    if any(result["flags"][-2:-1] != ["--matmul"] for result in results):
        raise UserError(
            f"{settings.folder} has runs of bench.recipes, which end in no --matmul: name the "
            f"--output of {COMMAND} run, or read it with python -m bench.recipes report "
            f"{settings.folder}"
        )
    for (option, name), arms in groups_of(results).items():
        print(name)
        print("\n".join(f"  {line}" for line in describe(arms, option, settings.speed)))
    return 0


def main(args: Sequence[str]) -> int:
    """The command runs arms or reports on them."""
    name, rest = (args[0], args[1:]) if args else ("--help", ())
    how = {"registry": FLAG_RULES, "prog": f"{COMMAND} {name}"}
    if name == "report":
        return report(tyro.cli(ReportConfig, args=rest, **how))
    if name == "run":
        settings, extra = tyro.cli(RunConfig, args=rest, return_unknown_args=True, **how)
        return run(settings, extra)
    print(__doc__)
    if name in ("-h", "--help"):
        return 0
    raise UserError(f"{name} is not one of run, report")


if __name__ == "__main__":
    run_command(main)
