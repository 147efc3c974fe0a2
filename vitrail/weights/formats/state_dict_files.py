"""Read the tensors of weights files: safetensors, NumPy and PyTorch, without running code in a pickle."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitrail.lookup import first_line, shorten
from vitrail.tensor_files import load_pickle, load_tensors
from vitrail.weights.file_kinds import SUFFIXES

# Keys under which trainings save the weights of their model, best first: averaged weights are those that were published.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "net", "params")
_NESTING_LIMIT = 8  # a pickle may hold itself
# What wrappers around a model put before all of its names.
PREFIXES = ("module.", "_orig_mod.", "backbone.")


class StateDict(NamedTuple):
    """The tensors of a file that says nothing else of its model.

    Attributes:
        tensors: the weights by name.
        containers: keys of the mappings that held them, outermost first, such as `teacher`.
        notes: what else the file holds.
    """

    tensors: dict[str, Tensor]
    containers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_state_dict(path: Path) -> StateDict:
    """Return the state dict of a weights file; code in a pickle is never run.

    Raises:
        ValueError: there is no such file, it is broken or of an unknown kind, or holds no tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of weights file; expected one of {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        return _without_prefixes(load_tensors(path)[0], (), ())
    if path.suffix == ".npz":
        return StateDict(_read_numpy(path))
    return _unwrapped(load_pickle(path), path)


def _read_numpy(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: _to_tensor(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path}: not a whole .npz file of plain arrays ({first_line(error)})") from None


def _to_tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor; JAX's bfloat16, which NumPy saves as two raw bytes, becomes fp32."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def _unwrapped(content: Any, path: Path) -> StateDict:
    """Return the state dict inside its containers."""
    containers: list[str] = []
    notes: list[str] = []
    while isinstance(content, Mapping) and len(containers) < _NESTING_LIMIT:
        beside = [str(name) for name, value in content.items() if isinstance(value, Tensor)]
        # Beside tensors, only containers that hold tensors count: a step count may stand next to a state dict.
        inside = [
            name
            for name in CONTAINERS
            if isinstance(content.get(name), Mapping) and (not beside or _holds_tensors(content[name]))
        ]
        if not inside:
            break
        if len(inside) > 1:
            notes.append(f"weights are those of {inside[0]!r}; the file also holds {', '.join(inside[1:])}")
        if beside:
            notes.append(f"weights are those of {inside[0]!r}; tensors beside it are left out: {shorten(beside)}")
        containers.append(inside[0])
        content = content[inside[0]]
    if not _holds_tensors(content):
        keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path}: no state dict found in it, only {keys}; expected tensors by name, or one of {', '.join(CONTAINERS)}"
        )
    if nested := [str(name) for name, value in content.items() if _holds_tensors(value)]:
        notes.append(f"left out beside the weights: {shorten(nested)}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return _without_prefixes(tensors, tuple(containers), tuple(notes))


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values())


def _without_prefixes(tensors: dict[str, Tensor], containers: tuple[str, ...], notes: tuple[str, ...]) -> StateDict:
    """Return a state dict without the prefixes of wrappers, unless two weights would then have one name."""
    for prefix in PREFIXES:
        plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        tensors = plain if len(plain) == len(tensors) else tensors
    return StateDict(tensors, containers, notes)
