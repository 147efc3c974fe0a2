"""The Vision Transformer: image → Encoder → Transformer → Decoder → logits.

Legend: B batch, C channels, H W pixels, h w patch grid, N tokens (prefix + h·w), D width, K heads, d = D/K.
State-dict names are those of timm's `VisionTransformer`, so that public weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.kernels.registry import Kernels
from vitrail.lookup import pick
from vitrail.models.attention import TokenLayout
from vitrail.models.blocks import Block, PatchDropout
from vitrail.models.config import ViTConfig
from vitrail.models.decoders import DECODERS
from vitrail.models.encoders import PatchEncoder, build_encoder
from vitrail.models.init import init_weights
from vitrail.models.positions import resize_table, rope2d, sincos2d


class ViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021) in the article's three parts.

    Attributes:
        patch_embed: the encoder, images [B, C, H, W] → feature map [B, D, h, w].
        blocks: the Transformer's pre-norm blocks.
        decoder: tokens [B, N, D] and the feature map → one vector [B, D].
        head: the last linear layer, or the identity when `num_classes` is 0.
        kernels: which kernels compute attention; a fixed rule decides unless `vitrail.kernels.autotune` has measured.
    """

    pos_fixed: Tensor | None
    rope: Tensor | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.embed_dim, config.layer_norm_eps
        h, w = config.grid
        self.patch_embed = build_encoder(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.num_registers, dim)) if config.num_registers else None
        learned = config.positions == "learned"
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_prefix + h * w, dim)) if learned else None
        fixed = sincos2d(config.grid, dim) if config.positions == "sincos2d" else None
        self.register_buffer("pos_fixed", fixed, persistent=False)
        rope = self._rope(config.grid) if config.positions == "rope2d" else None
        self.register_buffer("rope", rope, persistent=False)
        self.pos_drop = nn.Dropout(config.dropout)
        self.patch_drop = PatchDropout(config.patch_dropout, config.num_prefix)
        # Stochastic depth grows linearly from 0 in the first block to drop_path in the last (Huang et al. 2016).
        rates = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            [Block(config, name, drop_path=rate) for name, rate in zip(config.attentions, rates, strict=True)]
        )
        self.kernels = Kernels()
        self.decoder = pick(DECODERS, config.decoder, "model.decoder")(config)
        pooled = config.decoder == "mean" and config.fc_norm
        self.norm = nn.Identity() if pooled else nn.LayerNorm(dim, eps=eps)
        self.fc_norm = nn.LayerNorm(dim, eps=eps) if pooled else nn.Identity()
        self.head_drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.decoder.out_dim, config.num_classes) if config.num_classes else nn.Identity()
        init_weights(self, config.init)

    def forward(self, images: Float[Tensor, "B C H W"], patch_size: int | None = None) -> Float[Tensor, "B classes"]:
        """Return the logits, or the pooled vector when `num_classes` is 0.

        Images may have any size and aspect ratio; see `encode` for sides that are no multiple of the patch.

        Args:
            patch_size: cut the images into patches of this side instead of the configuration's (FlexiViT).
        """
        encoded = self.encode(images, patch_size)
        tokens, layout = self.embed(encoded)
        for block in self.blocks:
            tokens = block(tokens, layout)
        return self.head(self.head_drop(self.pool(encoded, self.norm(tokens))))

    def features(self, images: Float[Tensor, "B C H W"], patch_size: int | None = None) -> dict[str, Tensor]:
        """Return every intermediate result by name.

        Keys: `encoder` [B, D, h, w]; `blocks.0` … [B, N, D], the output of each block; `transformer` [B, N, D], after
        the final norm; `pooled` [B, E], the input of the head (E is 2D for decoder `token_mean`, else D); `logits`
        [B, classes].
        """
        out = {"encoder": self.encode(images, patch_size)}
        tokens, layout = self.embed(out["encoder"])
        for i, block in enumerate(self.blocks):
            tokens = out[f"blocks.{i}"] = block(tokens, layout)
        out["transformer"] = self.norm(tokens)
        out["pooled"] = self.pool(out["encoder"], out["transformer"])
        out["logits"] = self.head(self.head_drop(out["pooled"]))
        return out

    def forward_packed(
        self, images: Sequence[Float[Tensor, "C _H _W"]], patch_size: int | None = None
    ) -> Float[Tensor, "B classes"]:
        """Return the logits of images of different sizes, computed together as one sequence of tokens.

        Equal to calling the model on each image alone: each token attends within its own image (Dehghani et al. 2023,
        NaViT). The linear layers see all images at once, attention costs what each image costs alone.

        Raises:
            ValueError: the model is in training mode, where a sample's dropout would depend on its neighbours.
        """
        if self.training:
            raise ValueError("packed images are for inference and evaluation; call model.eval() first")
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        order = sorted(range(len(images)), key=sizes.__getitem__)
        encoded, rows, ropes, grids = [], [], [], []
        for _, group in groupby(order, key=sizes.__getitem__):
            encoded.append(self.encode(torch.stack([images[i] for i in group]), patch_size))
            tokens, layout = self.embed(encoded[-1])
            rows.append(tokens.flatten(0, 1))
            grids.append(layout.grids[0])
            if layout.rope is not None:
                ropes.append(layout.rope.repeat(len(tokens), 1))
        if not rows:
            return self(next(self.parameters()).new_empty(0, self.config.in_channels, *2 * (self.config.image_size,)))
        counts = [len(maps) for maps in encoded]
        layout = TokenLayout(
            rope=torch.cat(ropes) if ropes else None,
            grids=tuple(grid for grid, count in zip(grids, counts, strict=True) for _ in range(count)),
            num_prefix=self.config.num_prefix,
            kernels=self.kernels,
        )
        tokens = torch.cat(rows)[None]
        for block in self.blocks:
            tokens = block(tokens, layout)
        lengths = [self.config.num_prefix + h * w for h, w in grids]
        groups = self.norm(tokens)[0].split([length * count for length, count in zip(lengths, counts, strict=True)])
        pooled = [
            self.pool(maps, group.unflatten(0, (len(maps), -1))) for maps, group in zip(encoded, groups, strict=True)
        ]
        logits = self.head(torch.cat(pooled))
        return logits[torch.tensor(order, device=logits.device).argsort()]

    def encode(self, images: Float[Tensor, "B C H W"], patch_size: int | None = None) -> Float[Tensor, "B D h w"]:
        """Return the encoder's output, one vector per patch.

        A side that is no multiple of the patch is padded with zeros (the mean colour, after normalisation) at the right
        and at the bottom, up to the next multiple, as timm's `dynamic_img_pad` does.

        Raises:
            ValueError: the images have other channels than the model, a side is smaller than a patch, or the encoder
                has no other patch size.
        """
        patch = self.config.patch_size if patch_size is None else patch_size
        channels, (height, width) = images.shape[1], images.shape[2:]
        self.check_patch_size(patch)
        if channels != self.config.in_channels:
            raise ValueError(f"images have {channels} channels, but model.in_channels is {self.config.in_channels}")
        if height < patch or width < patch:
            raise ValueError(f"images of {height}×{width} are smaller than a patch of {patch}×{patch}; enlarge them")
        if height % patch or width % patch:
            images = nn.functional.pad(images, (0, -width % patch, 0, -height % patch))
        if patch == self.config.patch_size:
            return self.patch_embed(images)
        return self.patch_embed(images, patch)

    def check_patch_size(self, patch_size: int) -> None:
        """Raise a ValueError unless this model can cut images into patches of this side."""
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}; expected at least 1 pixel")
        if patch_size != self.config.patch_size and not isinstance(self.patch_embed, PatchEncoder):
            raise ValueError(
                f"patch_size {patch_size}: this model's encoder has patches of {self.config.patch_size} only; other sizes "
                "need model.encoder 'patch' without model.patch_norm"
            )

    def embed(self, encoded: Float[Tensor, "B D h w"]) -> tuple[Float[Tensor, "B N D"], TokenLayout]:
        """Return the tokens, prefix tokens first and positions added, and their layout for attention."""
        tokens = encoded.flatten(2).transpose(1, 2)
        grid = (encoded.shape[2], encoded.shape[3])
        prefix = [
            token.expand(tokens.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None
        ]
        tokens = torch.cat([*prefix, tokens], dim=1) if prefix else tokens
        positions = self.positions(grid)
        tokens = self.pos_drop(tokens if positions is None else tokens + positions)
        rope = self.rope if self.rope is None or grid == self.config.grid else self._rope(grid).to(self.rope)
        return self.patch_drop(tokens, TokenLayout(rope, (grid,), self.config.num_prefix, self.kernels))

    def pool(self, encoded: Float[Tensor, "B D h w"], tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B E"]:
        """Return the decoder's output, one vector per image, from those of the encoder and the Transformer."""
        return self.fc_norm(self.decoder(encoded, tokens))

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 N D"] | None:
        """Return what is added to the tokens of a patch grid, prefix rows included; None when nothing is added."""
        if self.pos_embed is not None:
            return resize_table(self.pos_embed, self.config.grid, grid, self.config.num_prefix)
        if self.pos_fixed is None:
            return None
        table = self.pos_fixed
        if grid != self.config.grid:
            table = sincos2d(grid, self.config.embed_dim, source=self.config.grid).to(table)
        return nn.functional.pad(table, (0, 0, self.config.num_prefix, 0))

    def positional_encoding(self, shape: Sequence[int]) -> Float[Tensor, "1 D h w"]:
        """Return what is added to each patch of images of `shape` ([B, C, H, W] or [H, W]), as a map.

        Raises:
            ValueError: the model adds no positions.
        """
        h, w = -(-shape[-2] // self.config.patch_size), -(-shape[-1] // self.config.patch_size)
        table = self.positions((h, w))
        if table is None:
            why = "they rotate queries and keys" if self.rope is not None else "it has none"
            raise ValueError(
                f"this model adds no positions to show: model.positions is {self.config.positions!r}, {why}"
            )
        return rearrange(table[:, self.config.num_prefix :], "1 (h w) D -> 1 D h w", h=h, w=w)

    def _rope(self, grid: tuple[int, int]) -> Tensor:
        return rope2d(grid, self.config.head_width, num_prefix=self.config.num_prefix)
