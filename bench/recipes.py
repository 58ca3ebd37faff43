"""Recipes are compared fairly: every arm gets the same search, data, seeds and share of warm-up.

    python -m bench.recipes tune    --output FOLDER --data english/train-*.parquet
                                    --validation english/valid.parquet --seconds 550
    python -m bench.recipes current ...     the learning rate again, on option `current`
    python -m bench.recipes ladder  ...     plan, adamw and muon at 25M, 50M, 100M tokens, 3 seeds
    python -m bench.recipes qk-norm ...     the ladder's muon with --qk-norm
    python -m bench.recipes long    ...     option a, plan and muon
    python -m bench.recipes chat    --output FOLDER --data 'sft/*.jsonl'
                                            the better of `long`, fine-tuned, talks beside its base
    python -m bench.recipes report  FOLDER  tables, statistics and pictures
    python -m bench.recipes fit     FOLDER  the ladder's ratios, for hamner.plan

A command runs what is not done yet of its part, and leaves before --seconds are over; called again,
it goes on, with a run that it left from its checkpoint. It begins none that will not be done by
then, but for its first. Done is what stands in FOLDER/results.jsonl or in the committed results
(--known). Flags that are not its own go to `hamner.train`, but for what each run has its own of,
such as --lr and --warmup-steps.

    FOLDER/results.jsonl    one object a finished run; goes to profiles/recipes/PART.jsonl
    FOLDER/shards-*/        the data, tokenized once
    FOLDER/runs/            runs under way; those of `long` stay, for `chat`
    FOLDER/chat.md          fine-tuning runs with their losses, and conversations

`tune` searches by coordinates, on a model of 12 layers x 512: from one learning rate for all
parameters, weight decay 0.1 and beta2 0.95, both sides of the best so far, first of the learning
rate, then of the embedding's share of it, of weight decay and beta2, until larger and smaller ones
than the best's have been tried of each. Then neighbours of the best, then random points beside it,
until both arms have had as many trials. Two commands with one FOLDER, `--arms adamw` and
`--arms muon`, search at once: the one starts a run while the other trains. All other parts measure
speeds too and refuse company.
"""

import contextlib
import fcntl
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from bench import recipe_runs as runs
from bench.recipe_trials import (
    ARMS,
    LADDER_SEEDS,
    SEEDED,
    SHARING,
    TOKENS,
    Part,
    Scope,
    Trial,
    expected_seconds,
    loss_of,
    plan,
)
from hamner.checkpoint.run_folder import append_record
from hamner.cli import FLAG_RULES, run_command
from hamner.config.recipe import Recipe
from hamner.errors import UserError
from hamner.files import parse_json, write_whole
from hamner.plan.recipe_gain import RATIOS

COMMAND = "python -m bench.recipes"
RESULTS = "results.jsonl"
COMMITTED = Path(__file__).parents[1] / "profiles" / "recipes"
NUMBER = (int, float)
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("tokens", "batch_size", "seq_len", "parameters"), int),
    **dict.fromkeys(("val_loss", "bits_per_byte", "tokens_per_second", "seconds"), NUMBER),
    "diverged": bool,
    "curve": list,
    "data": dict,
    "conditions": dict,
}
"""of what a report reads of a result; what could not be measured is null"""
RESERVE_SECONDS = {"tune": 10.0, "current": 20.0, "ladder": 20.0, "qk-norm": 20.0, "long": 40.0}
"""before the end, in which a run is evaluated and saved"""
START_SECONDS = 10.0
"""before a run trains; none is started for less"""


@dataclass(frozen=True)
class Job:
    """A command trains in a folder what is not done yet, up to a time."""

    data: tuple[str, ...]
    """what to train on, as for hamner.train; tokenized once"""
    validation: Path
    """file of the documents that every run is evaluated on; none of them may be in --data"""
    output: Path
    """folder of results, shards and runs"""
    seconds: float = 3600.0
    """after which the command has left"""


@dataclass(frozen=True)
class Compare(Job):
    """Run what is not done yet of one part of the comparison."""

    output: Path = Path("runs/recipes")
    known: Path = COMMITTED
    """folder of *.jsonl with results that are there already"""
    arms: tuple[Recipe, ...] = ()
    """recipes to run; default those that the part compares"""
    tokens: tuple[float, ...] = ()
    """lengths of the runs; default those of the part. The ladder runs Muon at a quarter and half of
    the shortest too, where it reaches what the others need all of it for"""
    seeds: tuple[int, ...] = LADDER_SEEDS
    """of the ladder and of qk-norm; the long pair has the first"""


