"""Parameter groups: what of a model decays, how fast each layer learns, and what kind of weights it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

# matrix: of a block's linear layers, the hidden ones, which optimizers for matrices (Muon) take.
# other: embeddings, patch kernels, decoder and head. vector: biases, norms, scales, tokens and positions.
Kind = Literal["matrix", "other", "vector"]

# Added to every image alike, or a scale: pulling them to zero has no regularising meaning (Google's and DeiT's recipes).
_VECTORS = ("cls_token", "reg_token", "pos_embed", "latent")
# In the names of a ViT's own parameters; a CNN inside its encoder may have blocks too.
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_EMBEDDING = re.compile(r"^(patch_embed|cls_token|reg_token|pos_embed)(?:\.|$)")


@dataclass
class Group:
    """Parameters that an optimizer treats alike.

    Attributes:
        name: its kind and, where layers learn at different rates, its layer.
        params: the parameters, in the order of the model.
        kind: what sort of weights these are.
        decay: whether weight decay pulls them to zero.
        scale: multiplies the learning rate.
    """

    name: str
    kind: Kind
    decay: bool
    scale: float
    params: list[Tensor] = field(default_factory=list)


def parameter_groups(
    model: nn.Module,
    vits: Iterable[nn.Module] | None = None,
    *,
    layer_decay: float = 1.0,
    full_rate: Collection[str] = (),
) -> list[Group]:
    """Return the parameters of a module that learn, in groups.

    Args:
        model: a ViT, or an objective; parameters without gradients are left out.
        vits: the ViTs in an objective, whose names tell layers and kinds; None: `model` is one.
        layer_decay: the learning rate of a layer as a share of the next one's (Bao et al. 2022, BEiT, appendix). What is in
            no ViT, such as a predictor, learns at the full rate.
        full_rate: names, within their ViT, of parameters that learn at the full rate wherever they stand, such as those that
            start at random beside trained ones.

    Raises:
        ValueError: layers are to learn at other rates, but no ViT has blocks.
    """
    vits = [model] if vits is None else list(vits)
    names = {id(parameter): name for vit in vits for name, parameter in vit.named_parameters()}
    top = max((num_layers(vit) for vit in vits), default=1)
    if layer_decay != 1 and top == 1:
        raise ValueError(f"optim.layer_decay is {layer_decay}, but the model has no blocks; leave it at 1")
    groups: dict[tuple[int, bool, Kind], Group] = {}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = names.get(id(parameter), "")
        layer = top if layer_decay == 1 or not name or name in full_rate else layer_of(name, top)
        kind = kind_of(name or full_name.rpartition(".")[2], parameter)
        decay = kind != "vector"
        label = kind if layer_decay == 1 else f"{kind}, layer {layer}"
        key = (layer, decay, kind)
        groups.setdefault(key, Group(label, kind, decay, layer_decay ** (top - layer))).params.append(parameter)
    return list(groups.values())


def kind_of(name: str, parameter: Tensor) -> Kind:
    """Return what sort of weights a parameter is, from its name and its shape."""
    if parameter.ndim < 2 or name.split(".")[-1] in _VECTORS:
        return "vector"
    return "matrix" if parameter.ndim == 2 and _BLOCK.search(name) else "other"


def num_layers(model: nn.Module) -> int:
    """Return the number that `layer_of` gives a model's head: one more than it has blocks."""
    return 1 + len({found[1] for name, _ in model.named_parameters() if (found := _BLOCK.search(name))})


def layer_of(name: str, top: int) -> int:
    """Return a parameter's layer: 0 what embeds the image, i + 1 block i, `top` norm, decoder and head.

    Source: MAE's `util/lr_decay.py` at be47fef (facebookresearch/mae).
    """
    if block := _BLOCK.search(name):
        return int(block[1]) + 1
    return 0 if _EMBEDDING.search(name) else top
