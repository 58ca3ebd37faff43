"""The loss is expected before a run, and projected for a run under way.

Before: the Chinchilla form L(N, D) = E + A / N^alpha + B / D^beta with published coefficients. They
come from another tokeniser and corpus: compare options by them, do not trust an absolute value.
During: the same form in D alone, fitted to the run's own curve with an interval.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hamner.errors import UserError
from hamner.files import parse_json

TOKENS_PER_PARAMETER = 20
COHERENT_LOSS = 3.5
"""nats per token (perplexity 33), above which samples were incoherent text"""

MIN_POINTS = 20
_EXPONENTS = (0.1, 1.0)
"""bounds of a run's own exponent, wide around the published 0.28 to 0.37"""
_MAX_BINS = 100
_HUBER_THRESHOLD = 1.345
"""noise deviations beyond which a point counts linearly; 95% efficient on normal noise"""


@dataclass(frozen=True)
class LossLaw:
    """The law is L(N, D) = E + A / N^alpha + B / D^beta, nats a token; N parameters, D tokens."""

    source: str
    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float

    def capacity_term(self, parameters: float) -> float:
        """More parameters could still remove this, nats."""
        return self.a / parameters**self.alpha

    def data_term(self, tokens: float) -> float:
        """More tokens could still remove this, nats."""
        return self.b / tokens**self.beta

    def loss(self, parameters: float, tokens: float) -> float:
        """This loss is expected after training `parameters` on `tokens`."""
        return self.irreducible + self.capacity_term(parameters) + self.data_term(tokens)

    def tokens_to_reach(self, loss: float, parameters: float) -> float | None:
        """The loss is `loss` after this many tokens; None where the model is too small for it."""
        left = loss - self.irreducible - self.capacity_term(parameters)
        return (self.b / left) ** (1 / self.beta) if left > 0 else None

    def through(self, parameters: float, tokens: float, loss: float) -> "LossLaw":
        """The law is shifted through a measured run: another tokeniser, corpus, schedule."""
        shift = loss - self.loss(parameters, tokens)
        return replace(self, irreducible=self.irreducible + shift)


HOFFMANN = LossLaw("Hoffmann et al. 2022, arXiv:2203.15556", 1.69, 406.4, 0.34, 410.7, 0.28)
# The default: Hoffmann et al.'s parametric fit had not converged, and implies some 70 tokens per
# parameter where their other two methods say 20; this re-fit of the same runs agrees with those.
BESIROGLU = LossLaw(
    "Besiroglu et al. 2024, arXiv:2404.10102", 1.8172, 482.01, 0.3478, 2085.43, 0.3658
)


KNOWN_RUN = 163_609_344, 2.45e9, 3.41
"""parameters, tokens and loss of option `current` at 24 x 1024, learning rate 2e-4 throughout"""


def compute_optimal_tokens(parameters: float) -> float:
    """After this many tokens a larger model would have been the better use of the same FLOPs."""
    return TOKENS_PER_PARAMETER * parameters


@dataclass(frozen=True)
class RunCurve:
    """The curve is a run's training loss, restarts removed: `tokens` increases."""

    path: Path
    tokens: np.ndarray  # (n,) float64
    loss: np.ndarray  # (n,) float64, nats per token
    warmup_tokens: float
    """where the learning rate first stopped rising; 0 if the file does not show it"""


def read_run(path: Path) -> RunCurve:
    """It reads metrics.jsonl (step, tokens, loss, lr) or a CSV (step, loss, tokens_total).

    A run that went back to a checkpoint logs the same tokens twice: the later reading is kept. A
    step counter that starts again while tokens go on is harmless, the curve is drawn over tokens;
    a token counter that starts again while steps go on is continued from where it stood. Lines
    without a finite loss are passed over, and so is a last line that is still being written.

    Raises:
        UserError: no such file, another format, a line that cannot be read, no points.
    """
    points: list[tuple[float, float, float]] = []
    last_step, last_logged, offset = -math.inf, 0.0, 0.0
    for step, logged, loss, rate in _rows(path):
        # Half: a resume with another batch size may log slightly fewer tokens at a later step.
        if logged < last_logged / 2 and step > last_step:
            offset += last_logged
        last_step, last_logged = step, logged
        while points and points[-1][0] >= logged + offset:
            points.pop()
        points.append((logged + offset, loss, rate))
    if not points:
        raise UserError(f"--metrics {path} is empty: no line has tokens and a finite loss")
    tokens, losses, rates = zip(*points, strict=True)
    settled = (i for i, (rate, following) in enumerate(pairwise(rates)) if following <= rate)
    warmed = next(settled, len(rates) - 1)
    return RunCurve(path, np.array(tokens), np.array(losses), tokens[warmed] if warmed else 0.0)


