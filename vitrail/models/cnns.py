"""CNNs of timm as encoders: cut at a feature map, loaded with trained weights, and the input normalisation they expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitrail.lookup import first_line
from vitrail.models.config import ENCODER_NAMES, ViTConfig
from vitrail.tensor_files import load_pickle, load_tensors


def build_cnn(
    name: str, stride: int, in_channels: int, image_size: int | None = None, **arguments: Any
) -> tuple[nn.Module, int]:
    """Return a CNN cut after its feature map of one stride, and the number of that map's channels.

    Layers after the map are left out: they would cost time and never learn.

    Args:
        stride: pixels of the image per pixel of the map, along a side.
        image_size: side of the images that it must take; None leaves it unchecked.
        arguments: more arguments of `timm.create_model`, such as `pretrained`.

    Raises:
        ValueError: timm has no such model, it is no CNN, it has no map of that stride, or cannot take such images.
    """
    index = index_of(name, stride)
    if image_size is not None:
        check_fit(name, index, stride, image_size)
    backbone = build_feature_net(name, in_chans=in_channels, out_indices=(index,), **arguments)
    info: Any = backbone.feature_info
    return backbone, info.channels()[-1]


def index_of(name: str, stride: int) -> int:
    """Return the index of the last of a CNN's feature maps that has this stride.

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
    """Return the strides of a CNN's feature maps, the smallest first.

    Raises:
        ValueError: timm has no such model, or cannot cut it to feature maps [B, C, h, w]: it is no CNN.
    """
    refuse_unknown_cnn(name)
    published: Any = timm.get_pretrained_cfg(name)
    try:
        with torch.device("meta"):
            model: Any = build_feature_net(name)
            maps = model.eval()(torch.empty(1, *published.input_size))
    except Exception as error:  # what timm raises for a net that it cannot cut depends on the net
        raise ValueError(f"model.encoder {name!r}: timm cannot cut it to feature maps ({error})") from None
    strides = tuple(int(reduction) for reduction in model.feature_info.reduction())
    side = published.input_size[-1]
    fits = [
        feature_map.ndim == 4
        and feature_map.shape[1] == channels
        and feature_map.shape[-1] in (side // stride, -(-side // stride))
        for feature_map, channels, stride in zip(maps, model.feature_info.channels(), strides, strict=True)
    ]
    if not all(fits) or len(set(strides)) == 1:
        raise ValueError(
            f"model.encoder {name!r} is no CNN whose feature maps shrink step by step; expected one such as resnet50, "
            "efficientnet_b0, convnext_tiny or mobilenetv3_large_100"
        )
    return strides


@cache
def check_fit(name: str, index: int, stride: int, image_size: int) -> None:
    """Raise a ValueError unless a CNN, cut after a feature map, takes images of this size and trains all its layers."""
    with torch.device("meta"):
        model = build_feature_net(name, out_indices=(index,))
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


def build_feature_net(name: str, **arguments: Any) -> nn.Module:
    """Return a model of timm that gives its feature maps (timm's `features_only`), without the layers after the last."""
    model = timm.create_model(name, features_only=True, **arguments)
    return prune(model)


def prune(model: nn.Module) -> nn.Module:
    """Remove the blocks that timm's EfficientNets compute after their last feature map."""
    last = getattr(model, "_stage_out_idx", None)
    if last is not None and isinstance(getattr(model, "blocks", None), nn.Sequential) and model.feature_hooks is None:
        model.blocks = model.blocks[: max(last)]  # pyright: ignore
    return model


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that a CNN's published weights expect of pixels in 0 to 1."""
    refuse_unknown_cnn(name)
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
        arguments: dict[str, Any] = {"pretrained_cfg_overlay": {"state_dict": read_weights(Path(weights), name)}}
    elif timm.is_model_pretrained(name):
        arguments = {}
    else:
        raise ValueError(f"encoder_weights 'timm': timm publishes no weights for {name}; leave it out, or name a file")
    try:
        trained, _ = build_cnn(name, config.patch_size, config.in_channels, pretrained=True, **arguments)
    except Exception as error:  # network and cache errors come in many classes
        remedy = "check the file" if arguments else "it needs the network once; or name a local file of the weights"
        raise ValueError(
            f"encoder_weights {weights}: {name} could not be loaded ({first_line(error)}); {remedy}"
        ) from None
    backbone.load_state_dict(trained.state_dict())


def read_weights(path: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights of a CNN from a file that names them as timm does; a pickle's code is never run.

    timm itself loads what it finds and leaves the rest at random, so all names and shapes are compared here. The first
    layer may have other channels and the classifier other classes.

    Raises:
        ValueError: there is no such file, it cannot be read, or it does not hold the weights of this CNN.
    """
    if not path.is_file():
        raise ValueError(
            f"encoder_weights {path}: no such file; expected 'timm', or a file of {name}'s weights (.safetensors or .pth)"
        )
    try:
        content: Any = load_tensors(path)[0] if path.suffix == ".safetensors" else load_pickle(path)
    except ValueError as error:
        raise ValueError(f"encoder_weights {error}; check the file") from None
    for key in ("state_dict", "model"):
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    found = {str(key).removeprefix("module."): value for key, value in dict(content).items()}
    with torch.device("meta"):
        net: Any = timm.create_model(name)
    wanted = net.state_dict()
    heads, first = (_layer_names(net.pretrained_cfg.get(key)) for key in ("classifier", "first_conv"))

    def may_differ(key: str, layers: tuple[str, ...]) -> bool:
        return key.endswith("num_batches_tracked") or key.rpartition(".")[0] in layers

    missing = [key for key in wanted if key not in found and not may_differ(key, heads)]
    unexpected = [key for key in found if key not in wanted and not may_differ(key, heads)]
    shapes = [
        f"{key} is {tuple(found[key].shape)}, {name} has {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape and not may_differ(key, (*heads, *first))
    ]
    if missing or unexpected or shapes:
        differences = {"missing": missing, "unexpected": unexpected, "shape": shapes}
        lines = [
            f"  {kind}: {', '.join(keys[:5])}{' …' * (len(keys) > 5)}" for kind, keys in differences.items() if keys
        ]
        raise ValueError("\n".join([f"encoder_weights {path}: are not the weights of timm's {name}", *lines]))
    return found


def _layer_names(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def refuse_unknown_cnn(name: str) -> None:
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
