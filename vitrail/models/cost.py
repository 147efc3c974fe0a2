"""What an architecture costs: parameters and multiply-adds, by formula. Imports no torch."""

from __future__ import annotations

from vitrail.models.config import ViTConfig


def num_macs(config: ViTConfig) -> int:
    """Return the multiply-adds of one forward pass over one picture of `image_size`.

    depth · (N·D²·(4 + 2r) + 2·N²·D) + patches · C·P²·D + D·classes; norms, biases and softmax are left out, as usual.
    """
    patches, dim = config.grid[0] * config.grid[1], config.embed_dim
    tokens = config.num_prefix + patches
    hidden = int(dim * config.mlp_ratio)
    block = tokens * dim * (4 * dim + 2 * hidden) + 2 * tokens**2 * dim
    join = patches * 2 * dim * dim if config.decoder == "concat" else 0
    embed = patches * config.in_channels * config.patch_size**2 * dim
    return config.depth * block + embed + join + dim * config.num_classes


def num_parameters(config: ViTConfig) -> int:
    """Return the number of trained values, without building the model's storage."""
    import torch

    from vitrail.models.vit import ViT

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ViT(config).parameters())
