"""The files of a transformers folder: JSON, and weights whole or in shards."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.weights.files import refused_by
from vitrail.weights.store import load_tensors

# In the order of preference; an index names the shards.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


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


def weights_file(names: set[str]) -> str:
    """Return which of a folder's files holds its weights: the first of `WEIGHTS` that is there.

    Raises:
        ValueError: there is none.
    """
    found = [name for name in WEIGHTS if name in names]
    if not found:
        raise ValueError(f"has no weights; expected one of {', '.join(WEIGHTS)}")
    return found[0]


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read all weights of a folder as float32, and say what they were.

    Raises:
        ValueError: a file is missing, cut off, holds code, or holds something else than weights.
    """
    name = weights_file({path.name for path in folder.iterdir()})
    parts = [folder / name] if not name.endswith(".index.json") else shards(folder / name)
    tensors: dict[str, Tensor] = {}
    for path in parts:
        tensors |= load_tensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if odd:
        raise ValueError(f"{folder / name}: {odd[0]} is {tensors[odd[0]].dtype}; quantised weights cannot be read")
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"})
    notes = [f"stored as {', '.join(kinds)}, read as float32"] * bool(kinds)
    return {name: tensor.float() for name, tensor in tensors.items()}, notes


def shards(index: Path) -> list[Path]:
    """Return the files that an index names.

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
    return [index.parent / name for name in names]


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote; code in it is never executed.

    Raises:
        ValueError: it is cut off, or holds anything but tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols; what cannot be read is an error below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than weights, and was not opened, since that could run code ({refused_by(error)}); ask its "
            "author for model.safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a whole file of weights ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: expected names and tensors, as `torch.save(model.state_dict(), …)` writes them")
    return content
