"""A run under way is projected by a law in its own tokens, with an interval, where one fits.

L(D) = floor + scale * D^-exponent is fitted for every exponent of a grid; each counts by its
likelihood and by how near it is to the known ones. The interval adds what the law does not
know, measured on the run itself: how far projections from its earlier parts were off. Its width was
calibrated on logs of runs (profiles/plan.md).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hamner.errors import UserError
from hamner.plan.loss import (
    BESIROGLU,
    TOKENS_PER_PARAMETER,
    LossLaw,
    compute_optimal_tokens,
    reached_loss,
)
from hamner.plan.run_curve import RunCurve
from hamner.plan.trend import (
    HUBER_THRESHOLD,
    READINGS_ALIKE,
    Slowing,
    huber_lines,
    is_falling,
    slowing,
)
from hamner.plan.words import count

MIN_POINTS = 20
NOT_FALLING = "the loss is not falling"
FAR_ABOVE = 0.8
"""nats above what its size reaches, where a run is more likely wrong than small"""
FAR_BELOW = 0.3
"""share of what its size reaches, where it is more likely given the answers than good"""

_EXPONENTS = np.geomspace(0.08, 1.2, 60)
_KNOWN_EXPONENTS = 0.44, 0.4
"""the geometric mean and the standard deviation of the logarithm: of the published ones (0.28 and
0.37) and of two runs of the 164M model from 98M tokens on (0.54 and 0.68)"""
_FITTED_FROM = 0.1
"""share of the tokens before which no law holds"""
_MAX_BINS = 100
_DRIFT = 0.02, 2
"""nats per e-fold of tokens that a projection is off before the run says otherwise, and the number
of past projections that this counts as"""
_DECAY = 0.35
"""e-folds of tokens by which the learning rate's fall from its peak to nothing moves a run along
the law, one way or the other: less is learned from each token, and more of it shows"""
_PAST = (0.4, 0.5, 0.6)
"""shares of the tokens seen from which the last tenth is projected, to see how far off that is"""
_PAST_ALIKE = 2
"""of those projections so many count as one: they share their data"""
_WIDTH = 1.13
"""half an 80% interval in these deviations, by `python -m tests.plan.loss_curves`"""
_MISFIT = 0.1, 0.1
"""a law that misses its own tenths by this share of the fall, and by so many nats, is none"""


class NoLaw(UserError):
    """No law fits the run so far; the message says why."""


class TooEarly(NoLaw):
    """The loss does not fall less in each doubling of the tokens yet, as under any law it must."""


@dataclass(frozen=True)
class PowerLaws:
    """One law for each exponent, with its weight: L(D) = floor + scale * (D / seen)^-exponent."""

    seen: float
    floors: np.ndarray  # (exponents,), like the others
    scales: np.ndarray
    weights: np.ndarray
    points: np.ndarray  # (exponents, n): (D / seen)^-exponent of what was fitted
    noise: float
    """of a reading, nats"""

    def loss(self, tokens: np.ndarray) -> np.ndarray:
        """The expected loss after each of `tokens` is in nats."""
        return self.weights @ self._losses(tokens)

    def variance(self, tokens: np.ndarray) -> np.ndarray:
        """The variance is between the exponents, and of each one's line through noisy readings."""
        x = self._powers(tokens)
        between = self.weights @ (self._losses(tokens) - self.loss(tokens)) ** 2
        mean = self.points.mean(-1, keepdims=True)
        leverage = (x - mean) ** 2 / ((self.points - mean) ** 2).sum(-1, keepdims=True)
        within = self.weights @ (leverage + 1 / self.points.shape[-1])
        return between + READINGS_ALIKE * self.noise**2 * within

    def slope(self) -> float:
        """The slope is in nats per token at `seen`."""
        return float(-(self.weights * self.scales) @ _EXPONENTS / self.seen)

    def _powers(self, tokens: np.ndarray) -> np.ndarray:
        return (np.asarray(tokens) / self.seen) ** -_EXPONENTS[:, None]

    def _losses(self, tokens: np.ndarray) -> np.ndarray:
        return self.floors[:, None] + self.scales[:, None] * self._powers(tokens)


