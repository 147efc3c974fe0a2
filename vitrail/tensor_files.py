"""Files of tensors: safetensors, written atomically and read whole, and what `torch.save` wrote, read without running its code."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitrail.files import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and text as one safetensors file, atomically.

    Raises:
        OSError: the file could not be written; an earlier file stays as it was.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as draft:
        try:
            save_file(ready, draft, {"format": "pt", **metadata})
        except SafetensorError as error:
            needed = sum(tensor.nbytes for tensor in ready.values())
            raise OSError(f"{path}: could not be written ({needed / 1e6:.0f} MB needed): {error}") from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors and the text of a safetensors file.

    Raises:
        ValueError: the file is missing, cut off, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: tensors inside the file's memory are not aligned, which oneDNN computes in another order.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except RuntimeError:
        if path.exists():
            raise
        raise ValueError(
            f"{path}: was removed while it was read"
        ) from None  # it is opened a second time for its tensors
    except (SafetensorError, OSError) as error:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path}: is no model; expected a run folder, a model file (.safetensors), weights (.pth, .pt, .bin, .ckpt, "
                ".npz), a folder of transformers or timm, hf:NAME, timm:NAME or torchvision:NAME"
            ) from None
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def load_pickle(path: Path) -> Any:
    """Return what `torch.save` wrote: tensors, plain values and containers of them; code in the file is never run.

    Raises:
        ValueError: the file is broken, or holds other objects.
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
        refused = _refusal(error)
        if isinstance(error, pickle.UnpicklingError) and re.search("GLOBAL|Unsupported|unrecognized|Can only", refused):
            raise ValueError(
                f"{path}: holds Python objects or code besides tensors, which is never run ({refused}); save its state dict "
                "alone, best as .safetensors"
            ) from None
        raise ValueError(f"{path}: not a whole file of PyTorch weights ({refused})") from None


def _refusal(error: BaseException) -> str:
    """Return the line of PyTorch's long advice that says what it refused, or the first of a short error."""
    lines = [line.strip() for line in str(error).rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()]
    refusal = next((line for line in lines if "GLOBAL" in line), lines[0] if lines else type(error).__name__)
    return refusal.split(" was not")[0][:200]
