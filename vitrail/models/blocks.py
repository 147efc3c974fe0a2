"""The Transformer's pre-norm block and its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.lookup import pick
from vitrail.models.attention import ATTENTIONS
from vitrail.models.config import ViTConfig


class MLP(nn.Module):
    """Two linear layers with a GELU between, applied to every token alone.

    The GELU is the exact one (erf): in bfloat16 on CPUs the tanh form takes four times as long.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021, "Going deeper", eq. 4)."""

    def __init__(self, embed_dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((embed_dim,), initial))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth per sample: drop a whole residual branch, scale the rest up (Huang et al. 2016, section 3)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * (x.new_empty(x.shape[0], 1, 1).bernoulli_(keep) / keep)


class Block(nn.Module):
    """Attention, then MLP, each behind a layer norm and inside a residual connection."""

    def __init__(self, config: ViTConfig, *, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attn = pick(ATTENTIONS, config.attention, "model.attention")(config)
        self.ls1 = LayerScale(dim, config.layer_scale) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = MLP(dim, int(dim * config.mlp_ratio), dropout=config.dropout)
        self.ls2 = LayerScale(dim, config.layer_scale) if config.layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchDropout(nn.Module):
    """While training, keep a random subset of the patches, the same number in every sample (Liu et al. 2023, FLIP)."""

    def __init__(self, rate: float, num_prefix: int) -> None:
        super().__init__()
        self.rate, self.num_prefix = rate, num_prefix

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B M D"]:
        if not self.training or self.rate == 0.0:
            return x
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        keep = max(1, round(patches.shape[1] * (1.0 - self.rate)))
        chosen = torch.rand(patches.shape[:2], device=x.device).topk(keep, dim=1).indices.sort(dim=1).values
        patches = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2]))
        return torch.cat([prefix, patches], dim=1)
