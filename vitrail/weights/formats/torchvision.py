"""Read torchvision's vision transformers: published weights by name, or a file with the name of its model."""

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
from vitrail.weights.formats.state_dict import foreign_names_error
from vitrail.weights.formats.state_dict_files import read_state_dict
from vitrail.weights.imported_model import ImportedModel
from vitrail.weights.key_mapping import to_ours
from vitrail.weights.naming import TORCHVISION

_INTERPOLATIONS = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}


def open_torchvision_model(rest: str, description: Mapping[str, Any] | None = None) -> ImportedModel:
    """Return the model of `torchvision:REST`, where REST is NAME, NAME.WEIGHTS, or either with =FILE.

    Image size, preprocessing and labels are those of the weights, or of torchvision's DEFAULT weights unless named.

    Raises:
        ValueError: torchvision has no such model or weights, they cannot be downloaded, or they do not fit.
    """
    origin = f"torchvision:{rest}"
    if description:
        raise ValueError(
            f"{origin}: torchvision describes all of its models; {', '.join(description)} cannot be given with it"
        )
    model_and_weights, equals, file = rest.partition("=")
    name, _, weights_name = model_and_weights.partition(".")
    weights = _weights(name, weights_name, origin)
    config = _architecture(name, weights, origin)
    preprocess = torchvision_preprocess(weights.transforms(), config, origin)
    notes: tuple[str, ...] = (
        () if weights_name else (f"weights, preprocessing and labels are {weights}, torchvision's default",)
    )
    if equals:
        state_dict = read_state_dict(Path(file))
        tensors, notes = (
            state_dict.tensors,
            (*state_dict.notes, f"preprocessing and labels are those of {weights}, assumed of the file"),
        )
    else:
        tensors = _download(weights, origin)
    ours, unexpected = to_ours(tensors, TORCHVISION, config, origin)
    if not ours:
        raise ValueError(foreign_names_error(origin, tensors, "torchvision's"))
    labels = tuple(weights.meta.get("categories", ())) or plain_labels(config.num_classes)
    head = ours.get("head.weight")
    if equals and head is not None and len(head) != len(labels):
        raise ValueError(
            f"{origin}: its head has {len(head)} classes, those weights {len(labels)}; give the file alone, without a name, "
            "and describe its labels"
        )
    return finalise(RawModel(origin, ours, (), tuple(unexpected), notes), config, preprocess, labels)


def _weights(name: str, weights_name: str, origin: str) -> WeightsEnum:
    """Return the entry of torchvision's weights by name, or the default one.

    Raises:
        ValueError: there is no such model, it is no ViT, or it has no such weights.
    """
    known = [model for model in torchvision.models.list_models() if model.startswith("vit_")]
    if name not in torchvision.models.list_models():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{origin}: torchvision has no model {name!r}{hint} Its ViTs: {', '.join(known)}")
    entries: Any = torchvision.models.get_model_weights(name)
    try:
        return entries[weights_name or "DEFAULT"]
    except KeyError:
        raise ValueError(
            f"{origin}: {name} has no weights {weights_name!r}; it has {', '.join(entries.__members__)}"
        ) from None


def _architecture(name: str, weights: WeightsEnum, origin: str) -> ViTConfig:
    """Return the architecture of torchvision's model, read from its modules.

    Raises:
        ValueError: the model is no plain VisionTransformer.
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
            f"{origin}: is a {type(model).__name__}; Vitrail's ViT can be torchvision's VisionTransformer (vit_…) with square "
            "patches"
        )
    if model.representation_size is not None:
        raise ValueError(
            f"{origin}: has a tanh layer before its head (representation_size), which Vitrail's ViT does not"
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


def torchvision_preprocess(transform: Any, config: ViTConfig, origin: str) -> Preprocess:
    """Return the preprocessing of torchvision's `ImageClassification`.

    Raises:
        ValueError: the transform is another, or cannot be expressed.
    """
    if not isinstance(transform, ImageClassification) or transform.interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f"{origin}: its transform is {type(transform).__name__}; expected torchvision's ImageClassification"
        )
    size, side = transform.crop_size[0], transform.resize_size[0]
    if size != config.image_size or side < size:
        raise ValueError(
            f"{origin}: its transform cuts {size} px out of {side} px, but the model takes {config.image_size} px"
        )
    return Preprocess(
        image_size=size,
        resize="crop",
        crop_fraction=crop_fraction_of(size, side),
        interpolation=_INTERPOLATIONS[transform.interpolation],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )


def _download(weights: WeightsEnum, origin: str) -> dict[str, Tensor]:
    """Return published weights, from torch.hub's cache or from the network.

    Raises:
        ValueError: they are not in the cache and cannot be downloaded.
    """
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except Exception as error:  # URL, HTTP, hash, zip and pickle errors
        raise ValueError(
            f"{origin}: its weights could not be had ({first_line(error)}); they need the network once, then come from "
            f"{torch.hub.get_dir()}; or give a file of them: {origin}=FILE"
        ) from None
