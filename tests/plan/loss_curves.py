"""Logs of runs, real and drawn: what the intervals of a projection are calibrated on.

`python -m tests.plan.loss_curves` prints the table of profiles/plan.md.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import numpy as np

from hamner.plan import projection
from hamner.plan.projection import NoLaw, TooEarly, fit_run
from hamner.plan.run_curve import RunCurve, read_run

LOGS = Path(__file__).with_name("logs")
STEP = 24_576
"""tokens a step of the 164M model"""
MEASURED = (
    (49e6, 98e6, 491e6, 1e9, 2e9, 2.45e9),
    ((5.20, 4.46, 3.67, 3.53, 3.43, 3.41), (5.07, 4.30, 3.58, 3.40, 3.30, 3.27)),
)
"""tokens, and the training losses of two runs of it (means of 100 steps) there"""
SHIFTED_TWICE = (
    (24.6e6, 49e6, 98e6, 491e6, 1e9, 2e9, 2.45e9),
    (6.49, 6.32, 6.11, 5.54, 5.44, 4.79, 4.68),
)
"""the same of a run whose labels were shifted twice"""

CALIBRATED = (
    range(120),
    (
        *("tiny", "current", "constant", "cosine", "batch", "builtin", "small"),
        *("adamw-constant", "adamw-wsd"),
    ),
)
"""seeds of drawn curves, and logs, that the constants of hamner.plan.projection were chosen on; the
exponents' mean and what is too early for a law on seeds 200-499 too"""
HELD_OUT = (
    range(2_000, 2_120),
    (
        *("held-constant", "held-cosine", "adamw-linear", "adamw-cosine", "adamw-builtin"),
        *("muon-linear", "muon-builtin", "muon-constant", "muon-wsd", "muon-small-batch"),
        "current-muon",
    ),
)
"""those that they were not"""
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""of a log's tokens, after which its end is projected"""
AIM = 0.825
"""share of the calibrated drawn ends inside their 80% intervals: the middle of 75% to 90%"""


def correlated(random: np.random.Generator, points: int, length: float) -> np.ndarray:
    """Normal noise of deviation 1 that remembers about `length` points."""
    kept = np.exp(-1 / length)
    noise = random.normal(size=points)
    noise[1:] *= np.sqrt(1 - kept**2)
    for i in range(1, points):
        noise[i] += kept * noise[i - 1]
    return noise


