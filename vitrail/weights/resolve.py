"""Resolve a model spec, what the user types as MODEL: a run folder, a model file, a foreign folder or file, a hub's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitrail.weights.file_kinds import is_state_dict_file, is_timm_folder, is_transformers_folder
from vitrail.weights.imported_model import ImportedModel, LoadReport
from vitrail.weights.model_file import read_model


def _hf(rest: str, description: Mapping[str, Any]) -> ImportedModel:
    from vitrail.weights.formats.hf import open_hf_model

    return open_hf_model(rest, description)


def _timm(rest: str, description: Mapping[str, Any]) -> ImportedModel:
    from vitrail.weights.formats.timm import open_timm_model

    return open_timm_model(rest, description)


def _torchvision(rest: str, description: Mapping[str, Any]) -> ImportedModel:
    from vitrail.weights.formats.torchvision import open_torchvision_model

    return open_torchvision_model(rest, description)


# What stands before the colon of a model spec → the function that reads what stands after it.
HUBS: dict[str, Callable[[str, Mapping[str, Any]], ImportedModel]] = {
    "hf": _hf,
    "timm": _timm,
    "torchvision": _torchvision,
}


def open_weights(model_spec: str | os.PathLike[str], description: Mapping[str, Any] | None = None) -> ImportedModel:
    """Return the model that a model spec names.

    Args:
        model_spec: a run's folder, a model file, a foreign folder or weights file, or `hf:…`, `timm:…`, `torchvision:…`.
        description: what a weights file does not say of its model: fields of `ViTConfig` and `Preprocess`, and `labels`.

    Raises:
        ValueError: there is no such model, its file is broken, or it cannot be expressed here; the message says which.
    """
    name = os.fspath(model_spec)
    hub, colon, rest = name.partition(":")
    if colon and hub in HUBS and not Path(name).exists():
        if not rest:
            raise ValueError(f"{name} needs a name{' or a folder' if hub != 'torchvision' else ''} after the colon")
        return HUBS[hub](rest, description or {})
    if not Path(name).exists():
        raise ValueError(f"{name}: no such run folder or model file")
    if is_transformers_folder(Path(name)):
        return HUBS["hf"](name, description or {})
    if Path(name).is_dir() and is_timm_folder(Path(name)):
        return _timm(name, description or {})
    if is_state_dict_file(Path(name)):
        from vitrail.weights.formats.state_dict import open_state_dict

        return open_state_dict(name, description)
    path = model_file_of(name)
    if description:
        raise ValueError(f"{name}: a model file says all of itself; {', '.join(description)} cannot be given with it")
    weights, header = read_model(path)
    return ImportedModel(header, weights, LoadReport(name, loaded=len(weights)))


def model_file_of(name: str) -> Path:
    """Return the path of the model file that a run folder holds, or that `name` itself is.

    Raises:
        ValueError: it is a folder without a model.
    """
    path = Path(name)
    if not path.is_dir():
        return path
    if (path / "fold-0").is_dir():
        raise ValueError(f"{name}: holds the runs of a cross-validation; name one of them, such as {path / 'fold-0'}")
    if not (path / "model.safetensors").exists():
        raise ValueError(f"{name}: has no model.safetensors; expected a run that has finished its first epoch")
    return path / "model.safetensors"
