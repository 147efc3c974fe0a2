"""Vitrail trains, evaluates and uses Vision Transformers on your own images.

Names are imported when they are first used: `import vitrail` takes milliseconds, not the seconds that PyTorch needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vitrail.api import train
    from vitrail.config import RunConfig
    from vitrail.evaluation.classifier import Classifier, Prediction, load
    from vitrail.models.config import ViTConfig
    from vitrail.models.vit import ViT

# Public name → the module that it is imported from.
_MODULES = {
    "ViT": "vitrail.models.vit",
    "ViTConfig": "vitrail.models.config",
    "RunConfig": "vitrail.config",
    "Classifier": "vitrail.evaluation.classifier",
    "Prediction": "vitrail.evaluation.classifier",
    "load": "vitrail.evaluation.classifier",
    "train": "vitrail.api",
}

__all__ = ["Classifier", "Prediction", "RunConfig", "ViT", "ViTConfig", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
