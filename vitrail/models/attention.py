"""Self-attention, global and local, and attention pooling."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vitrail.kernels.packed import attend_packed
from vitrail.kernels.registry import Kernels
from vitrail.kernels.window import window_mask
from vitrail.lookup import pick
from vitrail.models.config import ViTConfig
from vitrail.models.positions import rotate


class TokenLayout(NamedTuple):
    """How tokens are arranged in a batch, and the kernels that compute their attention.

    Attributes:
        rope: sines and cosines of every token's position, [N, 2d], or [B, 1, N, 2d] where samples differ.
        grids: patch rows and columns of the images. One: of every image of the batch. Several: a row of tokens holds
            these images one after the other, and a token attends within its own image.
        num_prefix: number of tokens before an image's patches.
        kernels: which kernels compute the attention.
    """

    rope: Tensor | None = None
    grids: tuple[tuple[int, int], ...] = ()
    num_prefix: int = 0
    kernels: Kernels = Kernels()

    def take(self, samples: Int[Tensor, " S"]) -> TokenLayout:
        """Return the layout of some samples of a batch."""
        if self.rope is None or self.rope.ndim == 2:
            return self
        return self._replace(rope=self.rope[samples])


class SelfAttention(nn.Module, ABC):
    """Multi-head self-attention: project to queries, keys and values, attend, project back.

    Subclasses define which tokens attend to which, in `attend`. Their weights have the same names and shapes.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        head_dim = head_dim or embed_dim // num_heads
        self.qkv = nn.Linear(embed_dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(head_dim, eps=layer_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=layer_norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(num_heads * head_dim, embed_dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"], layout: TokenLayout = TokenLayout()) -> Float[Tensor, "B N D"]:  # noqa: B008
        q, k, v = self.project(x, layout)
        return self.proj_drop(self.proj(rearrange(self.attend(q, k, v, layout), "B K N d -> B N (K d)")))

    def project(
        self, x: Float[Tensor, "B N D"], layout: TokenLayout
    ) -> tuple[Float[Tensor, "B K N d"], Float[Tensor, "B K N d"], Float[Tensor, "B K N d"]]:
        """Return the queries, keys and values of every head, as attention takes them."""
        q, k, v = rearrange(self.qkv(x), "B N (three K d) -> three B K N d", three=3, K=self.num_heads).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if layout.rope is not None:
            q, k = rotate(q, layout.rope), rotate(k, layout.rope)
        return q.to(v.dtype), k.to(v.dtype), v  # under autocast a norm may have left them in fp32

    def weights(self, x: Float[Tensor, "B N D"], layout: TokenLayout = TokenLayout()) -> Float[Tensor, "B K N N"]:  # noqa: B008
        """Return the attention weights, rows for queries, computed again in fp32; for explanations.

        The kernels never hold these N² values a head, and no hook could see them. Gradients flow through.

        Raises:
            ValueError: the layout has several images in a row of tokens.
        """
        if len(layout.grids) > 1:
            raise ValueError(f"weights of {len(layout.grids)} images packed in one row: give each image alone")
        q, k, _ = self.project(x, layout)
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        mask = self.mask(x.shape[1], layout)
        return (scores if mask is None else scores.masked_fill(~mask.to(x.device), float("-inf"))).softmax(dim=-1)

    @abstractmethod
    def mask(self, num_tokens: int, layout: TokenLayout) -> Bool[Tensor, "N N"] | None:
        """Return which keys (columns) each query (row) attends to; None where it is all."""

    @abstractmethod
    def attend(
        self, q: Float[Tensor, "B K N d"], k: Float[Tensor, "B K N d"], v: Float[Tensor, "B K N d"], layout: TokenLayout
    ) -> Float[Tensor, "B K N d"]:
        """Return each head's values, averaged with the attention weights."""


class GlobalAttention(SelfAttention):
    """Every token attends to every token (Dosovitskiy et al. 2021, eq. 5-8)."""

    def mask(self, num_tokens: int, layout: TokenLayout) -> None:
        return None

    def attend(
        self, q: Float[Tensor, "B K N d"], k: Float[Tensor, "B K N d"], v: Float[Tensor, "B K N d"], layout: TokenLayout
    ) -> Float[Tensor, "B K N d"]:
        dropout = self.attention_dropout if self.training else 0.0
        if len(layout.grids) <= 1:
            return layout.kernels.attend(q, k, v, dropout=dropout)
        return attend_packed(
            q, k, v, layout.grids, layout.num_prefix, lambda q, k, v, _: layout.kernels.attend(q, k, v, dropout=dropout)
        )


class LocalAttention(SelfAttention):
    """Each patch attends to its window of k×k patches and to the prefix tokens, and these attend to all.

    This is the article's small-block attention mask, computed without the mask (`vitrail.kernels`). A window over the
    whole grid is global attention. Without a layout the tokens must be the patches of a square grid.

    Raises:
        ValueError: the window is not odd, or the grid of the tokens is unknown.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int,
        head_dim: int = 0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            dropout=dropout,
            attention_dropout=attention_dropout,
            layer_norm_eps=layer_norm_eps,
        )
        if window < 1 or window % 2 == 0:
            raise ValueError(
                f"window is {window}; expected an odd number of patches, so that it has a middle, such as 7"
            )
        self.window = window

    def mask(self, num_tokens: int, layout: TokenLayout) -> Bool[Tensor, "N N"]:
        grid = layout.grids[0] if layout.grids else self._square(num_tokens)
        return window_mask(grid, self.window, layout.num_prefix)

    def attend(
        self, q: Float[Tensor, "B K N d"], k: Float[Tensor, "B K N d"], v: Float[Tensor, "B K N d"], layout: TokenLayout
    ) -> Float[Tensor, "B K N d"]:
        dropout = self.attention_dropout if self.training else 0.0
        grids = layout.grids or (self._square(q.shape[2]),)
        if len(grids) == 1:
            return layout.kernels.attend_local(q, k, v, grids[0], self.window, dropout=dropout)
        return attend_packed(
            q,
            k,
            v,
            grids,
            layout.num_prefix,
            lambda q, k, v, grid: layout.kernels.attend_local(q, k, v, grid, self.window, dropout=dropout),
        )

    def _square(self, tokens: int) -> tuple[int, int]:
        side = math.isqrt(tokens)
        if side**2 != tokens:
            raise ValueError(
                f"local attention must know the grid of its patches, and {tokens} tokens are no square; give a "
                "TokenLayout with grids=((rows, columns),), prefix tokens first"
            )
        return side, side


class AttentionPool(nn.Module):
    """One learned query that attends to all patches, then an MLP (Zhai et al. 2022, "Scaling Vision Transformers", MAP head).

    Names and arithmetic are those of timm's `AttentionPoolLatent`.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp: nn.Module, *, layer_norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.q = nn.Linear(embed_dim, embed_dim)
        self.kv = nn.Linear(embed_dim, 2 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.mlp = mlp

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        q = rearrange(self.q(self.latent).expand(x.shape[0], -1, -1), "B N (K d) -> B K N d", K=self.num_heads)
        k, v = rearrange(self.kv(x), "B N (two K d) -> two B K N d", two=2, K=self.num_heads).unbind(0)
        x = self.proj(rearrange(Kernels().attend(q, k, v), "B K N d -> B N (K d)"))
        return (x + self.mlp(self.norm(x)))[:, 0]


def build_attention(config: ViTConfig, name: str) -> SelfAttention:
    """Return the attention module of this name (`global` or `local`) for a configuration."""
    settings: dict[str, Any] = {
        "head_dim": config.head_dim,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "layer_norm_eps": config.layer_norm_eps,
    }
    if name == "local":
        settings["window"] = config.window
    return pick(ATTENTIONS, name, "model.attention")(config.embed_dim, config.num_heads, **settings)


ATTENTIONS: dict[str, Callable[..., SelfAttention]] = {"global": GlobalAttention, "local": LocalAttention}
