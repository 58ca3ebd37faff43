"""The results of `bench.recipes` as tables, statistics and pictures."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.conditions import in_words
from bench.recipe_statistics import (
    Crossing,
    Ratio,
    half_interval,
    tokens_at,
    trend,
    with_interval,
)
from bench.recipe_trials import ARMS, DIMENSIONS, TUNED, Part, best_of, loss_of, open_sides
from hamner.errors import UserError
from hamner.plot.figure import write_figure
from hamner.profile.report import table

FASTEST = "muon"
WANTED = {"plan": 3.0, "adamw": 1.6}
"""times as many tokens as Muon's, that each is to need for the same loss"""
PLANNED_TOKENS = 10e9
"""of every option's plan, for which the trend is taken further"""
COLORS = {"plan": "tab:gray", "adamw": "tab:blue", "muon": "tab:red"}

Results = Sequence[Mapping]


def report(results: Results, folder: Path) -> str:
    """The function gives the report as Markdown, and draws its pictures in `folder`.

    Raises:
        UserError: runs of one part were not of the same data, or not of one setting.
    """
    parts: dict[Part, list[Mapping]] = {part: [] for part in ARMS}
    for result in results:
        parts[result["part"]].append(result)
    for part, own in parts.items():
        sizes = {r["data"]["digest"]: r["data"]["train_tokens"] for r in own}
        if len(sizes) > 1:
            tokens = " and of ".join(f"{size:,} tokens" for size in sizes.values())
            raise UserError(f"results of `{part}` are on documents of {tokens}: take one out")
    sections = [conditions_of(results)]
    for part in ("tune", "current"):
        if parts[part]:
            sections += [f"## {part}", searched(part, parts[part])]
    if parts["ladder"]:
        sections += ["## ladder", lengths(parts["ladder"]), *equal_losses(parts["ladder"])]
        draw_ladder(parts["ladder"], folder / "ladder.png")
    if parts["qk-norm"]:
        added = beside_ladder(parts["qk-norm"], parts["ladder"])
        sections += ["## qk-norm", lengths(parts["qk-norm"]), added]
    if parts["long"]:
        sections += ["## long", lengths(parts["long"])]
        draw_curves(parts["long"], folder / "long.png")
    return "\n\n".join(sections)


def conditions_of(results: Results) -> str:
    """The function names all conditions under which the results were measured, each once."""
    lines = []
    for result in results:
        names, data = in_words(result["conditions"]), result["data"]
        lines.append(
            f"- {result['part']}: {names}; {result['batch_size']} x {result['seq_len']:,} tokens a "
            f"step, {result['parameters'] / 1e6:.0f}M parameters, data of "
            f"{data['train_tokens'] / 1e6:.1f}M tokens, {data['validation_tokens']:,} for "
            "validation"
        )
    return "\n".join(dict.fromkeys(lines))


def searched(part: Part, results: Results) -> str:
    """The function lists every trial of a search, the best of each arm first."""
    rows, notes = [], []
    for arm in dict.fromkeys((*TUNED, *(result["arm"] for result in results))):
        own = sorted((r for r in results if r["arm"] == arm), key=loss_of)
        rows += [_trial_cells(result) for result in own]
        best = best_of(results, part, arm)
        if best is None or best["point"] is None:
            continue
        measured = {tuple(result["point"]) for result in own}
        dimensions = DIMENSIONS[:1] if part == "current" else DIMENSIONS
        is_open = open_sides(measured, tuple(best["point"]), dimensions)
        verdict = "not yet inside: the search goes on" if is_open else "inside in every dimension"
        notes.append(f"{arm}: {len(own)} trials, the best is {verdict}.")
    head = ("recipe", "lr", "embedding lr", "weight decay", "beta2", "bits per byte", "nats")
    return table((*head, "tokens/s"), rows) + "\n\n" + "\n".join(notes)


def _trial_cells(result: Mapping) -> tuple[str, ...]:
    values = (f"{result[name]:g}" for name in DIMENSIONS)
    return (result["arm"], *values, *_loss_cells([result]), _speed_cell([result]))


def _loss_cells(results: Results) -> tuple[str, str]:
    """The cells are the mean loss in bits per byte and in nats."""
    if any(result["diverged"] for result in results):
        return "diverged", "diverged"
    means = (statistics.mean(r[name] for r in results) for name in ("bits_per_byte", "val_loss"))
    bits, nats = means
    return f"{bits:.4f}", f"{nats:.4f}"


def _speed_cell(results: Results) -> str:
    speeds = [r["tokens_per_second"] for r in results if r["tokens_per_second"]]
    return f"{statistics.median(speeds):,.0f}" if speeds else ""


