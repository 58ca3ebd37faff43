"""Recipes are compared fairly: every arm gets the same search, data, seeds and share of warm-up.

    python -m bench.recipes tune    --output FOLDER --data english/train-*.parquet
                                    --validation english/valid.parquet --seconds 550
    python -m bench.recipes current ...     the learning rate again, on option `current`
    python -m bench.recipes ladder  ...     plan, adamw and muon at 25M, 50M, 100M tokens, 3 seeds
    python -m bench.recipes long    ...     option a, plan and muon
    python -m bench.recipes report  FOLDER  tables, statistics and pictures
    python -m bench.recipes fit     FOLDER  the ladder's ratios, for hamner.plan

A command runs what is not done yet of its part, and leaves before --seconds are over; called again,
it goes on, with a run that it left from its checkpoint. Done is what stands in FOLDER/results.jsonl
or in the committed results (--known). Flags that are not its own go to `hamner.train`.

    FOLDER/results.jsonl    one object a finished run; goes to profiles/recipes/PART.jsonl
    FOLDER/shards-*/        the data, tokenized once
    FOLDER/runs/            runs under way; those of `long` stay, for `hamner.sft`

`tune` searches by coordinates, on a model of 12 layers x 512: from the recipe's values, the
neighbours of the best so far, first in the learning rate, then in the embedding's share of it,
weight decay and beta2, until the best is better than both neighbours in each. The arm that is done
first goes on with random points around its best until both have had as many trials.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import tyro

from bench import recipe_runs as runs
from bench.recipe_trials import ARMS, LADDER_SEEDS, TOKENS, Part, Scope, Trial, plan
from hamner.checkpoint.run_folder import append_record
from hamner.cli import PATHS, run_command
from hamner.config.recipe import Recipe
from hamner.errors import UserError
from hamner.files import parse_json, write_whole
from hamner.plan.recipe_gain import RATIOS

COMMAND = "python -m bench.recipes"
RESULTS = "results.jsonl"
COMMITTED = Path(__file__).parents[1] / "profiles" / "recipes"
RESERVE_SECONDS = {"tune": 10.0, "current": 20.0, "ladder": 20.0, "long": 40.0}
"""before the end, in which a run is evaluated and saved"""
START_SECONDS = 15.0
"""a run is not started for less"""


@dataclass(frozen=True)
class Compare:
    """Run what is not done yet of one part of the comparison."""

    data: tuple[str, ...]
    """what to train on, as for hamner.train; tokenized once"""
    validation: Path
    """file of the documents that every run is evaluated on; none of them may be in --data"""
    output: Path = Path("runs/recipes")
    """folder of results, shards and runs"""
    known: Path = COMMITTED
    """folder of *.jsonl with results that are there already"""
    seconds: float = 3600.0
    """after which the command has left"""
    arms: tuple[Recipe, ...] = ()
    """recipes to run; default those that the part compares"""
    tokens: tuple[float, ...] = ()
    """lengths of the runs; default those of the part"""
    seeds: tuple[int, ...] = LADDER_SEEDS
    """of the ladder; the long pair has the first"""


@dataclass(frozen=True)
class Read:
    """`report` prints tables and statistics of results and draws their pictures beside them; `fit`
    writes what hamner.plan says of recipes from the ladder's."""

    folder: Annotated[Path, tyro.conf.Positional] = COMMITTED
    """of *.jsonl"""


def read_results(*folders: Path) -> list[dict]:
    """The function gives the results in the *.jsonl of some folders, each run once.

    Raises:
        UserError: a line is none.
    """
    results: dict[tuple, dict] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                result = parse_json(line)
                results.setdefault(Trial.of(result).key, result)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}, line {number} is not a result ({error!r}): take it out"
                ) from error
    return list(results.values())


def require_same_data(results: Sequence[dict], part: Part, data: runs.Prepared) -> None:
    """The function refuses to compare runs on other data with those that are there.

    Raises:
        UserError: it names the numbers.
    """
    for result in results:
        if result["part"] == part and result["data"]["digest"] != data.digest:
            raise UserError(
                f"--data, --validation: results of `{part}` that are there were measured on other "
                f"documents ({result['data']['train_tokens']:,} tokens, these are "
                f"{data.train_tokens:,}): give those, or another --output and --known"
            )


