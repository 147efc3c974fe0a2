"""Decoders: from the tokens to one vector per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.attention import AttentionPool
from vitrail.models.blocks import MLPS
from vitrail.models.config import ViTConfig


class TokenDecoder(nn.Module):
    """Takes the class token (Dosovitskiy et al. 2021, eq. 4)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.out_dim = config.embed_dim

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        return tokens[:, 0]


class MeanDecoder(nn.Module):
    """Takes the mean of the patch tokens, as timm's `global_pool="avg"`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_prefix, self.out_dim = config.num_prefix, config.embed_dim

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        return tokens[:, self.num_prefix :].mean(dim=1)


class TokenMeanDecoder(nn.Module):
    """Concatenates the class token and the mean of the patch tokens (Oquab et al. 2023, DINOv2, section 7.1)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_prefix, self.out_dim = config.num_prefix, 2 * config.embed_dim

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix :].mean(dim=1)], dim=1)


class TokenPairDecoder(nn.Module):
    """Concatenates the class token and the first register, for the two heads of a distilled DeiT (Touvron et al. 2021,
    section 4; one head [W/2, W'/2] over both is the mean of the two)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.out_dim = 2 * config.embed_dim

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        return tokens[:, :2].flatten(1)


class AttentionDecoder(nn.Module):
    """Pools the patch tokens by attention, as timm's `global_pool="map"`; its MLP has the blocks' activation, ungated."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_prefix, self.out_dim = config.num_prefix, config.embed_dim
        self.attn_pool = AttentionPool(
            config.embed_dim,
            config.num_heads,
            MLPS["gelu" if config.mlp == "swiglu" else config.mlp](
                config.embed_dim, config.hidden_dim, dropout=config.dropout
            ),
            layer_norm_eps=config.layer_norm_eps,
        )

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        return self.attn_pool(tokens[:, self.num_prefix :])


class ConcatDecoder(nn.Module):
    """The article's decoder: concatenates the encoder's and the Transformer's output of every patch, pools, and applies an MLP.

        encoder output     [B, D, h, w] ─ norm ─┐
                                                ├─ join [B, h·w, 2D] ─ mean [B, 2D] ─ Linear, GELU [B, D] ─ head
        Transformer output [B, h·w, D] ─────────┘

    Concatenation and the mean over patches can be swapped, so each output is pooled on its own and the joined table of
    h·w rows is never made.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_prefix, self.out_dim = config.num_prefix, config.embed_dim
        # The encoder's raw output has another scale than the normalised Transformer's.
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.join = nn.Linear(2 * config.embed_dim, config.embed_dim)

    def forward(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        patches = self.norm(encoded.flatten(2).transpose(1, 2))
        joined = torch.cat([patches.mean(dim=1), tokens[:, self.num_prefix :].mean(dim=1)], dim=1)
        return F.gelu(self.join(joined))


DECODERS = {
    "token": TokenDecoder,
    "mean": MeanDecoder,
    "token_mean": TokenMeanDecoder,
    "token_pair": TokenPairDecoder,
    "attention": AttentionDecoder,
    "concat": ConcatDecoder,
}
