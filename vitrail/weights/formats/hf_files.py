"""The files of a transformers folder: JSON, and weights whole or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.lookup import shorten
from vitrail.tensor_files import load_pickle, load_tensors
from vitrail.weights.file_kinds import weights_file


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing, or is no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object of settings, got {type(content).__name__}")
    return content


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read all weights of a folder as float32, and say what they were.

    Raises:
        ValueError: a file is missing, cut off, holds code or something else than weights, or shards are not as their index says.
    """
    name = weights_file({path.name for path in folder.iterdir()})
    place = shards(folder / name) if name.endswith(".index.json") else {}
    parts = sorted(set(place.values())) or [folder / name]
    tensors: dict[str, Tensor] = {}
    for path in parts:
        found = load_tensors(path)[0] if path.suffix == ".safetensors" else _pickled(path)
        if twice := sorted(set(tensors) & set(found)):
            raise ValueError(
                f"{path}: holds {shorten(twice)}, which another shard holds as well; which counts is not known"
            )
        if gone := [each for each, shard in place.items() if shard == path and each not in found]:
            raise ValueError(f"{path}: has no {shorten(gone)}, which {name} says it holds")
        tensors |= found
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if odd:
        raise ValueError(f"{folder / name}: {odd[0]} is {tensors[odd[0]].dtype}; quantised weights cannot be read")
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"})
    notes = [f"stored as {', '.join(kinds)}, read as float32"] * bool(kinds)
    return {name: tensor.float() for name, tensor in tensors.items()}, notes


def shards(index: Path) -> dict[str, Path]:
    """Return which file holds each weight, as an index says.

    Raises:
        ValueError: it names none, one that is missing, or one outside its folder.
    """
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"{index}: has no weight_map of shards")
    names = sorted(set(named.values()))
    if outside := [name for name in names if Path(name).name != name or not name.endswith((".safetensors", ".bin"))]:
        raise ValueError(f"{index}: names {outside[0]!r}; expected weights beside it")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    return {weight: index.parent / name for weight, name in named.items()}


def _pickled(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote.

    Raises:
        ValueError: it is broken, or holds anything but tensors.
    """
    content = load_pickle(path)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path}: expected names and tensors, as `torch.save(model.state_dict(), …)` writes them")
    return content
