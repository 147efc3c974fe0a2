"""Frozen dataclasses as configuration: help texts, reading and writing JSON, dotted overrides, checks of values.

Every configuration class of Vitrail is a frozen dataclass whose fields carry their help text. This file is the only
one that walks such trees. It imports nothing heavy: `vitrail --help` runs through it.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vitrail.lookup import unknown

T = TypeVar("T")


def setting(default: T, help: str) -> T:
    """Declare a dataclass field with its default and the text that `--help` shows."""
    return dataclasses.field(default=default, metadata={"help": help})


def section(kind: type[T], help: str) -> T:
    """Declare a dataclass field that holds another configuration class, and its help text."""
    return dataclasses.field(default_factory=kind, metadata={"help": help})


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries and lists, ready for JSON."""
    out = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def from_dict(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a configuration from dictionaries as `to_dict` makes them.

    Args:
        where: dotted name of `values` in the whole tree, for messages; empty for the whole.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type or is refused by its class.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'the configuration'}: expected a mapping of settings, got {values!r}")
    kinds = field_types(kind)
    built = {}
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(unknown("setting", join(where, key), [join(where, name) for name in kinds]))
        if dataclasses.is_dataclass(kinds[key]):
            built[key] = from_dict(typing.cast(type, kinds[key]), value, join(where, key))
        else:
            built[key] = to_type(kinds[key], value, join(where, key))
    return kind(**built)


def override(config: T, changes: Mapping[str, Any]) -> T:
    """Return a configuration with dotted settings such as `{"optim.lr": 1e-3}` replaced, all checked at once.

    Raises:
        ValueError: a setting is unknown, has the wrong type, or the combination is refused.
    """
    tree = to_dict(config)
    known = dict(all_settings(type(config)))
    for name, value in changes.items():
        if name not in known:
            raise ValueError(unknown("setting", name, known))
        branch = tree
        *parents, last = name.split(".")
        for parent in parents:
            branch = branch[parent]
        branch[last] = value
    return from_dict(type(config), tree)


def all_settings(kind: Any, where: str = "") -> Iterator[tuple[str, tuple[Any, dataclasses.Field[Any]]]]:
    """Yield `(dotted name, (type, field))` of every setting of a configuration class, nested ones included."""
    kinds = field_types(kind)
    for field in dataclasses.fields(kind):
        name = join(where, field.name)
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from all_settings(kinds[field.name], name)
        else:
            yield name, (kinds[field.name], field)


def leaves(config: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted name, value)` of every setting of a configuration, nested ones included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, join(where, field.name))
        else:
            yield join(where, field.name), value


def field_types(kind: Any) -> dict[str, Any]:
    """Return the resolved type of every field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def to_type(kind: Any, value: Any, name: str) -> Any:
    """Return `value` as the type `kind`, a scalar or a tuple of scalars; only an int where a float is due is converted."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return to_type(next(arg for arg in args if arg is not type(None)), value, name)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}: expected a list of {args[0].__name__}, got {value!r}")
        return tuple(to_type(args[0], entry, name) for entry in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: expected {kind.__name__}, got {value!r} ({type(value).__name__})")
    return value


def join(where: str, name: str) -> str:
    """Return the dotted name of a setting inside `where`; `where` may be empty."""
    return f"{where}.{name}" if where else name


def write_config_json(config: Any, path: Path) -> None:
    """Write a configuration as JSON that `read_json` reads back equal."""
    from vitrail.files import write_text  # a tenth of the time of `vitrail --help`

    write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def read_config_json(kind: type[T], path: Path) -> T:
    """Read a configuration of class `kind` that `write_json` wrote.

    Raises:
        ValueError: the file is no JSON, or has an unknown setting or a refused value.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a JSON configuration ({error})") from None
    try:
        return from_dict(kind, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise a ValueError that suggests the nearest known value, unless `value` is known."""
    if value not in known:
        raise ValueError(unknown(name, value, known))


def seed_range(name: str, value: int) -> None:
    """Raise a ValueError unless `value` fits the random generators."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} is {value}; expected 0 to {2**32 - 1}")


def at_least(name: str, value: float, least: float) -> None:
    """Raise a ValueError unless `value` is `least` or more."""
    if not value >= least:  # not `value < least`: NaN is refused too
        raise ValueError(f"{name} is {value}; expected {least} or more")


def between(name: str, value: float, least: float, most: float, unit: str = "") -> None:
    """Raise a ValueError unless `value` lies between `least` and `most`, both included."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; expected {least} to {most} {unit}".rstrip())


def positive(name: str, value: float) -> None:
    """Raise a ValueError when `value` is 0 or less."""
    if value <= 0:
        raise ValueError(f"{name} is {value}; expected above 0")


def below_one(name: str, value: float) -> None:
    """Raise a ValueError unless `value` is 0 or more, and less than 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; expected from 0 up to, not including, 1")


def one_at_most(name: str, value: float, note: str = "") -> None:
    """Raise a ValueError unless `value` is above 0, and 1 or less; `note` says what a special value means."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; expected above 0, at most 1 {note}".rstrip())
