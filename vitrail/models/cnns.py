"""timm's CNNs as encoders: which there are, their feature map at a stride, their weights and input normalisation."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from vitrail.models.config import ENCODER_NAMES, ViTConfig


def build_cnn(
    name: str, stride: int, in_channels: int, image_size: int | None = None, **how: Any
) -> tuple[nn.Module, int]:
    """Return a CNN cut after the feature map of a stride, and that map's channels.

    Layers behind the map are left out: they would cost time and never learn.

    Args:
        stride: pixels of the image per pixel of the map, along a side.
        image_size: side of the images that it must take; None leaves it unchecked.
        how: more arguments of `timm.create_model`, such as `pretrained`.

    Raises:
        ValueError: timm has no such model, it is no CNN, it has no map of that stride, or cannot take such images.
    """
    index = index_of(name, stride)
    if image_size is not None:
        check_fit(name, index, stride, image_size)
    backbone = features_of(name, in_chans=in_channels, out_indices=(index,), **how)
    info: Any = backbone.feature_info
    return backbone, info.channels()[-1]


def index_of(name: str, stride: int) -> int:
    """Return which of a CNN's feature maps has a stride.

    Raises:
        ValueError: timm has no such model, it is no CNN, or it has no map of that stride.
    """
    strides = feature_strides(name)
    if stride not in strides:
        raise ValueError(
            f"model.encoder {name!r} has feature maps of stride {', '.join(map(str, sorted(set(strides))))}, not {stride}; "
            f"try --model.patch_size {min(strides, key=lambda known: abs(known - stride))}"
        )
    # The last map of a stride is the richest: some nets have several.
    return len(strides) - 1 - strides[::-1].index(stride)


@cache
def feature_strides(name: str) -> tuple[int, ...]:
    """Return the strides of a CNN's feature maps, from the finest.

    Raises:
        ValueError: timm has no such model, or can cut it to no feature maps [B, C, h, w]: it is no CNN.
    """
    refuse_unknown(name)
    published: Any = timm.get_pretrained_cfg(name)
    try:
        with torch.device("meta"):
            model: Any = features_of(name)
            maps = model.eval()(torch.empty(1, *published.input_size))
    except Exception as error:  # what timm raises for a net that it cannot cut depends on the net
        raise ValueError(f"model.encoder {name!r}: timm cannot cut it to feature maps ({error})") from None
    strides = tuple(int(each) for each in model.feature_info.reduction())
    side = published.input_size[-1]
    fits = [
        each.ndim == 4 and each.shape[1] == width and each.shape[-1] in (side // stride, -(-side // stride))
        for each, width, stride in zip(maps, model.feature_info.channels(), strides, strict=True)
    ]
    if not all(fits) or len(set(strides)) == 1:
        raise ValueError(
            f"model.encoder {name!r} is no CNN whose feature maps shrink step by step; expected one such as resnet50, "
            "efficientnet_b0, convnext_tiny or mobilenetv3_large_100"
        )
    return strides


@cache
def check_fit(name: str, index: int, stride: int, image_size: int) -> None:
    """Raise a ValueError unless a CNN, cut after a feature map, takes images of a size and trains all it has."""
    with torch.device("meta"):
        model = features_of(name, out_indices=(index,))
        image = torch.empty(2, *timm.get_pretrained_cfg(name).input_size[:1], image_size, image_size)  # pyright: ignore
        try:
            features = model(image)[-1]
        except Exception as error:  # nets with windows or tables of fixed size: assertions, shape errors
            raise ValueError(f"model.encoder {name!r} cannot take images of {image_size} px ({error})") from None
        features.sum().backward()
    if features.shape[2:] != (image_size // stride, image_size // stride):
        raise ValueError(
            f"model.encoder {name!r} makes a map of {features.shape[2]}×{features.shape[3]} from images of {image_size} px, "
            f"not {image_size // stride}×{image_size // stride}; choose another net or --model.image_size"
        )
    if any(parameter.grad is None for parameter in model.parameters()):
        raise ValueError(
            f"model.encoder {name!r}: timm cannot cut it after stride {stride}, layers behind the map would stay untrained; "
            f"try --model.patch_size {max(feature_strides(name))} or another net"
        )


def features_of(name: str, **how: Any) -> nn.Module:
    """Return timm's feature form of a model."""
    model = timm.create_model(name, features_only=True, **how)
    return prune(model)


