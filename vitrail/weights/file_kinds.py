"""Tell what kind of model a folder or a file holds, without reading its weights."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz")  # of weights files
# Of a folder, in the order of preference; an index names the shards.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_transformers_folder(path: Path) -> bool:
    """Whether a path is a folder with a model of transformers, and not a run."""
    if not (path / "config.json").is_file() or (path / "run.json").exists():
        return False
    try:
        settings = json.loads((path / "config.json").read_bytes())
    except ValueError:
        return True
    return isinstance(settings, dict) and "model_type" in settings


def is_state_dict_file(path: Path) -> bool:
    """Whether a file holds weights alone: it is of another kind than a model file, or has no header of Vitrail's."""
    if not path.is_file() or path.suffix != ".safetensors":
        return path.is_file() and path.suffix in SUFFIXES
    try:
        with safe_open(path, framework="pt") as file:
            return "vitrail" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False  # broken: the reader of model files says how


def is_timm_folder(path: Path) -> bool:
    """Whether timm wrote a folder: its `config.json` names an architecture of timm's."""
    try:
        content = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("architecture"), str)


def weights_file(names: set[str]) -> str:
    """Return the name of the file that holds a folder's weights: the first of `WEIGHTS` that is among `names`.

    Raises:
        ValueError: there is none.
    """
    found = [name for name in WEIGHTS if name in names]
    if not found:
        raise ValueError(f"has no weights; expected one of {', '.join(WEIGHTS)}")
    return found[0]