def _rows(path: Path) -> Iterator[tuple[float, float, float, float]]:
    """Lines with a finite loss give step, tokens, loss and learning rate (0 if unknown)."""
    formats = {".jsonl": (_json_records, "tokens"), ".csv": (_csv_records, "tokens_total")}
    if path.suffix not in formats:
        raise UserError(f"--metrics {path} is neither .jsonl nor .csv")
    records, tokens_field = formats[path.suffix]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"--metrics {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--metrics {path} is not text") from None
    for number, record in records(path, lines):
        if record.get("loss") in (None, ""):
            continue
        try:
            row = [float(record[name]) for name in ("step", tokens_field, "loss")]
            row.append(float(record.get("lr") or 0.0))
        except KeyError as error:
            raise UserError(f"--metrics {path} line {number} has no field {error}") from None
        except (OverflowError, TypeError, ValueError):
            raise UserError(
                f"--metrics {path} line {number}: step, {tokens_field}, loss and lr must be numbers"
            ) from None
        if all(map(math.isfinite, row)) and row[1] > 0:
            yield tuple(row)


def _json_records(path: Path, lines: list[str]) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                return
            record = None
        if not isinstance(record, dict):
            raise UserError(f"--metrics {path} line {number} is not a JSON object")
        yield number, record


def _csv_records(path: Path, lines: list[str]) -> Iterator[tuple[int, dict]]:
    if len(lines) > 1 and not lines[-1].endswith("\n"):
        lines.pop()  # a number cut short would read as another number
    reader = csv.DictReader(lines)
    missing = {"step", "loss", "tokens_total"} - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"--metrics {path} line 1 has no column {', '.join(sorted(missing))}")
    for record in reader:
        if None in record.values():
            raise UserError(f"--metrics {path} line {reader.line_num} has too few columns")
        yield reader.line_num, record


@dataclass(frozen=True)
class LossFit:
    """The fit is L(D) = floor + scale * (D / tokens_seen)^-exponent, with bootstrap replicas."""

    tokens_seen: float
    """tokens at the last point"""
    floor: float
    scale: float
    exponent: float
    replicas: np.ndarray  # (replicas, 3) float64: floor, scale, exponent

    def loss(self, tokens: float) -> float:
        """The fitted loss after `tokens` is in nats."""
        return self.floor + self.scale * (tokens / self.tokens_seen) ** -self.exponent

    def interval(self, tokens: float, share: float = 0.8) -> tuple[float, float]:
        """The bounds hold the loss after `tokens` in `share` of the replicas."""
        floor, scale, exponent = self.replicas.T
        losses = floor + scale * (tokens / self.tokens_seen) ** -exponent
        low, high = np.quantile(losses, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)

    @property
    def slope(self) -> float:
        """The slope is in nats per token at the last point; negative while the loss falls."""
        return -self.exponent * self.scale / self.tokens_seen


def fit_run(curve: RunCurve, replicas: int = 200) -> LossFit:
    """The function fits floor, scale and exponent to a run so far.

    The first tenth of the tokens and twice the warm-up are left out: the law does not hold there.
    Each exponent leaves a line in D^-exponent, fitted with Huber's loss (outliers count linearly);
    the best exponent is searched for. The interval is a circular block bootstrap of the residuals
    (Politis and Romano 1992), which keeps noise that is correlated in time together; each of
    `replicas` is a fit.

    Raises:
        UserError: fewer than MIN_POINTS points are left.
    """
    start = max(0.1 * curve.tokens[-1], 2 * curve.warmup_tokens)
    settled = curve.tokens >= start
    count = int(settled.sum())
    if count < MIN_POINTS:
        raise UserError(
            f"--metrics {curve.path} is too short: {count} of its {len(curve.tokens)} points lie "
            f"after warm-up and the first tenth of the tokens, and a fit needs {MIN_POINTS}"
        )
    tokens, loss = _binned(curve.tokens[settled], curve.loss[settled])
    tokens_seen = float(curve.tokens[-1])
    position = tokens / tokens_seen
    # Noise from neighbours' differences, so that no fit is needed to measure it.
    noise = np.median(np.abs(np.diff(loss))) / (0.6745 * math.sqrt(2))
    noise = max(float(noise), 1e-9)

    best = _huber_fits(position, loss[None], noise)[0]
    fitted = best[0] + best[1] * position ** -best[2]
    resampled = _block_bootstrap(loss - fitted, replicas)
    return LossFit(tokens_seen, *best.tolist(), _huber_fits(position, fitted + resampled, noise))


