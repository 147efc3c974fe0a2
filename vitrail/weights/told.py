"""What was said of a bare weights file, sorted by what it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitrail.data.preprocess import Preprocess
from vitrail.lookup import unknown
from vitrail.models.config import ViTConfig
from vitrail.settings import field_types, to_type

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
class Told:
    """What was said of a file.

    Attributes:
        model: fields of `ViTConfig`.
        preprocess: fields of `Preprocess`.
        labels: class names in the order of the logits; empty: not said.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def sort_described(described: Mapping[str, Any] | None) -> Told:
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
    return Told(
        {key: value for key, value in typed.items() if key in MODEL_KEYS},
        {key: value for key, value in typed.items() if key in PREPROCESS_KEYS},
        labels,
    )