@dataclass(frozen=True)
class LossFit:
    """The fit is of a run so far."""

    laws: PowerLaws
    wander: float
    """nats by which tenths of the run lie off the law"""
    drift: float
    """nats by which past projections were off, per e-fold of tokens"""
    decay: float
    """nats by which the rest of the schedule may move the loss off the law"""
    end: float
    """tokens at which the schedule has come to its end"""

    @property
    def tokens_seen(self) -> float:
        """The model was trained on so many tokens at the last point."""
        return self.laws.seen

    @property
    def slope(self) -> float:
        """The slope is in nats per token at the last point; negative while the loss falls."""
        return self.laws.slope()

    def loss(self, tokens: float) -> float:
        """The fitted loss after `tokens` is in nats."""
        return float(self.laws.loss(np.array([tokens]))[0])

    def interval(self, tokens: float) -> tuple[float, float]:
        """The bounds hold the loss after `tokens` in 80% of runs; `loss` is their middle."""
        ahead = max(1.0, tokens / self.tokens_seen)
        variance = self.laws.variance(np.array([tokens]))[0] + self.wander**2
        fallen = min(1.0, (ahead - 1) / max(self.end / self.tokens_seen - 1, 1e-9))
        variance += (self.drift * math.log(ahead)) ** 2 + (self.decay * fallen) ** 2
        half = _WIDTH * math.sqrt(variance)
        middle = self.loss(tokens)
        return middle - half, middle + half


def fit_run(curve: RunCurve, end: float) -> LossFit:
    """The function fits a law to a run so far, whose schedule is over after `end` tokens.

    The first tenth of the tokens and twice the warm-up are left out: the law does not hold there.
    Each exponent leaves a line in D^-exponent, fitted with Huber's loss (outliers count linearly).

    Raises:
        TooEarly: the loss does not fall less and less.
        NoLaw: fewer than MIN_POINTS points are left, the loss is not falling, or falls otherwise.
    """
    seen = float(curve.trained[-1])
    start = _fitted_from(curve)
    settled = curve.trained >= start
    points = int(settled.sum())
    if points < MIN_POINTS:
        raise NoLaw(
            f"the run is too short for a law: {points} of its {len(curve.tokens)} points lie after "
            f"warm-up and the first tenth of the tokens, and a fit needs {MIN_POINTS}"
        )
    tokens, loss = _binned(curve.trained[settled], curve.trained_loss[settled])
    # Noise from neighbours' differences, so that no fit is needed to measure it; no log has less.
    noise = max(float(np.median(np.abs(np.diff(loss)))) / (0.6745 * math.sqrt(2)), 1e-3)
    laws = _fit(tokens, loss, seen, noise)
    tenths = np.array_split(loss - laws.loss(tokens), 10)
    wander = float(np.std([np.median(tenth) for tenth in tenths]))
    fall = float(np.diff(laws.loss(tokens[[-1, 0]]))[0])
    if not is_falling(tokens, loss, noise):
        raise NoLaw(NOT_FALLING)
    share, nats = _MISFIT
    if wander > max(nats, share * fall):
        raise NoLaw(
            f"no law fits: the loss wanders {wander:.2f} nats about the best one, which falls "
            f"{fall:.2f} in the same tokens"
        )
    if (trend := slowing(tokens, loss, noise)) and not trend.is_clear:
        # The fall of today is then the earlier half, in doublings, of what is fitted.
        again = seen * min(seen / start, _FITTED_FROM**-0.5)
        raise TooEarly(_too_early(trend, curve.start + again, is_beyond=again > end))
    decay = _DECAY * abs(laws.slope()) * seen * curve.rate_left
    return LossFit(laws, wander, _drift(tokens, loss, noise), decay=decay, end=end)


def _fitted_from(curve: RunCurve) -> float:
    """A law holds from so many tokens on: those trained on, not the first ones."""
    return max(_FITTED_FROM * float(curve.trained[-1]), 2 * curve.warmup_tokens)


