"""The module parses `--data SPEC[=WEIGHT]`, what the user may write, without touching any data."""

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hamner.errors import UserError


@dataclass(frozen=True)
class Spec:
    """A spec names one source of the mixture.

    Attributes:
        kind: which reader.
        location: path or glob, hub name, or shard folder; empty for the built-in corpus.
        weight: share of the mixture's tokens, relative to the other sources' weights.
        text: what the user wrote, without the weight; for messages.
    """

    kind: Literal["builtin", "files", "hub", "shards"]
    location: str
    weight: float
    text: str


def parse_specs(arguments: Sequence[str], bare_weight: float | None = None) -> list[Spec]:
    """The function parses the values of all `--data` flags; without any, the built-in corpus.

    Args:
        bare_weight: of specs without a weight where others have one; None refuses them.

    Raises:
        UserError: a malformed spec or weight, or weights on some specs only.
    """
    split = [_split_weight(argument) for argument in arguments] or [("builtin", None)]
    given = [text for text, weight in split if weight is not None]
    if bare_weight is None and given and len(given) < len(split):
        bare = next(text for text, weight in split if weight is None)
        raise UserError(
            f"--data {bare}: no weight, while {given[0]} has one; give =WEIGHT to all or to none"
        )
    specs = [_parse(text, weight or bare_weight or 1.0) for text, weight in split]
    for spec in specs:
        if sum(other.text == spec.text for other in specs) > 1:
            raise UserError(f"--data {spec.text}: given twice; give it once with a larger =WEIGHT")
    return specs


def _split_weight(argument: str) -> tuple[str, float | None]:
    text, equals, number = argument.rpartition("=")
    if not equals or _is_there(argument):
        return argument, None
    try:
        weight = float(number)
    except ValueError:
        if "/" in number or glob.has_magic(number):  # of a path such as lang=en/*.txt
            return argument, None
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(
            f"--data {argument}: the weight after the last '=' must be a positive number, "
            f"not '{number}', and no file or folder has the whole as its name"
        )
    if not text:
        raise UserError(f"--data {argument}: there is no SPEC before the weight")
    return text, weight


def _is_there(location: str) -> bool:
    """The function says whether the whole is a path, which may contain "=" as well."""
    # The methods of `Path` raise where a name is too long or a home unknown.
    path = os.path.expanduser(location.removeprefix("shards:"))  # noqa: PTH111
    is_glob = glob.has_magic(path)
    return os.path.lexists(path) or (is_glob and any(glob.iglob(path)))  # noqa: PTH207


def _parse(text: str, weight: float) -> Spec:
    kind, colon, rest = text.partition(":")
    if text == "builtin":
        return Spec("builtin", "", weight, text)
    if colon and kind == "hf":
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[^:]+){0,2}", rest):
            raise UserError(f"--data {text}: must be hf:owner/name[:config[:split]]")
        return Spec("hub", rest, weight, text)
    if colon and kind == "shards":
        return Spec("shards", rest, weight, text)
    if not text.strip():
        raise UserError(
            "--data: empty; give 'builtin', a file, a folder, a glob, hf:... or shards:..."
        )
    return Spec("files", text, weight, text)