def _smooth(random: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    """A law of random shape that ends where the 164M model did, or one of its two curves."""
    if random.random() < 0.7:
        floor = random.uniform(2.3, 3.1)
        scale = max(0.15, random.uniform(3.2, 3.6) - floor)
        loss = floor + scale * (tokens / 2.45e9) ** -random.uniform(0.28, 0.65)
        early = random.uniform(0.01, 0.06) * 2.45e9
        return loss + random.uniform(0, 1.5) * np.exp(-tokens / early)
    at, losses = MEASURED
    above_floor = np.log(np.array(losses[random.integers(2)]) - 3)
    x = np.log(tokens)
    last = (x - np.log(at[-1])).clip(0) * (above_floor[-1] - above_floor[-3]) / np.log(2.45)
    return 3 + np.exp(np.interp(x, np.log(at), above_floor) + last)


def drawn_curve(seed: int) -> tuple[RunCurve, float]:
    """A curve with the accidents of a long run, and the share of it after which it is projected.

    Readings are noisy, the order of the data moves neighbours together, half of the runs change
    their batch, most restart with an empty optimizer up to three times, some change their data.
    """
    random = np.random.default_rng(seed)
    points = int(random.integers(120, 2_500))
    last = 2.45e9 * random.uniform(0.3, 1.2)
    tokens = np.linspace(last / points, last, points)
    loss = _smooth(random, tokens)
    loss += random.uniform(0.01, 0.1) * random.normal(size=points)
    loss += random.uniform(0.003, 0.02) * correlated(random, points, random.uniform(5, 50))

    def since(share: float) -> np.ndarray:
        return (tokens / last - share).clip(0)

    if random.random() < 0.5:
        start = random.uniform(0.2, 0.7)
        loss -= random.normal(0.01, 0.02) * (1 - np.exp(-since(start) / 0.03))
    for _ in range(random.integers(1, 4) if random.random() < 0.6 else 0):
        start, height = random.uniform(0.1, 0.95), random.uniform(0.02, 0.4)
        decay = np.exp(-since(start) / random.uniform(0.002, 0.015))
        loss += height * decay * (tokens > start * last)
    if random.random() < 0.3:
        loss += random.normal(0, 0.05) * (tokens > random.uniform(0.1, 0.9) * last)
    spikes = random.random(points) < 0.003
    loss[spikes] += random.exponential(1.0, spikes.sum())
    rates = np.minimum(1, tokens / min(2_000 * STEP, last / 10))
    curve = RunCurve(Path(f"drawn-{seed}.jsonl"), tokens, loss, rates)
    return curve, random.uniform(0.3, 0.8)


class End(NamedTuple):
    """An end is where a run ended, and where it was projected to."""

    error: float
    """of the point, nats"""
    half: float
    """half the 80% interval, nats"""

    @property
    def is_inside(self) -> bool:
        return abs(self.error) <= self.half


Outcome = End | Literal["too early", "no law"]


def project_end(curve: RunCurve, share: float) -> Outcome:
    """The last 3% of the readings are projected, or 25 of few, where a law is offered."""
    points = len(curve.tokens)
    last = max(5, points * 3 // 100, min(25, points // 10))
    seen = curve.tokens <= share * curve.tokens[-1]
    at, reading = curve.tokens[-last:].mean(), np.median(curve.loss[-last:])
    parts = (getattr(curve, name)[seen] for name in ("tokens", "loss", "rates"))
    final_rate = curve.rates[-1] / curve.rates.max()
    try:
        fit = fit_run(RunCurve(curve.path, *parts, final_rate=final_rate), curve.tokens[-1])
    except TooEarly:
        return "too early"
    except NoLaw:
        return "no law"
    low, high = fit.interval(at)
    return End(float(fit.loss(at) - reading), (high - low) / 2)


def outcomes(seeds: Sequence[int], logs: Sequence[str]) -> dict[str, list[Outcome]]:
    """Each drawn curve is projected once, each log from every share of SHARES."""
    drawn = [project_end(*drawn_curve(seed)) for seed in seeds]
    curves = [read_run(LOGS / f"{name}.csv", np.log(49_152)) for name in logs]
    real = [project_end(curve, share) for curve in curves for share in SHARES]
    return {"drawn": drawn, "this project's": real, "all": drawn + real}


def ends(found: Sequence[Outcome]) -> list[End]:
    """These are the ends that a law was offered for."""
    return [outcome for outcome in found if isinstance(outcome, End)]


def calibrated_width() -> float:
    """With this in place of projection._WIDTH the intervals hold AIM of the calibrated ends."""
    scores = [abs(end.error) / end.half for end in ends(outcomes(*CALIBRATED)["drawn"])]
    return projection._WIDTH * float(np.quantile(scores, AIM))


def markdown_rows(groups: dict[str, list[Outcome]]) -> list[str]:
    """profiles/plan.md's table has these rows."""
    return [
        f"| {name} | {len(found)} | {found.count('too early')} | {found.count('no law')} "
        f"| {len(ends(found))} | {np.mean([end.is_inside for end in ends(found)]):.0%} "
        f"| {median(abs(end.error) for end in ends(found)):.3f} "
        f"| {median(2 * end.half for end in ends(found)):.3f} |"
        for name, found in groups.items()
    ]


if __name__ == "__main__":
    print(f"_WIDTH = {calibrated_width():.2f}")
    for logs in (CALIBRATED, HELD_OUT):
        print("\n".join(markdown_rows(outcomes(*logs))))
