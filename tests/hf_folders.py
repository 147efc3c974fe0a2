"""Small random models in folders as transformers writes them, and what transformers makes of an image file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import transformers
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from transformers import AutoImageProcessor

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
PLAIN = {**SHAPE, "intermediate_size": 56, "image_size": 32, "patch_size": 8}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "unknown bird"}, "label2id": {"cat": 0, "dog": 1, "unknown bird": 2}}
VIT_IMAGES = {"size": {"height": 32, "width": 32}}
CROPPED = {"size": {"shortest_edge": 37}, "crop_size": {"height": 28, "width": 28}}

# name → (class, configuration, image processor, its settings)
FAMILIES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", {**PLAIN, **LABELS}, "ViTImageProcessor", VIT_IMAGES),
    "vit-relu-no-bias": (
        "ViTForImageClassification",
        {**PLAIN, **LABELS, "hidden_act": "relu", "qkv_bias": False, "layer_norm_eps": 1e-3},
        "ViTImageProcessor",
        {**VIT_IMAGES, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    ),
    "vit-quick-gelu": (
        "ViTForImageClassification",
        {**PLAIN, **LABELS, "hidden_act": "quick_gelu", "head_dim": 4},
        "ViTImageProcessor",
        {**VIT_IMAGES, "resample": 1, "do_normalize": False},
    ),
    "vit-gelu-tanh": (
        "ViTForImageClassification",
        {**PLAIN, **LABELS, "hidden_act": "gelu_pytorch_tanh"},
        "ViTImageProcessor",
        {**VIT_IMAGES, "resample": 4, "rescale_factor": 1 / 127.5},
    ),
    "vit-base": ("ViTModel", PLAIN, "ViTImageProcessor", VIT_IMAGES),
    "vit-mim": ("ViTForMaskedImageModeling", {**PLAIN, "encoder_stride": 8}, "ViTImageProcessor", VIT_IMAGES),
    "vit-larger-images": (
        "ViTForImageClassification",
        {**PLAIN, **LABELS},
        "ViTImageProcessor",
        {"size": {"height": 48, "width": 48}},
    ),
    "deit": (
        "DeiTForImageClassification",
        {**PLAIN, **LABELS},
        "DeiTImageProcessor",
        {"size": {"height": 37, "width": 37}, "crop_size": {"height": 32, "width": 32}},
    ),
    "deit-teacher": (
        "DeiTForImageClassificationWithTeacher",
        {**PLAIN, **LABELS},
        "DeiTImageProcessor",
        {"size": {"height": 51, "width": 51}, "crop_size": {"height": 40, "width": 40}},
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        {**SHAPE, **LABELS, "image_size": 70, "patch_size": 7},
        "BitImageProcessor",
        CROPPED,
    ),
    "dinov2-swiglu": (
        "Dinov2Model",
        {**SHAPE, "image_size": 28, "patch_size": 7, "use_swiglu_ffn": True},
        "BitImageProcessor",
        CROPPED,
    ),
    "dinov2-registers": (
        "Dinov2WithRegistersForImageClassification",
        {**SHAPE, **LABELS, "image_size": 70, "patch_size": 7, "num_register_tokens": 3},
        "BitImageProcessor",
        CROPPED,
    ),
    "dinov2-registers-base": (
        "Dinov2WithRegistersModel",
        {**SHAPE, "image_size": 28, "patch_size": 7, "num_register_tokens": 2, "use_swiglu_ffn": True, "mlp_ratio": 3},
        "BitImageProcessor",
        CROPPED,
    ),
    "dinov3": (
        "DINOv3ViTModel",
        {**PLAIN, "num_register_tokens": 4},
        "DINOv3ViTImageProcessor",
        {"size": {"height": 40, "width": 40}},
    ),
    "dinov3-gated": (
        "DINOv3ViTModel",
        {**PLAIN, "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False},
        "DINOv3ViTImageProcessor",
        VIT_IMAGES,
    ),
    "dinov3-fewer-biases": (
        "DINOv3ViTModel",
        {**PLAIN, "mlp_bias": False, "proj_bias": False, "value_bias": False, "key_bias": True},
        "DINOv3ViTImageProcessor",
        VIT_IMAGES,
    ),
    "mae": (
        "ViTMAEForPreTraining",
        {
            **PLAIN,
            "mask_ratio": 0.0,
            "decoder_num_hidden_layers": 1,
            "decoder_hidden_size": 16,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
        "ViTImageProcessor",
        VIT_IMAGES,
    ),
    "msn": ("ViTMSNForImageClassification", {**PLAIN, **LABELS}, "ViTImageProcessor", VIT_IMAGES),
}


@torch.no_grad()
def redrawn(model: nn.Module) -> Any:
    """Draw every parameter of a model again, so that no bias or norm is hidden by zeros and ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.normal_(mean=float(name == "weight" and parameter.ndim == 1), std=0.2)
    return model.eval()