def _binned(tokens: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The medians are of at most _MAX_BINS runs of equally many points, in order."""
    if len(tokens) <= _MAX_BINS:
        return tokens, loss
    bins = zip(np.array_split(tokens, _MAX_BINS), np.array_split(loss, _MAX_BINS), strict=True)
    medians = np.array([(np.median(t), np.median(y)) for t, y in bins])
    return medians[:, 0], medians[:, 1]


def _block_bootstrap(residuals: np.ndarray, replicas: int) -> np.ndarray:
    """The (replicas, n) residuals are drawn in blocks of about sqrt(n), replaced, on a circle."""
    n = len(residuals)
    length = math.isqrt(n)
    blocks = -(-n // length)
    starts = np.random.default_rng(0).integers(0, n, (replicas, blocks))
    indices = (starts[:, :, None] + np.arange(length)) % n
    # Three parameters took up part of the noise; blocks, not points, are what is independent.
    centred = (residuals - residuals.mean()) * math.sqrt(blocks / (blocks - 3))
    return centred[indices.reshape(replicas, -1)[:, :n]]


def _huber_fits(position: np.ndarray, losses: np.ndarray, noise: float) -> np.ndarray:
    """Each of (curves, n) losses gets a robust (floor, scale, exponent): (curves, 3).

    The exponent is searched on a grid that closes in on the best of it, five times. `position`,
    (n,), is tokens over those seen, `noise` the standard deviation of a point.
    """
    curves = np.arange(len(losses))
    low, high = np.full(len(losses), _EXPONENTS[0]), np.full(len(losses), _EXPONENTS[1])
    for _ in range(5):
        grid = np.linspace(low, high, 7, axis=-1)
        powers = position ** -grid[..., None]
        floor, scale, objective = _huber_lines(powers, losses[:, None], _HUBER_THRESHOLD * noise)
        best = objective.argmin(-1)
        low = grid[curves, np.maximum(best - 1, 0)]
        high = grid[curves, np.minimum(best + 1, grid.shape[-1] - 1)]
    return np.stack([column[curves, best] for column in (floor, scale, grid)], -1)


def _huber_lines(
    x: np.ndarray, y: np.ndarray, limit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The function fits y = floor + scale * x along the last axis, floor >= 0, by Huber's loss."""
    weights = np.ones(np.broadcast_shapes(x.shape, y.shape))
    # Iteratively reweighted least squares; the objective is convex, ten rounds settle it.
    for _ in range(10):
        total = weights.sum(-1)
        mean_x, mean_y = (weights * x).sum(-1) / total, (weights * y).sum(-1) / total
        mean_xx, mean_xy = (weights * x * x).sum(-1) / total, (weights * x * y).sum(-1) / total
        scale = (mean_xy - mean_x * mean_y) / (mean_xx - mean_x**2)
        floor = mean_y - scale * mean_x
        # A loss cannot end below zero; on that edge the scale alone is left to fit.
        scale = np.where(floor < 0, mean_xy / mean_xx, scale)
        floor = np.maximum(floor, 0.0)
        error = np.abs(y - floor[..., None] - scale[..., None] * x)
        weights = limit / np.maximum(error, limit)
    objective = np.where(error <= limit, error**2 / 2, limit * (error - limit / 2)).sum(-1)
    return floor, scale, objective


@dataclass(frozen=True)
class RunProjection:
    """A projection says where a run stands and is heading, if its schedule goes on as so far."""

    curve: RunCurve
    fit: LossFit
    parameters: int
    """active ones"""
    end_tokens: float
    """where the run is to end"""

    @property
    def loss_now(self) -> float:
        """The loss at the last point is the fitted one, so free of its noise."""
        return self.fit.loss(self.fit.tokens_seen)

    @property
    def law(self) -> LossLaw:
        """The published law is shifted to pass through the run."""
        return BESIROGLU.through(self.parameters, self.fit.tokens_seen, self.loss_now)

    def diagnosis(self) -> str:
        """The diagnosis says whether the model or the data holds the loss up."""
        if self.fit.slope >= 0:
            return (
                "The loss is not falling: look at the learning rate, the data and the gradient "
                "norms before any scaling law."
            )
        law, seen, optimal = self.law, self.fit.tokens_seen, compute_optimal_tokens(self.parameters)
        from_tokens = law.data_term(seen) - law.data_term(2 * seen)
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
            f"tokens again would take {from_tokens:.2f} off the loss, twice the parameters "
            f"{from_parameters:.2f}."
        )
