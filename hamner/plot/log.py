"""A run's metrics.jsonl is read into columns: what a restart repeated is there once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hamner.errors import UserError
from hamner.files import read_records

FIELDS = ("step", "tokens", "seconds", "loss", "val_loss", "lr", "tokens_per_second")
FIELDS += ("peak_vram_gib", "skipped_steps")
MAX_ROUTED = 4_096
"""most records whose routers are kept; of more, evenly spread ones"""


@dataclass(frozen=True)
class RunLog:
    """The log of a run has a row for each record, in the order of its steps.

    As a mapping it gives the column of one of FIELDS, (n,) float64 and NaN where a record has no
    number; `val_loss` is there only where the evaluation was made.
    """

    columns: Mapping[str, np.ndarray]
    spikes: np.ndarray  # (spikes, 2) float64: tokens, loss
    routed: list[tuple[float, dict]]
    """tokens, and the record's `router`"""

    def __getitem__(self, field: str) -> np.ndarray:
        return self.columns[field]

    def has(self, field: str) -> bool:
        """The answer is whether any record has a number in this field."""
        return bool(np.isfinite(self[field]).any())

    def last(self, field: str) -> float | None:
        """The method gives the newest number of a field."""
        values = self[field][np.isfinite(self[field])]
        return float(values[-1]) if len(values) else None


def read_log(path: Path) -> RunLog:
    """The function reads a metrics.jsonl; records that cannot be drawn are passed over.

    A run that went back to a checkpoint may have written steps twice: the later ones count.

    Raises:
        UserError: the file cannot be read, or no record can be drawn.
    """
    rows: list[list[float]] = []
    spikes: list[tuple[float, float, float]] = []
    routed: list[tuple[float, float, dict]] = []
    stride, tokens_at, val_loss_at = 1, FIELDS.index("tokens"), FIELDS.index("val_loss")
    try:
        for record in read_records(path):
            row = [number(record.get(field)) for field in FIELDS]
            if not (math.isfinite(row[0]) and math.isfinite(row[tokens_at])):
                continue
            if record.get("val_step") != record["step"]:
                row[val_loss_at] = math.nan
            for table in (rows, spikes, routed):
                while table and table[-1][0] >= row[0]:
                    table.pop()
            rows.append(row)
            spikes += ((row[0], *point) for point in _spikes(record))
            if len(rows) % stride == 0 and _is_routed(record.get("router")):
                routed.append((row[0], row[tokens_at], record["router"]))
                if len(routed) > MAX_ROUTED:
                    stride, routed = 2 * stride, routed[1::2]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise UserError(f"{path} has no record with a step and tokens")
    columns = dict(zip(FIELDS, np.array(rows).T, strict=True))
    points = np.array([point for _, *point in spikes]).reshape(-1, 2)
    return RunLog(columns, points, [(tokens, router) for _, tokens, router in routed])


def number(value: object) -> float:
    """The function gives a number of a file that anyone may have written, NaN where it is none."""
    is_number = isinstance(value, int | float) and abs(value) < 1e300
    return float(value) if is_number else math.nan


def _spikes(record: dict) -> list[tuple[float, float]]:
    """The list has tokens and loss of a record's spikes."""
    spikes = record.get("spikes")
    if not isinstance(spikes, list):
        return []
    points = [(number(s.get("tokens")), number(s.get("loss"))) for s in spikes if type(s) is dict]
    return [point for point in points if all(map(math.isfinite, point))]


def _is_routed(router: object) -> bool:
    """Routers can be drawn if a record has loads and an entropy for each of their layers."""
    if not isinstance(router, dict):
        return False
    load, entropy = router.get("load"), router.get("entropy")
    return (
        isinstance(load, list)
        and isinstance(entropy, list)
        and 0 < len(load) == len(entropy)
        and all(isinstance(shares, list) and shares for shares in load)
        and all(math.isfinite(number(value)) for values in (*load, entropy) for value in values)
    )