def compare(part: Part, settings: Compare, extra: Sequence[str]) -> int:
    """The function runs trials until the part is done or the time is up; it returns the exit
    code.

    Raises:
        UserError: flags or data do not allow it.
    """
    end = time.monotonic() + settings.seconds - RESERVE_SECONDS[part]
    scope = Scope(
        part=part,
        arms=settings.arms or ARMS[part],
        tokens=tuple(sorted(int(tokens) for tokens in settings.tokens or TOKENS[part])),
        seeds=settings.seeds if part == "ladder" else settings.seeds[:1],
        extra=tuple(extra),
    )
    results = read_results(settings.known, settings.output)
    todo = plan(scope, results)
    if todo:
        config = runs.configure(todo[0], settings.output)
        data = runs.prepare_data(settings.data, settings.validation, config, settings.output)
        require_same_data(results, part, data)
        longest = max(scope.tokens)
        if part != "long" and longest > data.train_tokens:
            raise UserError(
                f"--data has {data.train_tokens:,} tokens, a run of {longest:,} would read some "
                "twice: give more, or smaller --tokens"
            )
        todo = work_through(
            partial(plan, scope), results, data, settings.output, end=end, stays=_is_long
        )
    print(f"{part}: " + (f"{len(todo)} or more runs are left" if todo else "done"), flush=True)
    return 0


def _is_long(trial: Trial) -> bool:
    return trial.part == "long"


def work_through(
    plan: Callable[[list[dict]], list[Trial]],
    results: list[dict],
    data: runs.Prepared,
    output: Path,
    *,
    end: float,
    stays: Callable[[Trial], bool],
    name_of: Callable[[Trial], str] = attrgetter("name"),
) -> list[Trial]:
    """The function runs what `plan` says, until nothing is left or the time is up.

    Args:
        plan: gives the trials that are left, from the results so far; asked again after each.
        results: so far; each new one joins them, and results.jsonl.
        data: of all trials.
        output: folder of results and runs.
        end: `time.monotonic()` at which it has come back.
        stays: whether a trial's run is kept once it is done.
        name_of: gives the name of a trial's run, unlike those of all others.

    Returns:
        The trials that are left.
    """
    todo = plan(results)
    while todo and time.monotonic() < end - START_SECONDS:
        name = name_of(todo[0])
        folder = output / "runs" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        result = runs.run(todo[0], data, folder, end)
        if result is None:
            break
        append_record(output / RESULTS, result)
        print(f"{name}: {end_of(result)}", flush=True)
        if not stays(todo[0]):
            shutil.rmtree(folder)
        results.append(result)
        todo = plan(results)
    return todo


def end_of(result: dict) -> str:
    """The function says in a few words how a run ended."""
    end = "diverged" if result["diverged"] else f"{result['val_loss']:.4f} nats a token"
    speed = f"{result['tokens_per_second']:,} tokens/s" if result["tokens_per_second"] else "?"
    return f"{end}, {speed}, {result['seconds']} s"


def read(name: str, args: Sequence[str]) -> int:
    """The function does what is done with results that are there; it returns the exit code."""
    # Here, because they need scipy and matplotlib, which a machine that trains may not have.
    from bench.recipe_fit import fit
    from bench.recipe_report import report

    folder = tyro.cli(Read, args=args, registry=PATHS, prog=f"{COMMAND} {name}").folder
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder} has no *.jsonl with results")
    if name == "report":
        print(report(results, folder))
    else:
        write_whole(RATIOS, fit(results))
        print(f"written: {RATIOS}")
    return 0


def main(args: Sequence[str]) -> int:
    """The command runs a part, reports or fits."""
    name, rest = (args[0], args[1:]) if args else ("--help", ())
    if name in ("report", "fit"):
        return read(name, rest)
    if name not in ARMS:
        print(__doc__)
        if name in ("-h", "--help"):
            return 0
        raise UserError(f"{name} is not one of {', '.join(ARMS)}, report, fit")
    how = {"return_unknown_args": True, "registry": PATHS, "prog": f"{COMMAND} {name}"}
    settings, extra = tyro.cli(Compare, args=rest, **how)
    return compare(name, settings, extra)


if __name__ == "__main__":
    run_command(main)