def lengths(results: Results) -> str:
    """The function gives the mean over seeds of each recipe at each length."""
    groups = defaultdict(list)
    for result in sorted(results, key=lambda r: (r["tokens"], r["arm"])):
        groups[result["tokens"], result["arm"], _setting(result)].append(result)
    rows = []
    for (tokens, arm, _), own in groups.items():
        losses = [r["val_loss"] for r in own if not r["diverged"]]
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else ""
        epochs, size = f"{own[0]['data']['epochs']:g}", f"{tokens / 1e6:g}"
        cells = (f"{own[0]['lr']:g}", str(len(own)), *_loss_cells(own), spread)
        rows.append((arm, size, epochs, *cells, _speed_cell(own)))
    head = ("recipe", "M tokens", "epochs", "lr", "seeds", "bits per byte", "nats")
    return table((*head, "spread, nats", "tokens/s"), rows)


def _setting(result: Mapping) -> tuple:
    """Runs of one recipe with the same setting differ in length and seed alone."""
    return *(result[name] for name in DIMENSIONS), *result["flags"]


def ends_by_seed(results: Results, arm: str) -> dict[int, dict[int, float]]:
    """The function gives a recipe's losses in nats by seed, then by tokens.

    Raises:
        UserError: its runs are not of one setting, so that a line through them means nothing.
    """
    ends: dict[int, dict[int, float]] = defaultdict(dict)
    own = [result for result in results if result["arm"] == arm]
    settings = {_setting(result) for result in own}
    if len(settings) > 1:
        first, second, *_ = sorted(map(str, settings))
        raise UserError(
            f"the ladder has runs of {arm} with {first} and with {second}: take one of them out"
        )
    for result in own:
        if not result["diverged"]:
            ends[result["seed"]][result["tokens"]] = result["val_loss"]
    return dict(ends)


def equal_losses(results: Results) -> list[str]:
    """The function compares the tokens, and the GPU time, with which recipes have equal losses."""
    sections = []
    ends = {arm: ends_by_seed(results, arm) for arm in (FASTEST, *WANTED)}
    speeds = {arm: _speeds(results, arm) for arm in ends}
    for arm in WANTED:
        if ends[arm] and ends[FASTEST]:
            for reaching, reached in ((FASTEST, arm), (arm, FASTEST)):
                ratios = _ratios(reaching, reached, ends=ends, speeds=speeds)
                sections += [f"### {reaching} reaches {reached}'s loss", ratios]
    sections.append(
        "The ratio is tokens of the other by those of muon, geometric mean over seeds with its 95% "
        "interval; p is one-sided, of the ratio being no more than the number beside it. Time is "
        "that of the GPU, Muon's iteration included: each recipe at the tokens/s of its runs of "
        "that seed. A * marks tokens beyond the lengths that were run, which the trend leaves out."
    )
    return sections


def beside_ladder(results: Results, ladder: Results) -> str:
    """The function compares runs with the ladder's of the same recipe, length and seed."""
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results):
        ends, without = ends_by_seed(results, arm), ends_by_seed(ladder, arm)
        speeds, others = _speeds(results, arm), _speeds(ladder, arm)
        for tokens in sorted({tokens for own in ends.values() for tokens in own}):
            both = [s for s in ends if tokens in ends[s] and tokens in without.get(s, {})]
            if not both:
                continue
            gains = [ends[seed][tokens] - without[seed][tokens] for seed in both]
            crossings = dict(_crossings(without, ends, tokens))
            mark = "" if all(crossing.is_inside for crossing in crossings.values()) else "*"
            saved = [crossings[seed].tokens / tokens for seed in both if seed in crossings]
            pace = [
                speeds[seed] / others[seed] for seed in both if seed in speeds and seed in others
            ]
            rows.append(
                (
                    *(arm, f"{tokens / 1e6:g}", str(len(both))),
                    with_interval(statistics.fmean(gains), half_interval(gains)),
                    _interval(Ratio.of(saved)) + mark if saved else "",
                    f"{statistics.geometric_mean(pace):.3f}" if pace else "",
                )
            )
    if not rows:
        return "Not known yet: that takes runs of the ladder with the same tokens and seeds."
    head = ("recipe", "M tokens", "seeds", "nats more than the ladder's", "times fewer tokens")
    explained = (
        "Intervals are of the mean over seeds, 95%, by Student's t. The ladder needs so many times "
        "the tokens for the same loss, on its own curve (* beyond the lengths that it has)."
    )
    return table((*head, "times the tokens/s"), rows) + "\n\n" + explained


def _speeds(results: Results, arm: str) -> dict[int, float]:
    """The function gives a recipe's median tokens/s by seed, as the seeds of all recipes were run
    on one machine each."""
    speeds = defaultdict(list)
    for result in results:
        if result["arm"] == arm and result["tokens_per_second"]:
            speeds[result["seed"]].append(result["tokens_per_second"])
    return {seed: statistics.median(own) for seed, own in speeds.items()}


