"""Bare weights files: tensors out of safetensors, NumPy and PyTorch files, without running what a pickle holds."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitrail.lookup import shorten
from vitrail.tensor_files import load_tensors
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
    return _unwrapped(read_pickle(path), path)


def _read_numpy(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: _tensor(file[name]) for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path}: not a whole .npz file of plain arrays ({_first_line(error)})") from None


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor; JAX's bfloat16, which NumPy saves as two raw bytes, comes out as fp32."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)


def read_pickle(path: Path) -> Any:
    """Read what `torch.save` wrote: tensors, plain values and containers of them; code in it is never run.

    Raises:
        ValueError: it is broken, or holds other objects.
    """
    with path.open("rb") as handle:
        start = handle.read(2)
    if not start.startswith((b"PK", b"\x80")):  # a zip, or a pickle before PyTorch 1.6
        raise ValueError(f"{path}: not a whole file of PyTorch weights (it begins with {start!r})")
    try:
        # The settings of a training, which DeiT's, MAE's and DINO's files keep beside the weights; plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of protocols; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any class, depending on where the file is cut or changed
        refused = _refused(error)
        if isinstance(error, pickle.UnpicklingError) and re.search("GLOBAL|Unsupported|unrecognized|Can only", refused):
            raise ValueError(
                f"{path}: holds Python objects or code besides tensors, which is never run ({refused}); save its state dict "
                "alone, best as .safetensors"
            ) from None
        raise ValueError(f"{path}: not a whole file of PyTorch weights ({refused})") from None


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _refused(error: BaseException) -> str:
    """Return the line of PyTorch's long advice that says what it refused, or the first of a short error."""
    lines = [line.strip() for line in str(error).rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()]
    told = next((line for line in lines if "GLOBAL" in line), lines[0] if lines else type(error).__name__)
    return told.split(" was not")[0][:200]