def _too_early(trend: Slowing, again: float, *, is_beyond: bool) -> str:
    lately, before = f"{trend.lately:.2f} nats", f"{trend.before:.2f}"
    if trend.lately >= trend.before:
        found = (
            f"the loss still falls as fast or faster with each doubling of the tokens ({lately} "
            f"lately, {before} before), and under a law it falls less"
        )
    else:
        found = (
            "noise hides whether the loss falls less with each doubling of the tokens, as under a "
            f"law ({lately} lately, {before} before)"
        )
    where = ", which this run will not see" if is_beyond else ""
    return f"it is too early, {found}; ask again after about {count(again)} tokens{where}"


def _fit(tokens: np.ndarray, loss: np.ndarray, seen: float, noise: float) -> PowerLaws:
    points = (tokens / seen) ** -_EXPONENTS[:, None]
    floors, scales, objective = huber_lines(points, loss, HUBER_THRESHOLD * noise)
    centre, deviation = _KNOWN_EXPONENTS
    unlikely = objective / noise**2 / READINGS_ALIKE
    unlikely += (np.log(_EXPONENTS / centre) / deviation) ** 2 / 2
    weights = np.exp(unlikely.min() - unlikely)
    return PowerLaws(seen, floors, scales, weights / weights.sum(), points=points, noise=noise)


def _drift(tokens: np.ndarray, loss: np.ndarray, noise: float) -> float:
    """Projections of the last tenth from earlier parts were so far off, per e-fold of tokens.

    What noise explains of it does not count.
    """
    last = tokens >= 0.9 * tokens[-1]
    at, reading = np.median(tokens[last], keepdims=True), np.median(loss[last])
    prior, weight = _DRIFT
    squares, total = weight * prior**2, float(weight)
    for share in _PAST:
        early = tokens <= share * tokens[-1]
        if early.sum() < MIN_POINTS / 2:
            continue
        laws = _fit(tokens[early], loss[early], share * tokens[-1], noise)
        expected = laws.variance(at)[0] + READINGS_ALIKE * noise**2 / last.sum()
        unexpected = max(0.0, (reading - laws.loss(at)[0]) ** 2 - expected)
        squares += unexpected / math.log(at[0] / laws.seen) ** 2 / _PAST_ALIKE
        total += 1 / _PAST_ALIKE
    return math.sqrt(squares / total)


