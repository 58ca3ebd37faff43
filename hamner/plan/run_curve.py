"""The curve of a run under way is read from its log, its restarts joined or named."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from hamner.config.train import CONFIG_FILE
from hamner.errors import UserError
from hamner.files import parse_json, read_json, refuse_pipe

UNTRAINED_LOSS = math.log(49_152)
"""nats per token of a guess among the vocabulary of every option but `tiny`"""

_RATES = ("lr", "learning_rate")
_NEAR = 0.75, 1.1
"""shares of the untrained loss between which a reading counts as near it"""
_NEIGHBOURS = 5
"""readings on each side of a jump that say where the loss stood"""


@dataclass(frozen=True)
class Jump:
    """The loss rose at this reading by more than half of all that it had fallen, and stayed up."""

    step: int
    """as logged"""
    tokens: float
    before: float
    after: float
    untrained_loss: float

    @classmethod
    def at(cls, reading: "Reading", untrained_loss: float) -> "Jump":
        """The jump ends at `reading`."""
        levels = {"before": reading.before, "after": reading.loss}
        return cls(int(reading.step), reading.tokens, untrained_loss=untrained_loss, **levels)

    def __str__(self) -> str:
        where = f"at step {self.step:,} ({self.tokens / 1e9:.2f}B tokens)"
        rise = f"from {self.before:.2f} to {self.after:.2f}"
        if _is_near(self.after, self.untrained_loss):
            return (
                f"Weights were lost {where}: the loss goes back {rise}, near the "
                f"{self.untrained_loss:.2f} (ln V) of an untrained model; the restart there did "
                "not load them."
            )
        return (
            f"The loss jumps {rise} {where} and stays up: training diverged, or restarted without "
            "its weights."
        )


@dataclass(frozen=True)
class RunCurve:
    """The curve is a run's training loss, restarts joined: `tokens` increases."""

    path: Path
    tokens: np.ndarray  # (n,) float64
    loss: np.ndarray  # (n,) float64, nats per token
    rates: np.ndarray  # (n,) float64, learning rates; 0 if not known
    jumps: tuple[Jump, ...] = ()
    """where the run went back to about an untrained model"""
    start: float = 0.0
    """tokens logged before the model that is being trained now was new"""
    final_rate: float | None = None
    """share of its peak that the learning rate is to end at; None where nobody says"""

    @property
    def trained(self) -> np.ndarray:
        """The tokens are those that the model of today was trained on, at its readings."""
        return self.tokens[self.tokens > self.start] - self.start

    @property
    def trained_loss(self) -> np.ndarray:
        """The losses are those of `trained`."""
        return self.loss[self.tokens > self.start]

    @property
    def warmup_tokens(self) -> float:
        """The learning rate first stopped rising after so many tokens of `trained`."""
        rates = self.rates[self.tokens > self.start]
        settled = np.flatnonzero(np.diff(rates) <= 0)
        warmed = int(settled[0]) if len(settled) else len(rates) - 1
        return float(self.trained[warmed]) if warmed else 0.0

    @property
    def rate_left(self) -> float:
        """The learning rate may still lose this share of its peak, or will, where that is known."""
        rates = self.rates[self.tokens > self.start]
        if not rates.max() > 0:
            return 0.0
        left = float(rates[-1] / rates.max())
        if self.final_rate is not None:
            return max(0.0, left - self.final_rate)
        return left if rates[-1] < rates[len(rates) // 2] else 0.0


class Reading(NamedTuple):
    """The reading is one line; `before` is the loss on the lines above, NaN on the first."""

    step: float
    tokens: float
    loss: float
    rate: float
    before: float = math.nan


def read_run(path: Path, untrained_loss: float = UNTRAINED_LOSS) -> RunCurve:
    """It reads JSON lines or a CSV with step, tokens or tokens_total, loss, lr or learning_rate.

    A run that went back to a checkpoint logs the same tokens twice: the later reading is kept. A
    step counter that starts again while tokens go on is harmless, the curve is drawn over tokens;
    a token counter that starts again while steps go on is continued from where it stood. Lines
    without a finite loss are passed over, and so is a last line that is still being written. Where
    the run's configuration lies beside its log, the end of its schedule is known.

    Raises:
        UserError: no such file, another format, a line that cannot be read, no points.
    """
    return join_readings(path, _readings(path), untrained_loss)


def join_readings(
    path: Path, readings: Iterable[Reading], untrained_loss: float = UNTRAINED_LOSS
) -> RunCurve:
    """The function makes a curve of a log's readings, in the order of the file at `path`.

    Raises:
        UserError: there are none.
    """
    kept = _joined(readings)
    if not kept:
        raise UserError(f"--metrics {path} is empty: no line has tokens and a finite loss")
    starts = [i for i in range(len(kept)) if _is_jump(kept, i, untrained_loss)]
    # The readings after a jump stand as far above those before it: they are the same jump.
    starts = [i for n, i in enumerate(starts) if not n or i - starts[n - 1] > _NEIGHBOURS]
    jumps = tuple(Jump.at(kept[i], untrained_loss) for i in starts)
    first = starts[-1] if starts else 0
    start = kept[first - 1].tokens if first else 0.0
    tokens, losses, rates = np.array([(r.tokens, r.loss, r.rate) for r in kept]).T
    final_rate = _final_rate(path.with_name(CONFIG_FILE))
    return RunCurve(path, tokens, losses, rates, jumps=jumps, start=start, final_rate=final_rate)


def _final_rate(config: Path) -> float | None:
    """The run's own configuration lies beside its log, and says where its learning rate ends."""
    try:
        flags = read_json(config)
        return float(flags["min_lr"]) / float(flags["lr"])
    except (KeyError, OSError, TypeError, UserError, ValueError, ZeroDivisionError):
        return None


def _joined(readings: Iterable[Reading]) -> list[Reading]:
    """The list has no tokens twice, and each reading's `before` from the file's order."""
    kept: list[Reading] = []
    recent: list[float] = []
    last_step, last_logged, offset = -math.inf, 0.0, 0.0
    for reading in readings:
        step, logged = reading.step, reading.tokens
        # Half: a resume with another batch size may log slightly fewer tokens at a later step.
        if logged < last_logged / 2 and step > last_step:
            offset += last_logged
        last_step, last_logged = step, logged
        while kept and kept[-1].tokens >= logged + offset:
            kept.pop()
        before = median(recent) if recent else math.nan
        kept.append(reading._replace(tokens=logged + offset, before=before))
        recent = [*recent[1 - _NEIGHBOURS :], reading.loss]
    return kept


def _is_near(loss: float, untrained_loss: float) -> bool:
    low, high = _NEAR
    return low * untrained_loss <= loss <= high * untrained_loss


def _is_jump(kept: Sequence[Reading], i: int, untrained_loss: float) -> bool:
    """The function tells a loss that is back near an untrained model's from a spike.

    A spike is over in a few readings; a new model needs many to come down, and stays an eighth of
    the way up for longer.
    """
    fallen = untrained_loss - kept[i].before
    if not (fallen > 1.0 and kept[i].loss > kept[i].before + fallen / 2):
        return False
    following = [reading.loss for reading in kept[i + 1 : i + 1 + _NEIGHBOURS]]
    if not following:
        return _is_near(kept[i].loss, untrained_loss)
    return median(following) > kept[i].before + fallen / 8


def _readings(path: Path) -> Iterator[Reading]:
    """Lines with a finite loss give step, tokens, loss and learning rate (0 if unknown)."""
    formats = {
        ".jsonl": (_json_records, ("tokens", "tokens_total")),
        ".csv": (_csv_records, ("tokens_total", "tokens")),
    }
    if path.suffix not in formats:
        raise UserError(f"--metrics {path} is neither .jsonl nor .csv")
    refuse_pipe(path, f"--metrics {path}")
    records, names = formats[path.suffix]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"--metrics {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--metrics {path} is not text") from None
    for number, record in records(path, lines):
        if record.get("loss") in (None, ""):
            continue
        tokens = _either(record, names)
        try:
            row = [float(record[name]) for name in ("step", tokens, "loss")]
            row.append(float(record.get(_either(record, _RATES)) or 0.0))
        except KeyError as error:
            raise UserError(f"--metrics {path} line {number} has no field {error}") from None
        except (OverflowError, TypeError, ValueError):
            raise UserError(
                f"--metrics {path} line {number}: step, {tokens}, loss and lr must be numbers"
            ) from None
        if all(map(math.isfinite, row)) and row[1] > 0:
            yield Reading(*row)


def _either(record: Mapping[str, object], names: Sequence[str]) -> str:
    """The name is the first of `names` that the record has, or else the first."""
    return next((name for name in names if name in record), names[0])


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
    columns = set(reader.fieldnames or ())
    wanted = {"step", "loss", "tokens_total"} - ({"tokens_total"} if "tokens" in columns else set())
    if missing := wanted - columns:
        raise UserError(f"--metrics {path} line 1 has no column {', '.join(sorted(missing))}")
    for record in reader:
        if None in record.values():
            raise UserError(f"--metrics {path} line {reader.line_num} has too few columns")
        yield reader.line_num, record
