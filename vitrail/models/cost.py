"""Count the parameters and multiply-adds of an architecture."""

from __future__ import annotations

from vitrail.kernels.window import num_pairs
from vitrail.models.config import ViTConfig


def num_macs(config: ViTConfig) -> int:
    """Return the multiply-adds of one forward pass over one image of `image_size`.

    Encoder + depth · (N·D²·(4 + 2r) + 2·N²·D) + decoder + D·classes; norms, biases and softmax are left out, as usual. A
    swiglu MLP has three matrices instead of two: 3r. With local attention the pairs in the windows take the place of N².
    """
    patches, dim = config.grid[0] * config.grid[1], config.embed_dim
    tokens = config.num_prefix + patches
    pool = {
        "concat": 2 * dim * dim,
        # keys and values of every patch; one query, its attention to all patches, its projection and MLP
        "attention": patches * 2 * dim * dim + 2 * dim * dim + 2 * patches * dim + 2 * dim * config.hidden_dim,
    }
    width = 2 * dim if config.decoder in ("token_mean", "token_pair") else dim
    return (
        encoder_macs(config)
        + sum(block_macs(config, tokens, attention) for attention in config.attentions)
        + pool.get(config.decoder, 0)
        + width * config.num_classes
    )


def block_macs(config: ViTConfig, tokens: int, attention: str) -> int:
    """Return the multiply-adds of one Transformer block over a sequence of tokens, with `local` or `global` attention."""
    dim = config.embed_dim
    mlp = (3 if config.mlp == "swiglu" else 2) * dim * config.hidden_dim
    pairs = num_pairs(config.grid, config.window, config.num_prefix) if attention == "local" else tokens**2
    inner = config.num_heads * config.head_width
    return tokens * (4 * dim * inner + mlp) + 2 * pairs * inner


def encoder_macs(config: ViTConfig) -> int:
    """Return the multiply-adds of the encoder; those of a CNN are counted in a forward pass without storage."""
    if config.encoder == "patch":
        return config.grid[0] * config.grid[1] * config.in_channels * config.patch_size**2 * config.embed_dim
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from vitrail.models.encoders import build_encoder

    with torch.device("meta"):
        encoder = build_encoder(config).eval()
        image = torch.empty(1, config.in_channels, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(image)
    return counter.get_total_flops() // 2


def num_parameters(config: ViTConfig) -> int:
    """Return the number of trained parameters, counted on a model without storage."""
    import torch

    from vitrail.models.vit import ViT

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ViT(config).parameters())