def prune(model: nn.Module) -> nn.Module:
    """Cut what timm's EfficientNet form computes behind its last feature map."""
    last = getattr(model, "_stage_out_idx", None)
    if last is not None and isinstance(getattr(model, "blocks", None), nn.Sequential) and model.feature_hooks is None:
        model.blocks = model.blocks[: max(last)]  # pyright: ignore
    return model


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation that a CNN's published weights expect of pixels in 0 to 1."""
    refuse_unknown(name)
    published: Any = timm.get_pretrained_cfg(name)
    return tuple(published.mean), tuple(published.std)


def load_pretrained(backbone: nn.Module, config: ViTConfig, weights: str) -> None:
    """Give a CNN encoder trained weights.

    Args:
        weights: `timm` for the ones that timm publishes, or a local .safetensors, .pth or .bin file of the whole CNN.

    Raises:
        ValueError: the weights cannot be had, or do not fit.
    """
    name = config.encoder
    if weights != "timm":
        how = {"pretrained_cfg_overlay": {"state_dict": read_weights(Path(weights), name)}}
    elif timm.is_model_pretrained(name):
        how: dict[str, Any] = {}
    else:
        raise ValueError(f"encoder_weights 'timm': timm publishes no weights for {name}; leave it out, or name a file")
    try:
        trained, _ = build_cnn(name, config.patch_size, config.in_channels, pretrained=True, **how)
    except Exception as error:  # network and cache errors come in many classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "check the file" if how else "it needs the network once; or name a local file of the weights"
        raise ValueError(f"encoder_weights {weights}: {name} could not be loaded ({reason}); {remedy}") from None
    backbone.load_state_dict(trained.state_dict())


def read_weights(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Read a file of a CNN's weights under timm's names; a pickle's code is never run.

    timm itself loads what it finds and leaves the rest at random, so all names and shapes are compared here. The first
    layer may have other channels and the classifier other classes.

    Raises:
        ValueError: there is no such file, it cannot be read, or it holds not the weights of this CNN.
    """
    if not path.is_file():
        raise ValueError(
            f"encoder_weights {path}: no such file; expected 'timm', or a file of {name}'s weights (.safetensors or .pth)"
        )
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # safetensors, zip, pickle and OS errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"encoder_weights {path}: could not be read ({reason}); check the file") from None
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    found = {str(key).removeprefix("module."): value for key, value in dict(content).items()}
    with torch.device("meta"):
        net: Any = timm.create_model(name)
    wanted = net.state_dict()
    heads, first = (_names(net.pretrained_cfg.get(key)) for key in ("classifier", "first_conv"))

    def free(key: str, of: tuple[str, ...]) -> bool:
        return key.endswith("num_batches_tracked") or key.rpartition(".")[0] in of

    missing = [key for key in wanted if key not in found and not free(key, heads)]
    unexpected = [key for key in found if key not in wanted and not free(key, heads)]
    shapes = [
        f"{key} is {tuple(found[key].shape)}, {name} has {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape and not free(key, (*heads, *first))
    ]
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unexpected": unexpected, "shape": shapes}
        lines = [f"  {kind}: {', '.join(each[:5])}{' …' * (len(each) > 5)}" for kind, each in parts.items() if each]
        raise ValueError("\n".join([f"encoder_weights {path}: are not the weights of timm's {name}", *lines]))
    return found


def _names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def refuse_unknown(name: str) -> None:
    """Raise a ValueError unless timm has a model of this name."""
    if timm.is_model(name):
        return
    near = nearest(name, ENCODER_NAMES)
    hint = f"; did you mean {near!r}?" if near else "."
    raise ValueError(
        f"unknown model.encoder {name!r}{hint} Known: {', '.join(ENCODER_NAMES)}, and timm's CNNs, such as resnet50, "
        "efficientnet_b0, convnext_tiny"
    )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name, or timm's model, that is spelt most like `name`."""
    found = difflib.get_close_matches(name.lower(), [*known, *timm.list_models()], n=1, cutoff=0.6)
    return found[0] if found else None