@dataclass(frozen=True)
class Read:
    """`report` prints tables and statistics of results and draws their pictures beside them; `fit`
    writes what hamner.plan says of recipes from the ladder's."""

    folder: Annotated[Path, tyro.conf.Positional] = COMMITTED
    """of *.jsonl"""


def read_results(*folders: Path) -> list[dict]:
    """The function gives the results in the *.jsonl of some folders, each run once, in the order of
    the folders and of the lines, in which searches have found them.

    Raises:
        UserError: a line is none.
    """
    results: dict[tuple, dict] = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.jsonl"))):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                result = parse_json(line)
                key = Trial.of(result).key
                require_whole(result)
                results.setdefault(key, result)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}, line {number} is not a result ({error!r}): take it out"
                ) from error
    return list(results.values())


def require_whole(result: dict) -> None:
    """The function refuses a result of which something is missing or of another kind.

    Raises:
        KeyError, TypeError, ValueError: naming it.
    """
    if result["part"] not in ARMS:
        raise ValueError(f"no part {result['part']}")
    for name, kind in KINDS.items():
        if not (isinstance(result[name], kind) or (kind == NUMBER and result[name] is None)):
            raise TypeError(f"{name} is {result[name]!r}")
    if (result["val_loss"] is None) != result["diverged"]:
        raise ValueError(f"diverged is {result['diverged']}, val_loss {result['val_loss']}")


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
    scope = Scope(
        part=part,
        arms=tuple(dict.fromkeys(settings.arms or ARMS[part])),
        tokens=tuple(sorted(map(whole, settings.tokens or TOKENS[part]))),
        seeds=settings.seeds if part in SEEDED else settings.seeds[:1],
        extra=tuple(extra),
    )
    with contextlib.ExitStack() as stack:
        # Where commands share a folder, a second of one arm would go on with the first one's run.
        for arm in scope.arms if part in SHARING else ():
            stack.enter_context(locked(settings.output / f"{arm}.lock", is_shared=False))
        todo = work(
            settings,
            part,
            partial(plan, scope),
            known=(settings.known,),
            stays=lambda trial: trial.part == "long",
        )
    print(f"{part}: " + (f"{len(todo)} or more runs are left" if todo else "done"), flush=True)
    return 0


def whole(tokens: float) -> int:
    """The function gives a run's tokens as a whole number.

    Raises:
        UserError: there is none.
    """
    if not 1 <= tokens < math.inf:
        raise UserError(f"--tokens {tokens:g} must be a number of 1 or more")
    return int(tokens)


@contextlib.contextmanager
def locked(path: Path, *, is_shared: bool) -> Iterator[None]:
    """The context has a file's lock, with others that share it or by itself; the file's folder is
    made.

    Raises:
        UserError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output {path.parent} is in use by another command: wait for its end, as speeds "
                "are measured one run at a time (commands of `tune` may share it, each with --arms "
                "of its own)"
            ) from None
        yield


def work(
    job: Job,
    part: Part,
    plan: Callable[[list[dict]], list[Trial]],
    *,
    known: Sequence[Path] = (),
    stays: Callable[[Trial], bool],
) -> list[Trial]:
    """The function locks a job's folder, prepares its data and runs what `plan` says.

    Args:
        job: where, on what and how long.
        part: of all trials.
        plan: gives the trials that are left, from the results so far; asked again after each.
        known: folders of results beside the job's own.
        stays: whether a trial's run is kept once it is done.

    Returns:
        The trials that are left.

    Raises:
        UserError: flags or data do not allow it.
    """
    end = time.monotonic() + job.seconds - RESERVE_SECONDS[part]
    with locked(job.output / "lock", is_shared=part in SHARING):
        read = partial(read_results, *known, job.output)
        results = read()
        todo = plan(results)
        if not todo:
            return []
        config = runs.configure(todo[0], job.output)
        with (job.output / "data.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the second waits for the first one's shards
            data = runs.prepare_data(job.data, job.validation, config, job.output)
        require_same_data(results, part, data)
        longest = max(trial.tokens for trial in todo)
        if part != "long" and longest > data.train_tokens:
            raise UserError(
                f"--data has {data.train_tokens:,} tokens, a run of {longest:,} would read some "
                "twice: give more, or smaller --tokens"
            )
        return work_through(plan, read, data, job.output, end=end, stays=stays)


def work_through(
    plan: Callable[[list[dict]], list[Trial]],
    read: Callable[[], list[dict]],
    data: runs.Prepared,
    output: Path,
    *,
    end: float,
    stays: Callable[[Trial], bool],
) -> list[Trial]:
    """The function runs what `plan` says, until nothing is left or the time is up.

    Args:
        plan: gives the trials that are left, from the results so far; asked again after each.
        read: gives the results so far, those of a command beside this one too.
        data: of all trials.
        output: folder of results and runs.
        end: `time.monotonic()` at which it has come back.
        stays: whether a trial's run is kept once it is done.

    Returns:
        The trials that are left.
    """
    results, is_first = read(), True
    todo = plan(results)
    while trial := choose(todo, results, output, end=end, is_first=is_first):
        folder = folder_of(trial, output)
        folder.parent.mkdir(parents=True, exist_ok=True)
        result = runs.run(trial, data, folder, end)
        if result is None:
            break
        append_record(output / RESULTS, result)
        print(f"{trial.name}: {end_of(result)}", flush=True)
        if not stays(trial):
            shutil.rmtree(folder)
        results = read()
        todo, is_first = plan(results), False
    return todo


def folder_of(trial: Trial, output: Path) -> Path:
    """The function gives the folder of a trial's run."""
    return output / "runs" / trial.name


