"""Attention: who looks at whom."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.kernels.dense import attend
from vitrail.models.config import ViTConfig


class GlobalAttention(nn.Module):
    """Every token attends to every token (Dosovitskiy et al. 2021, eq. 5-8)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        q, k, v = rearrange(self.qkv(x), "B N (three K d) -> three B K N d", three=3, K=self.num_heads).unbind(0)
        x = attend(q, k, v, dropout=self.attention_dropout if self.training else 0.0)
        return self.proj_drop(self.proj(rearrange(x, "B K N d -> B N (K d)")))


def _global(config: ViTConfig) -> GlobalAttention:
    return GlobalAttention(
        config.embed_dim,
        config.num_heads,
        qkv_bias=config.qkv_bias,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
    )


ATTENTIONS = {"global": _global}
