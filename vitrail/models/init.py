"""Initialise the weights of a ViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.lookup import pick
from vitrail.models.attention import AttentionPool, SelfAttention
from vitrail.models.blocks import LayerScale


@torch.no_grad()
def init_weights(model: nn.Module, how: str) -> None:
    """Initialise every parameter of a ViT; the backbone of a CNN encoder keeps timm's initialisation.

    Parameters are filled with NaN first, so that a forgotten one shows at once.

    Args:
        how: a name of `INITS`.
    """
    modules = {name: module for name, module in model.named_modules() if not f"{name}.".startswith(_BACKBONE)}
    for name, parameter in model.named_parameters():
        if not name.startswith(_BACKBONE):
            parameter.fill_(float("nan"))
    _normal(modules)
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "reg_token"):
            nn.init.normal_(parameter, std=1e-6)
        elif name == "pos_embed":
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
    pick(INITS, how, "model.init")(modules)


_BACKBONE = "patch_embed.backbone."


def _normal(modules: dict[str, nn.Module]) -> None:
    """Initialise matrices and tables normal with deviation 0.02 (timm's `init_weights_vit_timm`), cut at two deviations, biases zero,
    norms one; convolutions LeCun normal (big_vision, models/vit.py); the class token close to zero."""
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and name != "patch_embed.proj":
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=fan_in**-0.5, a=-2 * fan_in**-0.5, b=2 * fan_in**-0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.initial)
        elif isinstance(module, AttentionPool):
            nn.init.trunc_normal_(module.latent, std=module.latent.shape[-1] ** -0.5)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _mimetic(modules: dict[str, nn.Module]) -> None:
    """Initialise attention as it looks in pretrained models: queries times keys of every head about the identity, values
    times output projection about minus the identity (Trockman & Kolter 2023, "Mimetic initialization", section 4)."""
    for module in modules.values():
        if not isinstance(module, SelfAttention) or module.qkv.weight.is_meta:
            continue
        dim = module.proj.in_features
        queries, keys, values = module.qkv.weight.view(3, dim, dim)
        head_dim = dim // module.num_heads
        for head in range(module.num_heads):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            left, right = _factors(dim, noise=0.7, identity=0.7)
            queries[rows], keys[rows] = left[:, :head_dim].T, right[:, :head_dim].T
        left, right = _factors(dim, noise=0.4, identity=-0.4)
        values.copy_(left.T)
        module.proj.weight.copy_(right)


def _factors(dim: int, *, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Return L and R, [dim, dim] each, with L Rᵀ = noise · Z + identity · I, best columns first."""
    target = noise * torch.randn(dim, dim, device="cpu") / dim**0.5 + identity * torch.eye(dim, device="cpu")
    left, sizes, right = torch.linalg.svd(target)
    return left * sizes.sqrt(), right.T * sizes.sqrt()


INITS = {"normal": lambda modules: None, "mimetic": _mimetic}
