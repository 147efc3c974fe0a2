"""A model's outputs on a split, saved with the run: thresholds, comparisons and label checks are functions of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from vitrail.evaluation.predict_logits import Outputs
from vitrail.tensor_files import load_tensors, save_tensors


def save_outputs(path: Path, outputs: Outputs, paths: Sequence[str], *, split: str, fingerprint: str) -> None:
    """Write `outputs/SPLIT.safetensors` of a run, atomically: `logits`, `targets` and `indices`, a row an image.

    Args:
        paths: of all images of the dataset; those of the rows are hashed into the file's text.
        fingerprint: of the split.

    Raises:
        OSError: the file could not be written.
    """
    path.parent.mkdir(exist_ok=True)
    tensors = {name: torch.from_numpy(values) for name, values in vars(outputs).items()}
    text = {"split": split, "fingerprint": fingerprint, "paths": hash_of_paths(outputs, paths)}
    save_tensors(path, tensors, text)


def load_outputs(path: Path, paths: Sequence[str] | None = None) -> Outputs:
    """Read what `save_outputs` wrote.

    Args:
        paths: of all images of the dataset that the outputs should be of; None: they are not compared.

    Raises:
        ValueError: the file is missing or broken, or is of other images.
    """
    tensors, text = load_tensors(path)
    try:
        outputs = Outputs(*(tensors[name].numpy() for name in ("logits", "targets", "indices")))
    except KeyError as error:
        raise ValueError(f"{path}: holds no outputs of a model ({error} is missing)") from None
    if paths is not None and hash_of_paths(outputs, paths) != text.get("paths"):
        raise ValueError(f"{path}: is of other images; the dataset has changed since, or is another one")
    return outputs


def hash_of_paths(outputs: Outputs, paths: Sequence[str]) -> str:
    """Return a hash of the paths of the images that outputs are of, in their order."""
    lines = "".join(f"{paths[int(index)]}\n" for index in outputs.indices if index < len(paths))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:32]