def choose(
    todo: Sequence[Trial],
    results: Sequence[dict],
    output: Path,
    *,
    end: float,
    is_first: bool,
) -> Trial | None:
    """The function picks the run to go on with: one that was left, else one that will be done by
    `end`. The first of a command runs in any case, so that several short commands get it done too.
    """
    left = end - START_SECONDS - time.monotonic()
    if left <= 0:
        return None
    begun = (trial for trial in todo if folder_of(trial, output).exists())
    fitting = (trial for trial in todo if expected_seconds(trial, results) <= left)
    return next(begun, None) or next(fitting, None) or (todo[0] if todo and is_first else None)


def end_of(result: dict) -> str:
    """The function says in a few words how a run ended."""
    end = "diverged" if result["diverged"] else f"{result['val_loss']:.4f} nats a token"
    speed = f"{result['tokens_per_second']:,} tokens/s" if result["tokens_per_second"] else "?"
    return f"{end}, {speed}, {result['seconds']} s"


def chat(args: Sequence[str]) -> int:
    """The function fine-tunes the better model of the long pair; it returns the exit code.

    Raises:
        UserError: there is none, or flags or data do not allow it.
    """
    # Here, because other parts need nothing of fine-tuning and chat.
    from bench.recipe_chat import Talk, talk

    how = {"return_unknown_args": True, "registry": FLAG_RULES, "prog": f"{COMMAND} chat"}
    settings, extra = tyro.cli(Talk, args=args, **how)
    found = [
        (loss_of(result), folder)
        for result in read_results(settings.output)
        if result["part"] == "long" and not result["diverged"]
        if (folder := folder_of(Trial.of(result), settings.output)).exists()
    ]
    if not found:
        raise UserError(
            f"--output {settings.output} has no model of `long`: train one there first, with "
            f"{COMMAND} long --output {settings.output}"
        )
    with locked(settings.output / "lock", is_shared=False):
        print(talk(min(found)[1], settings, extra))
    return 0


def read(name: str, args: Sequence[str]) -> int:
    """The function does what is done with results that are there; it returns the exit code."""
    # Here, because they need scipy and matplotlib, which a machine that trains may not have.
    from bench.recipe_fit import fit
    from bench.recipe_report import report

    folder = tyro.cli(Read, args=args, registry=FLAG_RULES, prog=f"{COMMAND} {name}").folder
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
    if name == "chat":
        return chat(rest)
    if name not in ARMS:
        print(__doc__)
        if name in ("-h", "--help"):
            return 0
        raise UserError(f"{name} is not one of {', '.join(ARMS)}, chat, report, fit")
    how = {"return_unknown_args": True, "registry": FLAG_RULES, "prog": f"{COMMAND} {name}"}
    settings, extra = tyro.cli(Compare, args=rest, **how)
    return compare(name, settings, extra)


if __name__ == "__main__":
    run_command(main)