def _binned(tokens: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The medians are of at most _MAX_BINS runs of equally many points, in order."""
    if len(tokens) <= _MAX_BINS:
        return tokens, loss
    bins = zip(np.array_split(tokens, _MAX_BINS), np.array_split(loss, _MAX_BINS), strict=True)
    medians = np.array([(np.median(t), np.median(y)) for t, y in bins])
    return medians[:, 0], medians[:, 1]


@dataclass(frozen=True)
class RunProjection:
    """A projection says where a run stands and is heading, if its schedule goes on as so far."""

    curve: RunCurve
    parameters: int
    """active ones"""
    end_tokens: float
    """logged tokens at which the run is to end"""

    @cached_property
    def _fitted(self) -> LossFit | NoLaw:
        try:
            return fit_run(self.curve, self.tokens_at_end)
        except NoLaw as reason:
            return reason

    @property
    def fit(self) -> LossFit | None:
        """The fit is there where a law fits the run."""
        return self._fitted if isinstance(self._fitted, LossFit) else None

    @property
    def no_law(self) -> str | None:
        """The reason says why no law fits."""
        return str(self._fitted) if isinstance(self._fitted, NoLaw) else None

    @property
    def tokens_seen(self) -> float:
        """The model of today was trained on so many tokens."""
        return float(self.curve.trained[-1])

    @property
    def tokens_at_end(self) -> float:
        """The model of today will have been trained on so many."""
        return self.end_tokens - self.curve.start

    @property
    def loss_now(self) -> float:
        """The loss at the last point is free of its noise: fitted, or the last tenth's median."""
        if self.fit:
            return self.fit.loss(self.tokens_seen)
        last = self.curve.trained >= 0.9 * self.tokens_seen
        return float(np.median(self.curve.trained_loss[last]))

    @property
    def projected(self) -> LossFit | None:
        """The fit is what the run is projected by, unless something is wrong with the run."""
        return None if self.suspicion else self.fit

    @property
    def law(self) -> LossLaw | None:
        """The published law is shifted to where the run is projected to end.

        None where it says nothing of the run: where it would have to be shifted by more than tells
        a run from a wrong one. It was fitted to models of 44M parameters and more.
        """
        return self._law_through(self.tokens_at_end)

    def law_near(self, loss: float) -> LossLaw | None:
        """The published law is shifted to where the run has this loss, or comes nearest to it.

        So it says of the run's own size what its log and its projection say. None as in `law`.
        """
        if not self.projected:
            return None
        end = max(self.tokens_seen, self.tokens_at_end)
        tokens = np.geomspace(_fitted_from(self.curve), end, 2_000)
        nearest = np.abs(self.projected.laws.loss(tokens) - loss).argmin()
        return self._law_through(float(tokens[nearest]))

    def _law_through(self, tokens: float) -> LossLaw | None:
        """The published law is shifted to the run's own law after `tokens`."""
        if not self.projected:
            return None
        law = BESIROGLU.through(self.parameters, tokens, self.projected.loss(tokens))
        is_near = abs(law.irreducible - BESIROGLU.irreducible) <= FAR_ABOVE
        return law if is_near else None

    @property
    def suspicion(self) -> str | None:
        """The sentence says that the run is wrong rather than small, where its loss shows it."""
        seen, loss = self.tokens_seen, self.loss_now
        reached = reached_loss(self.parameters, seen)
        if seen <= self.curve.warmup_tokens or reached is None:
            return None
        size = f"{self.parameters / 1e6:.1f}M parameters reach after {seen / 1e9:.2f}B tokens"
        if loss < FAR_BELOW * reached:
            return (
                f"Check labels and data: the loss is far below the {reached:.2f} that {size}. Does "
                "the model see its targets, or the same text over and over?"
            )
        if loss < reached + FAR_ABOVE:
            return None
        return (
            "Check labels and data before you buy a larger model: the loss is "
            f"{loss - reached:.1f} nats above the {reached:.2f} that {size}. Is each target the "
            "next token, shifted once and not twice? Is the text whole, in order, and made with "
            "this tokenizer?"
        )

    def diagnosis(self) -> list[str]:
        """The diagnosis says whether the model or the data holds the loss up, or what is wrong."""
        found = [str(jump) for jump in self.curve.jumps]
        if self.suspicion:
            found.append(self.suspicion)
        if self.no_law == NOT_FALLING:
            found.append(
                "The loss is not falling: look at the learning rate, the data and the gradient "
                "norms before any scaling law."
            )
        elif self.no_law:
            found.append(f"Nothing is projected: {self.no_law}.")
        if self.projected and self.law:
            found.append(self._capacity(self.projected, self.law))
        elif self.projected:
            found.append(
                "Nothing is said of other sizes: the published law is far from this run, so small "
                "or so short."
            )
        return found

    def _capacity(self, fit: LossFit, law: LossLaw) -> str:
        """What tokens bring is told by the run's own law, and of other sizes it knows nothing."""
        seen, optimal = self.tokens_seen, compute_optimal_tokens(self.parameters)
        from_tokens = fit.loss(seen) - fit.loss(2 * seen)
        from_parameters = law.capacity_term(self.parameters)
        from_parameters -= law.capacity_term(2 * self.parameters)
        verdict = "No capacity wall yet"
        if seen >= optimal:
            verdict = "Capacity wall, a larger model is the better use of the GPU"
        elif seen >= optimal / 2:
            verdict = "Near the capacity wall"
        return (
            f"{verdict}: {seen / 1e9:.2f}B tokens seen is {seen / optimal:.0%} of the "
            f"compute-optimal {optimal / 1e9:.2f}B ({TOKENS_PER_PARAMETER} per parameter); as many "
            f"tokens again would take {from_tokens:.2f} off the loss, as the run goes, twice the "
            f"parameters {from_parameters:.2f}, by the published law."
        )
