"""How weights start, in one place (timm's and Google's ViT initialisation)."""

from __future__ import annotations

import torch
from torch import nn

from vitrail.models.blocks import LayerScale


@torch.no_grad()
def init_weights(model: nn.Module) -> None:
    """Give every parameter of a ViT its starting value.

    Matrices and tables are normal with deviation 0.02 cut at two deviations, biases zero, norms one; the patch
    projection is LeCun normal (big_vision, models/vit.py); the class token is close to zero, as timm's. Parameters are
    filled with NaN first: one that is forgotten here shows at once.
    """
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=fan_in**-0.5, a=-2 * fan_in**-0.5, b=2 * fan_in**-0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.initial)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name == "cls_token" or name == "reg_token":
            nn.init.normal_(parameter, std=1e-6)
        elif name == "pos_embed":
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
