"""Bare weights files: tensors out of safetensors, NumPy and PyTorch files, without running what a pickle holds."""

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

# Where a training keeps the weights of its model, best first: averaged weights are the ones that were published.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "net", "params")
_NESTED = 8  # containers in one another; a pickle may hold itself
# What wrapping a model in another puts before all of its names.
PREFIXES = ("module.", "_orig_mod.", "backbone.")


class StateDict(NamedTuple):
    """The tensors of a file that says nothing else of its model.

    Attributes:
        containers: the keys that were opened on the way to them, such as `teacher`.
        notes: what else there was to choose from.
    """

    tensors: dict[str, Tensor]
    containers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_state_dict(path: Path) -> StateDict:
    """Read a weights file; code inside a pickle is not run.

    Raises:
        ValueError: there is no such file, it is broken or of an unknown kind, or holds other things than tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown kind of weights file; expected one of {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        return _stripped(load_tensors(path)[0], (), ())
    if path.suffix == ".npz":
        return StateDict(_read_numpy(path))
    return _unwrapped(load_pickle(path), path)


def _read_numpy(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: _tensor(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path}: not a whole .npz file of plain arrays ({first_line(error)})") from None


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor; JAX's bfloat16, which NumPy saves as two raw bytes, comes out as fp32."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def _unwrapped(content: Any, path: Path) -> StateDict:
    """Open the containers around a state dict."""
    containers: list[str] = []
    notes: list[str] = []
    while isinstance(content, Mapping) and len(containers) < _NESTED:
        beside = [str(name) for name, value in content.items() if isinstance(value, Tensor)]
        # Beside tensors only what holds some itself: a step count may lie next to a state dict.
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
    return _stripped(tensors, tuple(containers), tuple(notes))


def _holds_tensors(content: Any) -> bool:
    return isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values())


def _stripped(tensors: dict[str, Tensor], containers: tuple[str, ...], notes: tuple[str, ...]) -> StateDict:
    """Take away what wrappers put before names; names that lack a prefix others have stay as they are."""
    for prefix in PREFIXES:
        plain = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        tensors = plain if len(plain) == len(tensors) else tensors
    return StateDict(tensors, containers, notes)