def _ratios(reaching: str, reached: str, *, ends: Mapping, speeds: Mapping) -> str:
    """The function compares two recipes, one of them the fastest, at each length of one.

    Args:
        reaching: recipe that comes to the other's losses.
        reached: recipe at whose lengths they are compared.
        ends: losses by recipe, seed and tokens.
        speeds: tokens/s by recipe and seed.
    """
    arm = reaching if reached == FASTEST else reached
    rows, inside = [], defaultdict(dict)
    for tokens in sorted({tokens for own in ends[reached].values() for tokens in own}):
        crossings = dict(_crossings(ends[reaching], ends[reached], tokens))
        if not crossings:
            continue
        ratios = {seed: crossing.tokens / tokens for seed, crossing in crossings.items()}
        if reaching == FASTEST:
            ratios = {seed: 1 / ratio for seed, ratio in ratios.items()}
        for seed, crossing in crossings.items():
            if crossing.is_inside:
                inside[seed][tokens] = ratios[seed]
        times = [
            ratio * speeds[FASTEST][seed] / speeds[arm][seed]
            for seed, ratio in ratios.items()
            if seed in speeds[FASTEST] and seed in speeds[arm]
        ]
        tokens_cells = _tokens_cells(tokens, crossings.values())
        ratio_cells = _ratio_cells(list(ratios.values()), arm)
        rows.append((*tokens_cells, *ratio_cells, *_ratio_cells(times, arm)))
    if not rows:
        return f"Not known yet: that takes two lengths of {reaching}, the longer with a lower loss."
    sizes = (f"M tokens of {reached}", f"M tokens of {reaching}")
    head = (*sizes, "seeds", "ratio", "p", "time ratio", "p of time")
    lines = [table(head, rows)]
    line = trend(list(inside.values()), PLANNED_TOKENS)
    if line:
        seeds = len(line.at.values)
        lines.append(
            f"Twice the tokens change the ratio by {_interval(line.per_doubling)} "
            f"({seeds} seed{'s' if seeds > 1 else ''}); on that line it would be "
            f"{_interval(line.at)} at {PLANNED_TOKENS / 1e9:g}B tokens, far outside what was run."
        )
    return "\n\n".join(lines)


def _crossings(reaching: Mapping, of: Mapping, tokens: int) -> Iterable[tuple[int, Crossing]]:
    """The iterator gives by seed where one recipe reaches what the other has at `tokens`."""
    for seed in sorted(reaching.keys() & of.keys()):
        if tokens in of[seed]:
            crossing = tokens_at(of[seed][tokens], reaching[seed])
            if crossing is not None:
                yield seed, crossing


def _tokens_cells(tokens: int, crossings: Iterable[Crossing]) -> tuple[str, ...]:
    """The cells are a length, the tokens of the other recipe, and of how many seeds."""
    found = list(crossings)
    mean = statistics.geometric_mean(crossing.tokens for crossing in found)
    mark = "" if all(crossing.is_inside for crossing in found) else "*"
    return f"{tokens / 1e6:g}", f"{mean / 1e6:.1f}{mark}", str(len(found))


def _ratio_cells(values: Sequence[float], arm: str) -> tuple[str, str]:
    """The cells are a ratio with its interval, and p of it being no more than what is wanted of
    `arm`, and no more than 1."""
    if not values:
        return "", ""
    ratio = Ratio.of(values)
    if len(values) < 2:
        return _interval(ratio), ""
    bounds = (WANTED[arm], 1.0)
    return _interval(ratio), ", ".join(f"{ratio.p_above(b):.4f} (> {b:g})" for b in bounds)


def _interval(ratio: Ratio) -> str:
    if len(ratio.values) < 2:
        return f"{ratio.mean:.2f}"
    return f"{ratio.mean:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def draw_ladder(results: Results, path: Path) -> None:
    """The picture has the loss at the end of every run, and each recipe's means."""
    axes = Figure(figsize=(7, 4.5), layout="constrained").add_subplot()
    for arm, color in COLORS.items():
        own = [r for r in results if r["arm"] == arm and not r["diverged"]]
        by_tokens = defaultdict(list)
        for result in own:
            by_tokens[result["tokens"] / 1e6].append(result["bits_per_byte"])
        tokens = sorted(by_tokens)
        means = [statistics.mean(by_tokens[x]) for x in tokens]
        axes.plot(tokens, means, color=color, label=arm)
        points = [(x, loss) for x, losses in by_tokens.items() for loss in losses]
        axes.scatter(*zip(*points, strict=True) if points else ([], []), color=color, s=12)
    axes.set_xscale("log")
    lengths = sorted({result["tokens"] / 1e6 for result in results})
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.set_xticks([], minor=True)
    _finish(axes, path, "tokens of the whole run, millions")


def draw_curves(results: Results, path: Path) -> None:
    """The picture has the validation loss along each run."""
    axes = Figure(figsize=(7, 4.5), layout="constrained").add_subplot()
    for result in results:
        data = result["data"]
        factor = data["validation_tokens"] / data["validation_bytes"] / math.log(2)
        points = [(tokens, loss) for tokens, _, loss in result["curve"] if loss is not None]
        axes.plot(
            [tokens / 1e6 for tokens, _ in points],
            [loss * factor for _, loss in points],
            color=COLORS[result["arm"]],
            label=f"{result['arm']}, seed {result['seed']}",
        )
    _finish(axes, path, "tokens trained, millions")


def _finish(axes: Axes, path: Path, what: str) -> None:
    axes.set_xlabel(what)
    axes.set_ylabel("validation loss, bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(path, axes.figure)
