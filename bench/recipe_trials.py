"""What is tried of each recipe, and what comes next, follow from the results so far.

Nothing here runs or keeps anything: a part of the comparison is a function from the results that
are there to the next trial, so that it goes on wherever the results were made.
"""

import hashlib
import itertools
import math
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from hamner.config.options import for_option
from hamner.config.recipe import Recipe
from hamner.config.train import TrainConfig
from hamner.errors import UserError

Part = Literal["tune", "current", "ladder", "qk-norm", "long"]

PROXY = (
    *("--option", "a", "--hidden-size", "512", "--num-layers", "12"),
    *("--num-attention-heads", "8", "--num-kv-heads", "2", "--expert-intermediate-size", "1408"),
)
"""12 layers x 512, 59M parameters, the proportions of option a"""
CURRENT = ("--option", "current", "--batch-size", "24")
MODELS: dict[Part, tuple[str, ...]] = {
    "tune": PROXY,
    "current": CURRENT,
    "ladder": CURRENT,
    "qk-norm": (*CURRENT, "--qk-norm"),
    "long": ("--option", "a"),
}
"""flags of hamner.train; every step has 24 x 1,024 tokens"""
ARMS: dict[Part, tuple[Recipe, ...]] = {
    "tune": ("adamw", "muon"),
    "current": ("adamw", "muon"),
    "ladder": ("plan", "adamw", "muon"),
    "qk-norm": ("muon",),
    "long": ("plan", "muon"),
}
"""what each part compares by default"""
SHARING: tuple[Part, ...] = ("tune",)
"""parts of which commands may share a GPU, one an arm: nobody compares how fast their runs are"""
TUNED = ("adamw", "muon")
"""arms whose hyper-parameters are searched; the plan's are as they were written"""
TOKENS: dict[Part, tuple[float, ...]] = {
    "tune": (20e6,),
    "current": (25e6,),
    "ladder": (25e6, 50e6, 100e6),
    "qk-norm": (25e6, 50e6, 100e6),
    "long": (250e6,),
}
SHORT_SHARES = (0.25, 0.5)
"""of the ladder's shortest length, for Muon: where it reaches what the others need all of it for"""
WARMUP_SHARE = 0.05
"""of the run, for every arm; what follows decays to the run's end"""
TUNING_SEED = 100
"""of trials that choose; the ladder's seeds are others, so that no choice favours them"""
SEEDED: tuple[Part, ...] = ("ladder", "qk-norm")
"""parts that are run with every seed; the others have one"""
LADDER_SEEDS = (0, 1, 2)
LEAST_TRIALS, MOST_TRIALS = 12, 32
"""of an arm's search"""
BETTER = 0.005
"""nats by which a trial must be better than the best before it, a quarter of what a seed moves: or
a dimension that does nothing would lead a search on and on"""
BETA2_STEPS = range(-4, 9)
"""0.2 to 0.9998, so that it stays between 0 and 1"""
SEARCH_SEED = 26
"""of the trials that an arm gets beyond its search, so that all arms have the same number"""

Point = tuple[int, int, int, int]
"""steps from `START` along each of `DIMENSIONS`"""
START: Point = (0, 0, 0, 0)
DIMENSIONS = ("lr", "embedding_lr", "weight_decay", "beta2")
"""lr in factors of 2 of the recipe's, the embedding's share of it in factors of 3, weight decay in
factors of 3 of 0.1, 1 - beta2 in factors of 1/2 of 0.05"""


@dataclass(frozen=True)
class Trial:
    """A trial is one run: everything that decides how it ends, but for the data."""

    part: Part
    arm: Recipe
    seed: int
    tokens: int
    lr: float
    embedding_lr: float
    weight_decay: float
    beta2: float
    point: Point | None = None
    """in the search that it belongs to"""
    flags: tuple[str, ...] = ()
    """of hamner.train: the model, then what the command was given"""

    @property
    def key(self) -> tuple:
        """Trials that come to the same run have the same key."""
        values = asdict(self)
        del values["point"]
        return tuple(values.values())

    @property
    def name(self) -> str:
        """The name is unlike that of any other trial of a folder."""
        values = (f"{self.tokens / 1e6:g}M", f"lr{self.lr:g}", f"e{self.embedding_lr:g}")
        more = (f"wd{self.weight_decay:g}", f"b{self.beta2:g}", f"seed{self.seed}")
        if self.flags != MODELS[self.part]:
            more += (hashlib.sha256(" ".join(self.flags).encode()).hexdigest()[:6],)
        return "-".join((self.part, self.arm, *values, *more))

    @classmethod
    def of(cls, result: Mapping) -> "Trial":
        """The method gives the trial that a result is of."""
        values = {name: result[name] for name in cls.__dataclass_fields__}
        point = result["point"] and tuple(result["point"])
        return cls(**{**values, "point": point, "flags": tuple(result["flags"])})


