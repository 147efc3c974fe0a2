"""Decoder: tokens → one vector per picture."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.config import ViTConfig


class TokenDecoder(nn.Module):
    """The class token (Dosovitskiy et al. 2021, eq. 4)."""

    norm_after_pooling = False

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.out_dim = config.embed_dim

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        return tokens[:, 0]


class MeanDecoder(nn.Module):
    """The mean of the patch tokens; the norm comes after the mean, as in timm's `global_pool="avg"`."""

    norm_after_pooling = True

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_prefix, self.out_dim = config.num_prefix, config.embed_dim

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        return tokens[:, self.num_prefix :].mean(dim=1)


class ConcatDecoder(nn.Module):
    """The article's decoder: the encoder's and the Transformer's output, joined per patch, then pooled.

    encoder output [B, D, h, w] ─ norm ─┐
                                         ├─ concatenate [B, h·w, 2D] ─ Linear, GELU [B, h·w, D] ─ mean [B, D]
    Transformer output [B, h·w, D] ─────┘
    """

    norm_after_pooling = False

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_prefix, self.out_dim = config.num_prefix, config.embed_dim
        # The encoder's raw output has another scale than the normalised Transformer's.
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.join = nn.Linear(2 * config.embed_dim, config.embed_dim)
        self.act = nn.GELU()

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        patches = self.norm(rearrange(encoded, "B D h w -> B (h w) D"))
        joined = torch.cat([patches, tokens[:, self.num_prefix :]], dim=2)
        return self.act(self.join(joined)).mean(dim=1)


DECODERS = {"token": TokenDecoder, "mean": MeanDecoder, "concat": ConcatDecoder}
