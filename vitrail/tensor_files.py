"""Safetensors files: named tensors and text, written atomically and read whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitrail.files import replacing


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and text atomically as safetensors.

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
    """Read all tensors and the text of a safetensors file.

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
