"""The ladder's ratios of tokens become what `hamner.plan` says of recipes."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from bench.recipe_report import ends_by_seed
from bench.recipe_statistics import tokens_at
from hamner.config.recipe import Recipe
from hamner.errors import UserError

ONE_SEED, SEVERAL_SEEDS = 0.2, 0.05
"""standard deviation of a ratio's logarithm: of one seed, and at the smallest of several, which
share data and code"""

Point = tuple[float, float, float]
"""tokens of the recipe, ratio, standard deviation of its logarithm"""


def ratios_of(results: Sequence[Mapping]) -> dict[Recipe, list[Point]]:
    """The function gives the ratios of `plan`'s tokens by those of each other recipe, wherever one
    reaches the other's loss between two lengths that it was run at; the mean over seeds."""
    ladder = [result for result in results if result["part"] == "ladder"]
    plan = ends_by_seed(ladder, "plan")
    return {recipe: _points(plan, ends_by_seed(ladder, recipe)) for recipe in ("adamw", "muon")}


def _points(plan: Mapping, other: Mapping) -> list[Point]:
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for seed in plan.keys() & other.keys():
        for tokens, loss in plan[seed].items():
            crossing = tokens_at(loss, other[seed])
            if crossing and crossing.is_inside:
                found["plan", tokens].append((crossing.tokens, tokens / crossing.tokens))
        for tokens, loss in other[seed].items():
            crossing = tokens_at(loss, plan[seed])
            if crossing and crossing.is_inside:
                found["other", tokens].append((tokens, crossing.tokens / tokens))
    points = []
    for pairs in found.values():
        tokens, ratios = zip(*pairs, strict=True)
        deviation = ONE_SEED
        if len(ratios) > 1:
            spread = statistics.stdev(map(math.log, ratios)) / math.sqrt(len(ratios))
            deviation = max(SEVERAL_SEEDS, spread)
        means = statistics.geometric_mean(tokens), statistics.geometric_mean(ratios)
        points.append((float(f"{means[0]:.4g}"), round(means[1], 3), round(deviation, 3)))
    return sorted(points)


def fit(results: Sequence[Mapping]) -> str:
    """The function gives the content of hamner/plan/recipe_ratios.json.

    Raises:
        UserError: the ladder has no ratio of some recipe yet.
    """
    ratios = ratios_of(results)
    missing = [recipe for recipe, points in ratios.items() if not points]
    if missing:
        raise UserError(
            f"the ladder has no two lengths between which {missing[0]} and plan reach one "
            "loss: run more of python -m bench.recipes ladder"
        )
    ladder = [result for result in results if result["part"] == "ladder"]
    tokens = sorted({result["tokens"] / 1e6 for result in ladder})
    seeds = len({result["seed"] for result in ladder})
    source = (
        f"{len(ladder)} runs of option current, {tokens[0]:g}M to {tokens[-1]:g}M tokens of "
        f"English, {seeds} seed{'s' if seeds > 1 else ''} (docs/recipes.md)"
    )
    return json.dumps({"source": source, "ratios": ratios}, indent=1) + "\n"
