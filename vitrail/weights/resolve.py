"""What a model spec means: a run folder, a model file, a variant, a foreign folder or file, a hub's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitrail.weights.file_kinds import is_bare, is_timm_folder, is_transformers_folder
from vitrail.weights.imported_model import ImportedModel, LoadReport
from vitrail.weights.model_file import read_model


def _hf(rest: str, described: Mapping[str, Any]) -> ImportedModel:
    from vitrail.weights.formats.hf import open_hf

    return open_hf(rest, described)


def _timm(rest: str, described: Mapping[str, Any]) -> ImportedModel:
    from vitrail.weights.formats.timm import open_timm

    return open_timm(rest, described)


def _torchvision(rest: str, described: Mapping[str, Any]) -> ImportedModel:
    from vitrail.weights.formats.torchvision import open_torchvision

    return open_torchvision(rest, described)


# Hub or library → the function that reads what stands behind its colon.
HUBS: dict[str, Callable[[str, Mapping[str, Any]], ImportedModel]] = {
    "hf": _hf,
    "timm": _timm,
    "torchvision": _torchvision,
}


def open_weights(word: str | os.PathLike[str], described: Mapping[str, Any] | None = None) -> ImportedModel:
    """Read the model that a word means.

    Args:
        word: a run's folder, a model file, a foreign folder or weights file, or `hf:…`, `timm:…`, `torchvision:…`.
        described: what a bare weights file does not say of itself: fields of `ViTConfig` and `Preprocess`, and `labels`.

    Raises:
        ValueError: there is no such model, its file is broken, or it cannot be expressed here; the message says which.
    """
    name = os.fspath(word)
    hub, colon, rest = name.partition(":")
    if colon and hub in HUBS and not Path(name).exists():
        if not rest:
            raise ValueError(f"{name} needs a name{' or a folder' if hub != 'torchvision' else ''} behind it")
        return HUBS[hub](rest, described or {})
    if not Path(name).exists():
        raise ValueError(f"{name}: no such run folder or model file")
    if is_transformers_folder(Path(name)):
        return HUBS["hf"](name, described or {})
    if Path(name).is_dir() and is_timm_folder(Path(name)):
        return _timm(name, described or {})
    if is_bare(Path(name)):
        from vitrail.weights.formats.state_dict import open_state_dict

        return open_state_dict(name, described)
    path = model_file_of(name)
    if described:
        raise ValueError(f"{name}: a model file says all of itself; {', '.join(described)} cannot be given with it")
    weights, header = read_model(path)
    return ImportedModel(header, weights, LoadReport(name, loaded=len(weights)))


def model_file_of(name: str) -> Path:
    """Return the model file that a run folder's or a model file's name means.

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
