"""torchvision's vision transformers: published weights by name, or a file and the name of its model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import VisionTransformer, WeightsEnum
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from vitrail.data.images.preprocess import Preprocess, crop_fraction_of
from vitrail.lookup import first_line
from vitrail.models.config import ViTConfig
from vitrail.weights.finalise import RawModel, finalise, mlp_ratio, plain_labels
from vitrail.weights.formats.state_dict import others_names
from vitrail.weights.formats.state_dict_files import read_state_dict
from vitrail.weights.imported_model import ImportedModel
from vitrail.weights.key_mapping import to_ours
from vitrail.weights.naming import TORCHVISION

_INTERPOLATIONS = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}


def open_torchvision(rest: str, described: Mapping[str, Any] | None = None) -> ImportedModel:
    """Read what stands behind `torchvision:`: NAME, NAME.WEIGHTS, or either with =FILE.

    The image size, preprocessing and labels are those of the weights, by default the ones torchvision calls so.

    Raises:
        ValueError: torchvision has no such model or weights, they cannot be had, or they do not fit.
    """
    word = f"torchvision:{rest}"
    if described:
        raise ValueError(f"{word}: torchvision says all of its models; {', '.join(described)} cannot be given with it")
    spelt, equals, file = rest.partition("=")
    name, _, chosen = spelt.partition(".")
    weights = _weights(name, chosen, word)
    config = _architecture(name, weights, word)
    preprocess = torchvision_preprocess(weights.transforms(), config, word)
    notes: tuple[str, ...] = (
        () if chosen else (f"weights, preprocessing and labels are {weights}, torchvision's default",)
    )
    if equals:
        bare = read_state_dict(Path(file))
        tensors, notes = (
            bare.tensors,
            (*bare.notes, f"preprocessing and labels are those of {weights}, assumed of the file"),
        )
    else:
        tensors = _download(weights, word)
    ours, unexpected = to_ours(tensors, TORCHVISION, config, word)
    if not ours:
        raise ValueError(others_names(word, tensors, "torchvision's"))
    labels = tuple(weights.meta.get("categories", ())) or plain_labels(config.num_classes)
    head = ours.get("head.weight")
    if equals and head is not None and len(head) != len(labels):
        raise ValueError(
            f"{word}: its head has {len(head)} classes, those weights {len(labels)}; give the file alone, without a name, "
            "and describe its labels"
        )
    return finalise(RawModel(word, ours, (), tuple(unexpected), notes), config, preprocess, labels)


def _weights(name: str, chosen: str, word: str) -> WeightsEnum:
    """Return the weights that a word means.

    Raises:
        ValueError: there is no such model, it is no ViT, or it has no such weights.
    """
    known = [each for each in torchvision.models.list_models() if each.startswith("vit_")]
    if name not in torchvision.models.list_models():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{word}: torchvision has no model {name!r}{hint} Its ViTs: {', '.join(known)}")
    kinds: Any = torchvision.models.get_model_weights(name)
    try:
        return kinds[chosen or "DEFAULT"]
    except KeyError:
        raise ValueError(f"{word}: {name} has no weights {chosen!r}; it has {', '.join(kinds.__members__)}") from None


def _architecture(name: str, weights: WeightsEnum, word: str) -> ViTConfig:
    """Return the architecture of torchvision's model, read from its modules.

    Raises:
        ValueError: it is no plain VisionTransformer.
    """
    height, width = weights.meta.get("min_size", (224, 224))
    classes = len(weights.meta.get("categories", ())) or 1000
    with torch.device("meta"):
        build = torchvision.models.get_model_builder(name)
        try:
            model: Any = build(weights=None, image_size=height, num_classes=classes)
        except TypeError:  # other families take no image_size
            model = build(weights=None)
    if not isinstance(model, VisionTransformer) or not isinstance(model.conv_proj, nn.Conv2d) or height != width:
        raise ValueError(
            f"{word}: is a {type(model).__name__}; Vitrail's ViT can be torchvision's VisionTransformer (vit_…) with square "
            "patches"
        )
    if model.representation_size is not None:
        raise ValueError(
            f"{word}: has a tanh layer before its head (representation_size), which Vitrail's ViT does not"
        )
    layer: Any = model.encoder.layers[0]
    return ViTConfig(
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_classes=classes,
        embed_dim=model.hidden_dim,
        depth=len(model.encoder.layers),
        num_heads=layer.num_heads,
        mlp_ratio=mlp_ratio(model.mlp_dim, model.hidden_dim),
        layer_norm_eps=layer.ln_1.eps,
    )


def torchvision_preprocess(transform: Any, config: ViTConfig, word: str) -> Preprocess:
    """Return the preprocessing of torchvision's `ImageClassification`.

    Raises:
        ValueError: it is another transform, or one that cannot be expressed.
    """
    if not isinstance(transform, ImageClassification) or transform.interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"{word}: its transform is {type(transform).__name__}; expected torchvision's ImageClassification"
        )
    size, side = transform.crop_size[0], transform.resize_size[0]
    if size != config.image_size or side < size:
        raise ValueError(
            f"{word}: its transform cuts {size} px out of {side} px, but the model takes {config.image_size} px"
        )
    return Preprocess(
        image_size=size,
        resize="crop",
        crop_fraction=crop_fraction_of(size, side),
        interpolation=_INTERPOLATIONS[transform.interpolation],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )


def _download(weights: WeightsEnum, word: str) -> dict[str, Tensor]:
    """Return published weights, from torch.hub's cache or from the network.

    Raises:
        ValueError: they are not in the cache and cannot be had.
    """
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except Exception as error:  # URL, HTTP, hash, zip and pickle errors
        raise ValueError(
            f"{word}: its weights could not be had ({first_line(error)}); they need the network once, then come from "
            f"{torch.hub.get_dir()}; or give a file of them: {word}=FILE"
        ) from None
