"""What the user says of a model whose file does not: `--describe mean=0.5 resize=squash labels=labels.txt`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrail.config_schema import field_types, from_dict, to_dict, to_type
from vitrail.data.images.preprocess import Preprocess
from vitrail.lookup import unknown
from vitrail.models.config import ViTConfig

_NEEDED = ("mean", "std", "resize", "interpolation")

# What only a training needs cannot be described, nor what is known from the architecture.
_NOT_MODEL = (
    "dropout",
    "attention_dropout",
    "drop_path",
    "patch_dropout",
    "init",
    "patch_sizes",
    "attention",
    "window",
)
_NOT_PREPROCESS = ("image_size", "channels", "multiple")
MODEL_KEYS = {name: kind for name, kind in field_types(ViTConfig).items() if name not in _NOT_MODEL}
PREPROCESS_KEYS = {name: kind for name, kind in field_types(Preprocess).items() if name not in _NOT_PREPROCESS}


@dataclass(frozen=True)
class UserSpec:
    """What was said of a file.

    Attributes:
        model: fields of `ViTConfig`.
        preprocess: fields of `Preprocess`.
        labels: class names in the order of the logits; empty: not said.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def sort_described(described: Mapping[str, Any] | None) -> UserSpec:
    """Return a description by what it is of.

    Raises:
        ValueError: a key is unknown, or its value is not of its kind.
    """
    given = dict(described or {})
    labels = tuple(str(label) for label in given.pop("labels", ()))
    for key in ("mean", "std"):
        if isinstance(given.get(key), (int, float)):
            given[key] = [float(given[key])]
    if strange := [key for key in given if key not in MODEL_KEYS and key not in PREPROCESS_KEYS]:
        raise ValueError(unknown("--describe key", strange[0], [*MODEL_KEYS, *PREPROCESS_KEYS, "labels"]))
    kinds = {**MODEL_KEYS, **PREPROCESS_KEYS}
    typed = {key: to_type(kinds[key], value, f"--describe {key}") for key, value in given.items()}
    return UserSpec(
        {key: value for key, value in typed.items() if key in MODEL_KEYS},
        {key: value for key, value in typed.items() if key in PREPROCESS_KEYS},
        labels,
    )


def parse_described(words: Sequence[str]) -> dict[str, Any]:
    """Return `KEY=VALUE` words as a mapping with values of the right types.

    Keys are the fields of `ViTConfig` and `Preprocess`, and `labels`: a file with one label a line, or labels with
    commas between.

    Raises:
        ValueError: a key is unknown or stands twice, or its value has the wrong type.
    """
    kinds = {**field_types(Preprocess), **field_types(ViTConfig)}
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--describe {word}: expected KEY=VALUE, such as mean=0.5")
        if key not in (*kinds, "labels"):
            raise ValueError(f"--describe {word}: {unknown('key', key, (*kinds, 'labels'))}")
        if key in found:
            raise ValueError(f"--describe {key} is given twice: {found[key]!r} and {value!r}")
        found[key] = read_labels(value) if key == "labels" else _value(kinds[key], value, key)
    return found


def read_labels(value: str) -> tuple[str, ...]:
    """Return the labels of a file, one a line, or those of a text, with commas between.

    Raises:
        ValueError: there is no such file, or a label is empty.
    """
    path = Path(value)
    if path.is_file():
        labels = tuple(line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines())
    elif "," not in value and ("/" in value or path.suffix):
        raise ValueError(f"--describe labels={value}: no such file; expected one label a line")
    else:
        labels = tuple(label.strip() for label in value.split(","))
    if not all(labels):
        raise ValueError(f"--describe labels={value}: a label is empty")
    return labels


def split_described(
    described: Mapping[str, Any], why_no_architecture: str
) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
    """Return the labels and the fields of preprocessing of a description; for models that tell their architecture.

    Raises:
        ValueError: it describes the architecture too, or something unknown.
    """
    names = [field.name for field in dataclasses.fields(Preprocess)]
    others = [key for key in described if key not in (*names, "labels")]
    architecture = [key for key in others if key in field_types(ViTConfig)]
    if architecture:
        raise ValueError(f"{why_no_architecture}; {', '.join(architecture)} cannot be described as well")
    if others:
        raise ValueError(unknown("description", others[0], (*names, "labels")))
    labels = described.get("labels")
    fields = {key: value for key, value in described.items() if key != "labels"}
    return None if labels is None else tuple(map(str, labels)), fields


def described_preprocess(described: Mapping[str, Any], known: Preprocess | None = None, **own: Any) -> Preprocess:
    """Return the preprocessing that a description means: all of it, or changes of a known one.

    Args:
        own: what the model says: `image_size`, `channels`.

    Raises:
        ValueError: something needed is not described, or a value has the wrong type.
    """
    missing = [key for key in _NEEDED if key not in described] if known is None else []
    if "crop" in described.get("resize", "") and "crop_fraction" not in described and known is None:
        missing.append("crop_fraction")
    if missing:
        raise ValueError(f"its preprocessing is not known whole: describe {', '.join(missing)} too")
    fields = {**own, **(to_dict(known) if known else {}), **described}
    for key in ("mean", "std"):
        values = fields[key] if isinstance(fields[key], (list, tuple)) else [fields[key]]
        fields[key] = [float(value) for value in values] * (fields["channels"] if len(values) == 1 else 1)
    return from_dict(Preprocess, fields, "describe")


def _value(kind: Any, text: str, key: str) -> Any:
    """Return a text as a value of a field's type."""
    if typing.get_origin(kind) is tuple:
        return tuple(_value(typing.get_args(kind)[0], each, key) for each in text.split(","))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--describe {key}={text}: expected true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--describe {key}={text}: expected {kind.__name__}") from None
