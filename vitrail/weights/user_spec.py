"""The user's description of a model whose file lacks it: `--describe mean=0.5 resize=squash labels=labels.txt`."""

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

# Not to be described: fields that only training uses, and fields that follow from the architecture.
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
    """A user's description of a model, sorted by what it describes.

    Attributes:
        model: fields of `ViTConfig`.
        preprocess: fields of `Preprocess`.
        labels: class names in the order of the logits; empty: not given.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def to_user_spec(description: Mapping[str, Any] | None) -> UserSpec:
    """Return a description as a `UserSpec`, its values checked.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type.
    """
    given = dict(description or {})
    labels = tuple(str(label) for label in given.pop("labels", ()))
    for key in ("mean", "std"):
        if isinstance(given.get(key), (int, float)):
            given[key] = [float(given[key])]
    if unknown_keys := [key for key in given if key not in MODEL_KEYS and key not in PREPROCESS_KEYS]:
        raise ValueError(unknown("--describe key", unknown_keys[0], [*MODEL_KEYS, *PREPROCESS_KEYS, "labels"]))
    kinds = {**MODEL_KEYS, **PREPROCESS_KEYS}
    typed = {key: to_type(kinds[key], value, f"--describe {key}") for key, value in given.items()}
    return UserSpec(
        {key: value for key, value in typed.items() if key in MODEL_KEYS},
        {key: value for key, value in typed.items() if key in PREPROCESS_KEYS},
        labels,
    )


def parse_description(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the `KEY=VALUE` arguments of `--describe` as a mapping, with values of the right types.

    Keys are the fields of `ViTConfig` and `Preprocess`, and `labels`: a file with one label a line, or labels with
    commas between.

    Raises:
        ValueError: a key is unknown or stands twice, or its value has the wrong type.
    """
    kinds = {**field_types(Preprocess), **field_types(ViTConfig)}
    description: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"--describe {argument}: expected KEY=VALUE, such as mean=0.5")
        if key not in (*kinds, "labels"):
            raise ValueError(f"--describe {argument}: {unknown('key', key, (*kinds, 'labels'))}")
        if key in description:
            raise ValueError(f"--describe {key} is given twice: {description[key]!r} and {value!r}")
        description[key] = read_labels(value) if key == "labels" else _to_value(kinds[key], value, key)
    return description


def read_labels(value: str) -> tuple[str, ...]:
    """Return labels from a file, one a line, or from a text, with commas between.

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


def split_description(
    description: Mapping[str, Any], why_no_architecture: str
) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
    """Return the labels and the preprocessing fields of a description, for models that bring their architecture.

    Args:
        why_no_architecture: beginning of the error where the description has a field of the architecture.

    Raises:
        ValueError: the description has a field of the architecture, or an unknown key.
    """
    names = [field.name for field in dataclasses.fields(Preprocess)]
    others = [key for key in description if key not in (*names, "labels")]
    architecture = [key for key in others if key in field_types(ViTConfig)]
    if architecture:
        raise ValueError(f"{why_no_architecture}; {', '.join(architecture)} cannot be described as well")
    if others:
        raise ValueError(unknown("description", others[0], (*names, "labels")))
    labels = description.get("labels")
    fields = {key: value for key, value in description.items() if key != "labels"}
    return None if labels is None else tuple(map(str, labels)), fields


def preprocess_from_description(
    description: Mapping[str, Any], known: Preprocess | None = None, **own: Any
) -> Preprocess:
    """Return the preprocessing of a description, or a known preprocessing with the description's changes.

    Args:
        own: fields that the model brings: `image_size`, `channels`.

    Raises:
        ValueError: a needed field is not described, or a value has the wrong type.
    """
    missing = [key for key in _NEEDED if key not in description] if known is None else []
    if "crop" in description.get("resize", "") and "crop_fraction" not in description and known is None:
        missing.append("crop_fraction")
    if missing:
        raise ValueError(f"its preprocessing is known only in part: describe {', '.join(missing)} too")
    fields = {**own, **(to_dict(known) if known else {}), **description}
    for key in ("mean", "std"):
        values = fields[key] if isinstance(fields[key], (list, tuple)) else [fields[key]]
        fields[key] = [float(value) for value in values] * (fields["channels"] if len(values) == 1 else 1)
    return from_dict(Preprocess, fields, "describe")


def _to_value(kind: Any, text: str, key: str) -> Any:
    """Return a text as a value of a field's type.

    Raises:
        ValueError: the text is no such value.
    """
    if typing.get_origin(kind) is tuple:
        return tuple(_to_value(typing.get_args(kind)[0], item, key) for item in text.split(","))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--describe {key}={text}: expected true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"--describe {key}={text}: expected {kind.__name__}") from None
