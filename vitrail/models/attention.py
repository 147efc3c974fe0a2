"""Attention: who looks at whom."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.kernels.dense import attend
from vitrail.kernels.packed import attend_packed
from vitrail.models.config import ViTConfig
from vitrail.models.positions import rotate


class Layout(NamedTuple):
    """What attention must know of its tokens besides their vectors.

    Attributes:
        rope: sines and cosines of every token's place, [N, 2d], or [B, 1, N, 2d] where samples differ.
        lengths: tokens of each picture when several stand in one packed row; a token sees its own picture only.
    """

    rope: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def take(self, samples: Int[Tensor, " S"]) -> Layout:
        """Return the layout of some samples of a batch."""
        if self.rope is None or self.rope.ndim == 2:
            return self
        return self._replace(rope=self.rope[samples])


class GlobalAttention(nn.Module):
    """Every token attends to every token (Dosovitskiy et al. 2021, eq. 5-8)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        head_dim = embed_dim // num_heads
        self.q_norm = nn.LayerNorm(head_dim, eps=layer_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=layer_norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"], layout: Layout = Layout()) -> Float[Tensor, "B N D"]:  # noqa: B008
        q, k, v = rearrange(self.qkv(x), "B N (three K d) -> three B K N d", three=3, K=self.num_heads).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if layout.rope is not None:
            q, k = rotate(q, layout.rope), rotate(k, layout.rope)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm may have left them in fp32
        dropout = self.attention_dropout if self.training else 0.0
        if layout.lengths is None:
            x = attend(q, k, v, dropout=dropout)
        else:
            x = attend_packed(q, k, v, layout.lengths, dropout=dropout)
        return self.proj_drop(self.proj(rearrange(x, "B K N d -> B N (K d)")))


class AttentionPool(nn.Module):
    """One learned query looks at all patches, then an MLP (Zhai et al. 2022, "Scaling Vision Transformers", MAP head).

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
        x = self.proj(rearrange(attend(q, k, v), "B K N d -> B N (K d)"))
        return (x + self.mlp(self.norm(x)))[:, 0]


def _global(config: ViTConfig) -> GlobalAttention:
    return GlobalAttention(
        config.embed_dim,
        config.num_heads,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        layer_norm_eps=config.layer_norm_eps,
    )


ATTENTIONS = {"global": _global}
