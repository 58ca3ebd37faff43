"""A configuration is read back from JSON, each value checked against its field's type."""

import contextlib
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal

from hamner.errors import UserError


def build(cls: type, values: dict, path: Path) -> Any:
    """The function makes an instance of the dataclass `cls` from what the file at `path` holds.

    Raises:
        UserError: It names the field that is unknown or has an unfit value.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(
            f"{path} has a field this version does not know: {unknown[0]}; if a later version of "
            "Hamner wrote it, install that one"
        )
    converted = {name: _convert(value, hints[name], name, path) for name, value in values.items()}
    try:
        return cls(**converted)
    except TypeError as error:
        raise UserError(f"{path} is not a run's configuration: {error}") from error


def _convert(value: Any, hint: Any, name: str, path: Path) -> Any:
    """The function gives `value` as the type `hint`, or raises a UserError naming the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), name, path)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, args[0], name, path) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, path)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{path}: field {name} has an unfit value {value!r}")