@dataclass(frozen=True)
class Scope:
    """The scope is what one command compares."""

    part: Part
    arms: tuple[Recipe, ...]
    tokens: tuple[int, ...]
    """of the runs, ascending"""
    seeds: tuple[int, ...]
    extra: tuple[str, ...] = ()
    """flags of hamner.train for every run"""

    @property
    def flags(self) -> tuple[str, ...]:
        return (*MODELS[self.part], *self.extra)


def tuned(point: Point, arm: Recipe) -> dict[str, float]:
    """The function gives the hyper-parameters at a point of an arm's search."""
    lr, embedding, decay, beta2 = point
    rate = for_option("a", arm).lr * 2.0**lr
    values = {
        "lr": rate,
        "embedding_lr": rate * 3.0**embedding,
        "weight_decay": 0.1 * 3.0**decay,
        "beta2": 1 - 0.05 * 2.0**-beta2,
    }
    # Numbers that people can read, and that are the same in every session.
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def written(arm: Recipe) -> dict[str, float]:
    """The function gives a recipe's hyper-parameters as they stand in hamner.config.recipe."""
    config: TrainConfig = for_option("a", arm)
    return {
        "lr": config.lr,
        "embedding_lr": config.group_lrs["embedding"],
        "weight_decay": config.weight_decay,
        "beta2": config.beta2,
    }


def expected_seconds(trial: Trial, results: Sequence[Mapping]) -> float:
    """The function gives the seconds of training that a run should take, from those of the same
    model and recipe; 0 without any."""
    pace = [
        result["seconds"] / result["tokens"]
        for result in results
        if (result["arm"], tuple(result["flags"])) == (trial.arm, trial.flags)
        and not result["diverged"]
    ]
    return statistics.median(pace) * trial.tokens if pace else 0.0


def loss_of(result: Mapping) -> float:
    """The function gives a result's validation loss; infinity if it diverged."""
    return math.inf if result["diverged"] else result["val_loss"]


def best_of(results: Sequence[Mapping], part: Part, arm: Recipe) -> Mapping | None:
    """The function gives the best result of an arm's search, None without one that converged."""
    found = [r for r in results if (r["part"], r["arm"]) == (part, arm) and not r["diverged"]]
    return found[_best([loss_of(result) for result in found])] if found else None


def _best(losses: Sequence[float]) -> int:
    """The best of some losses, in the order of their trials, is the last that was better than the
    one before by more than `BETTER`; the function gives its number."""
    best = 0
    for number, loss in enumerate(losses):
        if loss < losses[best] - BETTER:
            best = number
    return best


def best_point(losses: Mapping[Point, float]) -> Point:
    """The function gives the best point of a search."""
    return list(losses)[_best(list(losses.values()))]


def neighbours(point: Point, dimensions: Sequence[str]) -> list[Point]:
    """The function gives the points one step away, the search's first dimension first."""
    found = []
    for number, name in enumerate(DIMENSIONS):
        if name in dimensions:
            for step in (1, -1):
                moved = list(point)
                moved[number] += step
                found.append(tuple(moved))
    return [point for point in found if point[-1] in BETA2_STEPS]


def open_sides(points: Collection[Point], best: Point, dimensions: Sequence[str]) -> list[Point]:
    """The function gives the neighbours of the best point on whose side of it no value of their
    dimension has been tried: without any the best is interior."""
    found = []
    for point in neighbours(best, dimensions):
        number = next(i for i, (a, b) in enumerate(zip(point, best, strict=True)) if a != b)
        step = point[number] - best[number]
        if not any((tried[number] - best[number]) * step > 0 for tried in points):
            found.append(point)
    return found


def next_point(
    losses: Mapping[Point, float], start: Point, dimensions: Sequence[str]
) -> Point | None:
    """The function goes on with a coordinate search: one dimension after the other is tried on both
    sides of the best point.

    Not each neighbour again whenever another dimension has moved: where a dimension matters less
    than rounding does, such a search wanders from point to point.

    Returns:
        The next point; None once the best is interior in every dimension.
    """
    if start not in losses:
        return start
    best = best_point(losses)
    if math.isinf(losses[best]):  # all have diverged: smaller learning rates
        return (min(point[0] for point in losses) - 1, *start[1:])
    return next(iter(open_sides(losses, best, dimensions)), None)


