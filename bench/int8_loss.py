"""What int8 costs in loss: the same runs in bf16, int8 and int8-all, on the same batches.

    python -m bench.int8_loss run --output FOLDER --data english/train-*.parquet
                                  --validation english/valid.parquet --seconds 550
    python -m bench.int8_loss run --output FOLDER --option a --tokens 250e6 --seeds 0 ...
    python -m bench.int8_loss report FOLDER

`run` trains what is not done yet and leaves before --seconds are over; called again, it goes on,
with a run that it left from its checkpoint. Runs of one seed have the same weights and batches,
whatever their arithmetic. Flags that are not its own go to `hamner.train`.

What `bench.recipes long` has trained in bf16 need not be trained again: with --known, the folder of
its results, their run is bf16's arm, and the others have its hyper-parameters.

    python -m bench.int8_loss run --output FOLDER --option a --tokens 250e6 --seeds 0 --recipe plan
                                  --known profiles/recipes ...

    FOLDER/results.jsonl    one object a finished run
    FOLDER/shards-*/        the data, tokenized once
    FOLDER/runs/            runs under way; the first one stays, for bench.int8_gradients

`report` gives the paired differences to bf16's: of the validation loss at the end, with a 95%
interval over the seeds (Student's t), beside the spread of bf16's seeds; and the slope over tokens
of the difference in training loss over the last two thirds of the runs, with one seed's interval
from the means of its parts. Operands that lose too much by quantisation go back to bf16 on the way,
so it says what share of the int8 products was left. What the gap costs in tokens, at the tokens
that the option is planned for, is by the scaling law of hamner.plan; with --speed, how many times
faster int8 is, it gives what is left of that:

    python -m bench.int8_loss report FOLDER --speed int8 1.39
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, get_args

import tyro

from bench.recipe_runs import configure, settings_of
from bench.recipe_trials import DIMENSIONS, Trial, written
from bench.recipes import RESULTS, Job, read_results, whole, work
from hamner.checkpoint.run_folder import append_record
from hamner.cli import FLAG_RULES, run_command
from hamner.config.recipe import Recipe
from hamner.config.train import Matmul, TrainConfig
from hamner.errors import UserError
from hamner.plan.words import short

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
    known: Path | None = None
    """folder of results of `bench.recipes long`: its runs of the recipe, tokens and seeds are
    bf16's, and the other arms have their hyper-parameters"""


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


def trials(
    settings: RunConfig, extra: Sequence[str], known: Mapping[int, Mapping]
) -> list[MatmulTrial]:
    """The function gives all runs, in order, but for those whose results are known, by seed."""
    return [
        trial_of(settings, extra, seed, matmul=matmul, known=known.get(seed))
        for seed in settings.seeds
        for matmul in settings.matmuls
        if matmul != "bf16" or seed not in known
    ]


def trial_of(
    settings: RunConfig, extra: Sequence[str], seed: int, *, matmul: Matmul, known: Mapping | None
) -> MatmulTrial:
    """The function gives one run: as the recipe is written, or as the known result's was."""
    model = ("--option", settings.option, "--batch-size", "24")
    values = {name: known[name] for name in DIMENSIONS} if known else written(settings.recipe)
    return MatmulTrial(
        part=PART,
        arm=settings.recipe,
        seed=seed,
        tokens=whole(settings.tokens),
        **values,
        # The user's flags first: the last of a flag counts.
        flags=(*model, *extra, "--matmul", matmul),
    )


def known_runs(settings: RunConfig, extra: Sequence[str]) -> dict[int, dict]:
    """The function gives the results in --known that are bf16's arm, by seed.

    Raises:
        UserError: there is none of a seed, or it differs from the other arms in more than their
            arithmetic.
    """
    if settings.known is None:
        return {}
    wanted = (PART, settings.recipe, whole(settings.tokens))
    found: dict[int, dict] = {}
    for result in read_results(settings.known):
        is_wanted = (result["part"], result["arm"], result["tokens"]) == wanted
        if is_wanted and "--matmul" not in result["flags"] and not result["diverged"]:
            found.setdefault(result["seed"], result)
    for seed in settings.seeds:
        name = f"{settings.recipe}, seed {seed}, {short(wanted[-1])} tokens"
        if seed not in found:
            raise UserError(
                f"--known {settings.known} has no run of bench.recipes {PART} of {name} that "
                "converged: leave --known out, and bf16 is trained too"
            )
        trial = trial_of(settings, extra, seed, matmul="bf16", known=found[seed])
        differences = differences_to(trial, found[seed], settings.output)
        if differences:
            raise UserError(
                f"--known {settings.known}: its run of {name} differs from these in more than "
                f"arithmetic: {', '.join(differences)}; leave that flag or --known out"
            )
    return {seed: found[seed] for seed in settings.seeds}


def differences_to(trial: MatmulTrial, known: Mapping, output: Path) -> list[str]:
    """The function names in what a known result's run differs from a trial, and from the data of
    the results that are in `output`."""
    there, here = (values_of(configure(run, output)) for run in (Trial.of(known), trial))
    # Defaults, which no flag says, may have been others when it was trained.
    said = settings_of(configure(trial, output))
    there |= {
        name: value
        for name, value in {**known, **known.get("recipe", {})}.items()
        if name in (*said, *said["recipe"])
    }
    found = [
        f"{name} is {there[name]} there, {value} here"
        for name, value in here.items()
        if there[name] != value
    ]
    digests = {result["data"]["digest"] for result in read_results(output)}
    return found + ["the data"] * bool(digests - {known["data"]["digest"]})


def values_of(config: TrainConfig) -> dict:
    """The function gives all values of a configuration side by side."""
    values, said = config.to_json(), settings_of(config)
    return {**values.pop("model"), **values, **said, **said["recipe"]}


def keep_known(settings: RunConfig, extra: Sequence[str], known: Mapping[int, Mapping]) -> None:
    """The known results become those of bf16's arm in the folder."""
    done = {Trial.of(result).key for result in read_results(settings.output)}
    for seed, result in known.items():
        trial = trial_of(settings, extra, seed, matmul="bf16", known=result)
        if trial.key not in done:
            append_record(settings.output / RESULTS, {**result, "flags": trial.flags})


def run(settings: RunConfig, extra: Sequence[str]) -> int:
    """The function runs trials until all are done or the time is up; it returns the exit code.

    Raises:
        UserError: flags or data do not allow it.
    """
    known = known_runs(settings, extra)
    wanted = trials(settings, extra, known)

    def left(results: Sequence[dict]) -> list[Trial]:
        done = {Trial.of(result).key for result in results}
        return [trial for trial in wanted if trial.key not in done]

    todo = work(
        settings,
        PART,
        left,
        known=(settings.known,) if known else (),
        stays=lambda trial: trial.key == wanted[0].key,
    )
    keep_known(settings, extra, known)
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
    for name, arms in groups_of(results).items():
        print(name)
        print("\n".join(f"  {line}" for line in describe(arms, settings.speed)))
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
