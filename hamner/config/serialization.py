"""Configurations are written to JSON and read back, each value checked against its field's type."""

import contextlib
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from hamner.errors import UserError
from hamner.files import parse_json

Config = TypeVar("Config")


def to_json(config: Any) -> dict[str, Any]:
    """The function gives a dataclass as plain values: parts as objects, paths as strings."""
    return dataclasses.asdict(
        config,
        dict_factory=lambda items: {n: str(v) if isinstance(v, Path) else v for n, v in items},
    )


def read_config(cls: type[Config], path: Path) -> Config:
    """The function reads a run's configuration, an instance of the dataclass `cls`.

    Raises:
        UserError: The file is not readable, or not a configuration of this version.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a run's configuration: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise UserError(f"{path} is not a run's configuration")
    return _build(cls, values, path)


def _build(cls: type[Config], values: dict, path: Path) -> Config:
    """The function makes an instance of `cls`, or raises a UserError naming the unfit field."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{path} has a field this version does not know: {unknown[0]}")
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
        return _build(hint, value, path)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{path}: field {name} has an unfit value {value!r}")
