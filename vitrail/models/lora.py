"""Low-rank adapters: a few trained weights beside frozen ones (Hu et al. 2021, "LoRA")."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.vit import ViT

# Layers of a block that can have an adapter → their name in the block.
TARGETS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


class LoraLinear(nn.Module):
    """A linear layer plus a product of two thin matrices: W x + b + (alpha / rank) · B A x (Hu et al. 2021, eq. 3).

    `weight` and `bias` are those of the given layer, with their names. A starts Gaussian and B zero, so that nothing
    changes before the first step. In the joined `qkv`, queries, keys and values share A.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.normal_(self.lora_a, std=linear.in_features**-0.5)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the plain layer that computes the same."""
        linear = nn.Linear(self.lora_a.shape[1], self.lora_b.shape[0], bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight + self.scale * self.lora_b @ self.lora_a)
        linear.bias = self.bias
        return linear


def add_adapters(model: ViT, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Add an adapter to the `targets` of every block, in place."""
    for block in model.blocks:
        for target in targets:
            parent, name = TARGETS[target].split(".")
            layers = cast(nn.Module, getattr(block, parent))
            setattr(layers, name, LoraLinear(cast(nn.Linear, getattr(layers, name)), rank, alpha))


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's weight."""
    return name.endswith((".lora_a", ".lora_b"))


def merged(model: ViT) -> ViT:
    """Return a copy of a model with its adapters merged into its weights; a model without adapters itself."""
    if not any(isinstance(module, LoraLinear) for module in model.modules()):
        return model
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoraLinear):
                setattr(parent, name, layer.merged())
    return plain
