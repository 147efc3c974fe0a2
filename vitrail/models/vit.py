"""The Vision Transformer: image → Encoder → Transformer → Decoder → logits.

Legend: B batch, C channels, H W pixels, h w patch grid, N tokens (prefix + h·w), D width, K heads, d = D/K.
State-dict names are those of timm's `VisionTransformer`, so that public weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.lookup import pick
from vitrail.models.blocks import Block, PatchDropout
from vitrail.models.config import ViTConfig
from vitrail.models.decoders import DECODERS
from vitrail.models.encoders import ENCODERS
from vitrail.models.init import init_weights
from vitrail.models.positions import resize_table, sincos2d


class ViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021) in the article's three parts.

    Attributes:
        patch_embed: the encoder, images [B, C, H, W] → feature map [B, D, h, w].
        blocks: the Transformer's pre-norm blocks.
        decoder: tokens [B, N, D] and the feature map → one vector [B, D].
        head: the last linear layer, or the identity when `num_classes` is 0.
    """

    pos_fixed: Tensor | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.embed_dim, config.layer_norm_eps
        h, w = config.grid
        self.patch_embed = pick(ENCODERS, config.encoder, "model.encoder")(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.num_registers, dim)) if config.num_registers else None
        learned = config.positions == "learned"
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_prefix + h * w, dim)) if learned else None
        fixed = sincos2d(config.grid, dim) if config.positions == "sincos2d" else None
        self.register_buffer("pos_fixed", fixed, persistent=False)
        self.pos_drop = nn.Dropout(config.dropout)
        self.patch_drop = PatchDropout(config.patch_dropout, config.num_prefix)
        # Stochastic depth grows linearly from 0 in the first block to drop_path in the last (Huang et al. 2016).
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList([Block(config, drop_path=rate) for rate in rates])
        self.decoder = pick(DECODERS, config.decoder, "model.decoder")(config)
        after = self.decoder.norm_after_pooling
        self.norm = nn.Identity() if after else nn.LayerNorm(dim, eps=eps)
        self.fc_norm = nn.LayerNorm(dim, eps=eps) if after else nn.Identity()
        self.head_drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.decoder.out_dim, config.num_classes) if config.num_classes else nn.Identity()
        init_weights(self)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Return the logits, or the pooled vector when `num_classes` is 0."""
        encoded = self.encode(images)
        tokens = self.embed(encoded)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.head_drop(self.pool(encoded, self.norm(tokens))))

    def features(self, images: Float[Tensor, "B C H W"]) -> dict[str, Tensor]:
        """Return every intermediate by name.

        Keys: `encoder` [B, D, h, w]; `blocks.0` … [B, N, D], the output of each block; `transformer` [B, N, D], after
        the final norm; `pooled` [B, D]; `logits` [B, classes].
        """
        out = {"encoder": self.encode(images)}
        tokens = self.embed(out["encoder"])
        for i, block in enumerate(self.blocks):
            tokens = out[f"blocks.{i}"] = block(tokens)
        out["transformer"] = self.norm(tokens)
        out["pooled"] = self.pool(out["encoder"], out["transformer"])
        out["logits"] = self.head(self.head_drop(out["pooled"]))
        return out

    def encode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """Encoder: pixels → one vector per patch.

        Raises:
            ValueError: the pictures have other channels than the model, or a side that is no multiple of the patch.
        """
        patch, channels, size = self.config.patch_size, images.shape[1], tuple(images.shape[2:])
        if channels != self.config.in_channels:
            raise ValueError(f"pictures have {channels} channels, but model.in_channels is {self.config.in_channels}")
        if any(side < patch or side % patch for side in size):
            raise ValueError(
                f"picture size {size[0]}×{size[1]} is not a multiple of model.patch_size {patch}; resize or pad it"
            )
        return self.patch_embed(images)

    def embed(self, encoded: Float[Tensor, "B D h w"]) -> Float[Tensor, "B N D"]:
        """Put prefix tokens before the patch vectors and add positions."""
        tokens = rearrange(encoded, "B D h w -> B (h w) D")
        prefix = [
            token.expand(tokens.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None
        ]
        tokens = torch.cat([*prefix, tokens], dim=1) if prefix else tokens
        positions = self.positions((encoded.shape[2], encoded.shape[3]))
        return self.patch_drop(self.pos_drop(tokens if positions is None else tokens + positions))

    def pool(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        """Decoder: the encoder's and the Transformer's outputs → one vector per picture."""
        return self.fc_norm(self.decoder(encoded, tokens))

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"] | None:
        """Return the position table for a patch grid, prefix rows included, or None when there are no positions."""
        if self.pos_embed is not None:
            return resize_table(self.pos_embed, self.config.grid, grid, self.config.num_prefix)
        if self.pos_fixed is None:
            return None
        table = self.pos_fixed if grid == self.config.grid else sincos2d(grid, self.config.embed_dim).to(self.pos_fixed)
        return nn.functional.pad(table, (0, 0, self.config.num_prefix, 0))

    def positional_encoding(self, shape: Sequence[int]) -> Float[Tensor, "1 D h w"]:
        """Return what is added to each patch of pictures of `shape` ([B, C, H, W] or [H, W]), as a map.

        Raises:
            ValueError: the model has no additive positions.
        """
        h, w = shape[-2] // self.config.patch_size, shape[-1] // self.config.patch_size
        table = self.positions((h, w))
        if table is None:
            raise ValueError("this model has no position encoding to show: model.positions is 'none'")
        return rearrange(table[:, self.config.num_prefix :], "1 (h w) D -> 1 D h w", h=h, w=w)