def save_family(name: str, folder: Path, **how: Any) -> Any:
    """Save a random model of a family with its image processor; returns the model."""
    class_name, settings, processor, images = FAMILIES[name]
    model_class = getattr(transformers, class_name)
    model = redrawn(model_class(model_class.config_class(**settings)))
    model.save_pretrained(folder, **how)
    getattr(transformers, processor)(**images).save_pretrained(folder)
    return model


def their_pixels(folder: Path, path: Path, *, backend: str) -> Tensor:
    """Return an image file as transformers' image processor sees it: turned by its EXIF, transparency on white."""
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
    with PIL.Image.open(path) as opened:
        image = PIL.ImageOps.exif_transpose(opened)
    return processor(images=image, do_convert_rgb=True, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def their_answer(model: Any, pixels: Tensor) -> Tensor:
    """Return transformers' logits, or the class token after the last norm."""
    if type(model).__name__.startswith("ViTMAE"):
        order = torch.arange(100.0)[None, : (model.config.image_size // model.config.patch_size) ** 2]
        return model.vit(pixels, noise=order).last_hidden_state[:, 0]
    if type(model).__name__ == "ViTForMaskedImageModeling":
        model = model.vit
    size = {"interpolate_pos_encoding": True} if type(model).__name__.startswith(("ViTFor", "DeiT")) else {}
    out = model(pixels, **size)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state[:, 0]


def _photograph(name: str, size: tuple[int, int], mode: str = "RGB") -> PIL.Image.Image:
    image = PIL.Image.fromarray(_sample(name)).resize(size, PIL.Image.Resampling.BICUBIC)
    if mode == "RGBA":
        image.putalpha(PIL.Image.fromarray(np.uint8(255) * (np.arange(size[0]) % 7 > 1)[None].repeat(size[1], 0)))
    return image.convert(mode)


@functools.cache
def _sample(name: str) -> np.ndarray:
    return load_sample_image(name)


def write_images(folder: Path) -> list[Path]:
    """Write ten photographs of different sizes, modes and EXIF orientations."""

    def turned(orientation: int) -> dict[str, Any]:
        exif = PIL.Image.Exif()
        exif[274] = orientation
        return {"exif": exif}

    drawn: dict[str, tuple[PIL.Image.Image, dict[str, Any]]] = {
        "plain.jpg": (_photograph("china.jpg", (320, 213)), {}),
        "tiny.png": (_photograph("flower.jpg", (19, 31)), {}),
        "grey.jpg": (_photograph("china.jpg", (200, 111), "L"), {}),
        "clear.png": (_photograph("flower.jpg", (97, 97), "RGBA"), {}),
        "palette.png": (_photograph("flower.jpg", (120, 64), "P"), {}),
        "print.jpg": (_photograph("china.jpg", (150, 101), "CMYK"), {}),
        "half-turn.jpg": (_photograph("china.jpg", (160, 120)), turned(3)),
        "quarter-turn.jpg": (_photograph("china.jpg", (161, 93)), turned(6)),
        "mirror.png": (_photograph("flower.jpg", (77, 140)), turned(5)),
        "exact.webp": (_photograph("flower.jpg", (32, 32)), {"lossless": True}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, how) in drawn.items():
        image.save(folder / name, **how)
    return [folder / name for name in drawn]


Save = Callable[..., Any]
