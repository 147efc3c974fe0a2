"""Ten photographs as users have them, and the logits of our and of other libraries' preprocessing for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.testing import assert_close

from vitrail.data.images.decode import read_image
from vitrail.evaluation.classifier import Classifier
from vitrail.weights.imported_model import ImportedModel
from vitrail.weights.model_file import build_model

# name → (sample of scikit-learn, width, height, mode, EXIF orientation)
IMAGES = {
    "plain.jpg": ("china.jpg", 320, 213, "RGB", 1),
    "tiny.png": ("flower.jpg", 19, 31, "RGB", 1),
    "strip.jpg": ("china.jpg", 310, 40, "RGB", 1),
    "grey.jpg": ("china.jpg", 200, 111, "L", 1),
    "palette.png": ("flower.jpg", 120, 64, "P", 1),
    "print.jpg": ("china.jpg", 150, 101, "CMYK", 1),
    "half-turn.jpg": ("china.jpg", 160, 120, "RGB", 3),
    "quarter-turn.jpg": ("china.jpg", 161, 93, "RGB", 6),
    "mirror.jpg": ("flower.jpg", 77, 140, "RGB", 5),
    "square.webp": ("flower.jpg", 64, 64, "RGB", 1),
}


def write_photographs(folder: Path) -> list[Path]:
    """Write ten photographs of different sizes, modes and EXIF orientations."""
    folder.mkdir(exist_ok=True)
    for name, (sample, width, height, mode, orientation) in IMAGES.items():
        exif = PIL.Image.Exif()
        exif[274] = orientation
        image = PIL.Image.fromarray(load_sample_image(sample)).resize((width, height), PIL.Image.Resampling.BICUBIC)
        image.convert(mode).save(folder / name, **({"exif": exif} if orientation > 1 else {}), **_save_options(name))
    return [folder / name for name in IMAGES]


def _save_options(name: str) -> dict[str, Any]:
    return {"lossless": True} if name.endswith("webp") else {}


def opened(path: Path) -> PIL.Image.Image:
    """Return an image as Pillow decodes it, rotated by its EXIF: timm and torchvision do not rotate it."""
    with PIL.Image.open(path) as image:
        return PIL.ImageOps.exif_transpose(image).convert("RGB")


def our_logits(imported: ImportedModel, paths: list[Path]) -> Tensor:
    """Return the logits of image files as `predict` computes them."""
    header = imported.header
    model = build_model(header.architecture, imported.weights, "test")
    classifier = Classifier(model, header)
    pixels = [header.preprocess.apply(read_image(path, mode=header.preprocess.mode)) for path in paths]
    return classifier.logits(pixels)


@torch.no_grad()
def their_logits(model: nn.Module, transform: Callable[[PIL.Image.Image], Tensor], paths: list[Path]) -> Tensor:
    """Return the logits of image files by a library's model and transform."""
    return model.eval()(torch.stack([transform(opened(path)) for path in paths]))


def assert_same_logits(imported: ImportedModel, model: nn.Module, transform: Any, paths: list[Path]) -> None:
    """Assert that an imported model and its original give the same logits for image files."""
    expected = their_logits(model, transform, paths)
    assert expected.std(dim=0).max() > 0.01  # the images make a difference
    assert_close(our_logits(imported, paths), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def redrawn(model: nn.Module, std: float = 0.15) -> Any:
    """Return a model whose parameters are drawn anew, so that no bias or norm is hidden by zeros and ones; a CNN's stay."""
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 or ".backbone" not in name:
                parameter.normal_(mean=float(own == "weight" and parameter.ndim == 1), std=std)
    return model.eval()


def as_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return tensors as arrays, for `np.savez`."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}
