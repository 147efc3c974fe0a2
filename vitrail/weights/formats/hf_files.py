"""Read the files of a transformers folder: JSON, and weights in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.lookup import shorten
from vitrail.tensor_files import load_pickle, load_tensors
from vitrail.weights.file_kinds import weights_file


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file.

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
    """Return all weights of a folder as float32, and a note where they were stored in another number format.

    Raises:
        ValueError: a file is missing, cut off, holds code or something else than weights, or shards are not as their index says.
    """
    name = weights_file({path.name for path in folder.iterdir()})
    shard_of = read_shard_index(folder / name) if name.endswith(".index.json") else {}
    shards = sorted(set(shard_of.values())) or [folder / name]
    tensors: dict[str, Tensor] = {}
    for path in shards:
        in_shard = load_tensors(path)[0] if path.suffix == ".safetensors" else _load_pickled_weights(path)
        if twice := sorted(set(tensors) & set(in_shard)):
            raise ValueError(
                f"{path}: holds {shorten(twice)}, which another shard holds as well; which counts is not known"
            )
        if missing := [weight for weight, shard in shard_of.items() if shard == path and weight not in in_shard]:
            raise ValueError(f"{path}: has no {shorten(missing)}, which {name} says it holds")
        tensors |= in_shard
    quantised = [weight for weight, tensor in tensors.items() if not tensor.is_floating_point()]
    if quantised:
        dtype = tensors[quantised[0]].dtype
        raise ValueError(f"{folder / name}: {quantised[0]} is {dtype}; quantised weights cannot be read")
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"})
    notes = [f"stored as {', '.join(dtypes)}, read as float32"] * bool(dtypes)
    return {name: tensor.float() for name, tensor in tensors.items()}, notes


def read_shard_index(index: Path) -> dict[str, Path]:
    """Return the file of each weight, as an index of shards says.

    Raises:
        ValueError: the index names no file, one that is missing, or one outside its folder.
    """
    weight_map = read_json_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"{index}: has no weight_map of shards")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name or not name.endswith((".safetensors", ".bin"))]:
        raise ValueError(f"{index}: names {outside[0]!r}; expected weights beside it")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    return {weight: index.parent / name for weight, name in weight_map.items()}


def _load_pickled_weights(path: Path) -> dict[str, Tensor]:
    """Return a state dict that `torch.save` wrote.

    Raises:
        ValueError: the file is broken, or holds anything but tensors.
    """
    content = load_pickle(path)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ValueError(f"{path}: expected names and tensors, as `torch.save(model.state_dict(), …)` writes them")
    return content
