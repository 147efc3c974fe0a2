"""The model file: one `model.safetensors` whose header is enough to load, predict, export and serve."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitrail
from vitrail.config_schema import from_dict, to_dict
from vitrail.data.images.preprocess import Preprocess
from vitrail.lookup import shorten
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.tensor_files import load_tensors, save_tensors

FORMAT = 2  # 2: decoder concat pools before its linear layer, in 1 it pooled after it


@dataclass(frozen=True)
class ModelHeader:
    """The header of a model file: all that is known of a model besides its weights.

    Attributes:
        labels: class names in the order of the logits.
        temperature: divides the logits before the softmax, so that probabilities are calibrated.
        split: fingerprint of the split that it was trained with, and how to make that split again.
        metrics: figures on the split that chose these weights.
    """

    architecture: ViTConfig
    labels: tuple[str, ...]
    preprocess: Preprocess
    temperature: float = 1.0
    split: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def save_model(path: Path, weights: Mapping[str, Tensor], header: ModelHeader) -> None:
    """Write a model file atomically.

    Raises:
        OSError: it could not be written, for instance on a full disk; an earlier file stays as it was.
    """
    content = {
        "format": FORMAT,
        "architecture": to_dict(header.architecture),
        "labels": list(header.labels),
        "preprocess": to_dict(header.preprocess),
        "temperature": header.temperature,
        "split": dict(header.split),
        "metrics": dict(header.metrics),
        "versions": dict(header.versions),
    }
    save_tensors(path, weights, {"vitrail": json.dumps(content)})


def load_model(path: Path) -> tuple[ViT, ModelHeader]:
    """Return the model of a model file, on the CPU and in evaluation mode, and its header.

    Raises:
        ValueError: the file is broken, has no Vitrail header, or its weights do not fit its architecture.
    """
    tensors, header = read_model(path)
    return build_model(header.architecture, tensors, str(path)), header


def read_model(path: Path) -> tuple[dict[str, Tensor], ModelHeader]:
    """Return the weights and the header of a model file.

    Raises:
        ValueError: the file is broken, or has no Vitrail header.
    """
    tensors, metadata = load_tensors(path)
    if "vitrail" not in metadata:
        raise ValueError(f"{path}: has no Vitrail header; expected a model.safetensors that vitrail wrote")
    try:
        content = json.loads(metadata["vitrail"])
        if content["format"] > FORMAT:
            raise ValueError(f"it was written by a newer Vitrail (format {content['format']}, this one reads {FORMAT})")
        header = ModelHeader(
            architecture=from_dict(ViTConfig, content["architecture"], "architecture"),
            labels=tuple(content["labels"]),
            preprocess=from_dict(Preprocess, content["preprocess"], "preprocess"),
            temperature=content["temperature"],
            split=content["split"],
            metrics=content["metrics"],
            versions=content["versions"],
        )
        if content["format"] < 2 and header.architecture.decoder == "concat":
            raise ValueError("decoder 'concat' computed something else when it was written (format 1); train it anew")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: its header cannot be read: {error}") from None
    return tensors, header


def build_model(architecture: ViTConfig, weights: Mapping[str, Tensor], where: str, unknown: Sequence[str] = ()) -> ViT:
    """Return the model of an architecture with its weights, all of them and no others, in evaluation mode on the CPU.

    Args:
        unknown: names in the file, as it spells them, that no rule translates: an error, and listed with the others.

    Raises:
        ValueError: names or shapes differ; both differences are listed.
    """
    # Without storage, for speed; but a CNN of timm may hold constants that stand in no file.
    with torch.device("cpu" if architecture.is_cnn else "meta"):
        model = ViT(architecture)
    load_strictly(model, weights, where, unknown)
    return model.eval()


def load_strictly(model: ViT, tensors: Mapping[str, Tensor], where: str, unknown: Sequence[str] = ()) -> None:
    """Load weights into a model, all of them and no others.

    Raises:
        ValueError: names or shapes differ; both differences are listed.
    """
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted({*(set(tensors) - set(wanted)), *unknown})
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(tensors))
        if wanted[name].shape != tensors[name].shape
    ]
    if missing or unexpected or shapes:
        lines = [f"{where}: its weights do not fit its architecture"]
        differences = (("missing", missing, ", "), ("unexpected", unexpected, ", "), ("shape", shapes, "; "))
        lines += [f"  {what}: {shorten(names, between=between)}" for what, names, between in differences if names]
        raise ValueError("\n".join(lines))
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    assert not any(values.is_meta for values in (*model.parameters(), *model.buffers()))


def versions() -> dict[str, str]:
    """Return the versions of Vitrail and of the libraries on which its numbers depend."""
    names = ("torch", "torchvision", "timm", "numpy", "Pillow", "safetensors")
    found = {name.lower(): importlib.metadata.version(name) for name in names if installed(name)}
    return {"vitrail": vitrail.__version__, **found}


def installed(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