def finer_point(losses: Mapping[Point, float], arm: Recipe) -> Point:
    """The function goes on where the best point is interior: with its neighbours that were not
    tried, then beside it in several dimensions at once."""
    best = best_point(losses)
    for point in neighbours(best, DIMENSIONS):
        if point not in losses:
            return point
    generator = random.Random(f"{SEARCH_SEED} {arm} {len(losses)}")
    for reach in itertools.count(1):
        steps = itertools.product(range(-reach, reach + 1), repeat=len(DIMENSIONS))
        box = [tuple(a + b for a, b in zip(best, step, strict=True)) for step in steps]
        fresh = [point for point in box if point not in losses and point[-1] in BETA2_STEPS]
        if fresh:
            return generator.choice(fresh)
    raise AssertionError("there is always a larger box")


def plan(scope: Scope, results: Sequence[Mapping]) -> list[Trial]:
    """The function gives the trials that can be run now; others may follow from their results.

    Raises:
        UserError: an earlier part, whose results this one needs, is not there.
    """
    done = {Trial.of(result).key for result in results}
    trials = (_searched if scope.part in ("tune", "current") else _listed)(scope, results)
    return [trial for trial in trials if trial.key not in done]


def _listed(scope: Scope, results: Sequence[Mapping]) -> list[Trial]:
    """The function gives the runs of a part that is no search, short ones first."""
    trials = []
    lengths = dict.fromkeys(scope.arms, scope.tokens)
    if scope.part == "ladder" and "muon" in lengths:
        short = (int(share * min(scope.tokens)) for share in SHORT_SHARES)
        lengths["muon"] = (*short, *scope.tokens)
    for tokens in sorted({length for own in lengths.values() for length in own}):
        for seed, arm in itertools.product(scope.seeds, scope.arms):
            if tokens in lengths[arm]:
                values = _chosen(results, arm, "current")
                trials.append(
                    Trial(scope.part, arm, seed=seed, tokens=tokens, flags=scope.flags, **values)
                )
    return trials


def _chosen(results: Sequence[Mapping], arm: Recipe, part: Part) -> dict[str, float]:
    """The function gives an arm's hyper-parameters as a search has chosen them.

    Raises:
        UserError: the search has no result.
    """
    if arm not in TUNED:
        return written(arm)
    best = best_of(results, part, arm)
    if best is None:
        raise UserError(
            f"there is no result of {arm} in the part `{part}`, which chooses its learning rate: "
            f"run python -m bench.recipes {part} first, or name its results with --known"
        )
    return {name: best[name] for name in DIMENSIONS}


def _searched(scope: Scope, results: Sequence[Mapping]) -> list[Trial]:
    """The function gives the next trial of every arm's search."""
    losses = {
        arm: {
            tuple(r["point"]): loss_of(r)
            for r in results
            if (r["part"], r["arm"]) == (scope.part, arm) and r["point"] is not None
        }
        for arm in TUNED
    }
    wanted = max(LEAST_TRIALS if scope.part == "tune" else 0, *map(len, losses.values()))
    trials = []
    for arm in scope.arms:
        own = Trial(
            part=scope.part,
            arm=arm,
            seed=TUNING_SEED,
            tokens=scope.tokens[0],
            flags=scope.flags,
            **written(arm),
        )
        if arm not in TUNED:
            trials.append(own)
            continue
        point = _next_of_arm(scope.part, arm, losses[arm], results=results, wanted=wanted)
        if point is not None:
            trials.append(replace(own, point=point, **tuned(point, arm)))
    return sorted(trials, key=lambda trial: len(losses.get(trial.arm, ())))


def _next_of_arm(
    part: Part,
    arm: Recipe,
    losses: Mapping[Point, float],
    *,
    results: Sequence[Mapping],
    wanted: int,
) -> Point | None:
    """The function gives the next point of an arm's search, None at its end."""
    if len(losses) >= MOST_TRIALS:
        return None
    if part == "current":
        _chosen(results, arm, "tune")
        start = tuple(best_of(results, "tune", arm)["point"])
        return next_point(losses, start, DIMENSIONS[:1])
    point = next_point(losses, START, DIMENSIONS)
    if point is None and len(losses) < wanted:
        return finer_point(losses, arm)
    return point
