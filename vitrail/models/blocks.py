"""The Transformer's pre-norm block and its modules: MLPs, LayerScale, stochastic depth, patch dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.lookup import pick
from vitrail.models.attention import TokenLayout, build_attention
from vitrail.models.config import ViTConfig


class MLP(nn.Module):
    """Two linear layers with an activation between them, by default the exact GELU (erf), applied to each token alone."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.drop(self.fc2(self.drop(self.activation(self.fc1(x)))))


class SwiGLU(nn.Module):
    """An MLP whose hidden layer is gated: fc2(silu(a) · b), where a and b come from fc1 (Shazeer 2020).

    `fc1` holds both halves, as timm's `SwiGLUPacked`.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 2 * hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(F.silu(gate) * value)))


def quick_gelu(x: Tensor) -> Tensor:
    """Return x · sigmoid(1.702 x), the GELU of OpenAI's CLIP (openai/CLIP, clip/model.py)."""
    return x * torch.sigmoid(1.702 * x)


# All but gelu and swiglu exist to load weights that were trained with them.
MLPS = {
    "gelu": MLP,
    "gelu_tanh": partial(MLP, activation=partial(F.gelu, approximate="tanh")),
    "quick_gelu": partial(MLP, activation=quick_gelu),
    "relu": partial(MLP, activation=F.relu),
    "swiglu": SwiGLU,
}


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021, "Going deeper", eq. 4)."""

    def __init__(self, embed_dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((embed_dim,), initial))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth per sample: a residual branch that a random share of the samples skips (Huang et al. 2016).

    The branch is not computed for the samples that skip it, as in DINOv2 (Oquab et al. 2023, section 5). Each sample skips
    with probability `rate`: `int(B · rate)` of B are left out, and each of the others is dropped with the small
    probability that makes up the difference. So shapes do not depend on chance, and nothing waits for the device.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(
        self, x: Float[Tensor, "B N D"], branch: Callable[[Tensor, TokenLayout], Tensor], layout: TokenLayout
    ) -> Float[Tensor, "B N D"]:
        if not self.training or self.rate == 0.0:
            return x + branch(x, layout)
        count = x.shape[0]
        skipped = int(count * self.rate)
        rest = (count * self.rate - skipped) / max(1, count - skipped)
        kept = torch.rand(count, device=x.device).topk(count - skipped).indices
        out = branch(x[kept], layout.take(kept)) if skipped else branch(x, layout)
        scale = x.new_empty(out.shape[0], 1, 1).bernoulli_(1 - rest) / (1 - self.rate)
        if not skipped:
            return x + out * scale
        return x.index_add(0, kept, (out * scale).to(x.dtype))


class Block(nn.Module):
    """Attention, then MLP, each behind a layer norm and inside a residual connection."""

    def __init__(self, config: ViTConfig, attention: str, *, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attn = build_attention(config, attention)
        self.ls1 = LayerScale(dim, config.layer_scale) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = pick(MLPS, config.mlp, "model.mlp")(dim, config.hidden_dim, dropout=config.dropout)
        self.ls2 = LayerScale(dim, config.layer_scale) if config.layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B N D"], layout: TokenLayout = TokenLayout()) -> Float[Tensor, "B N D"]:  # noqa: B008
        x = self.drop_path(x, self.attention_branch, layout)
        return self.drop_path(x, self.mlp_branch, layout)

    def attention_branch(self, x: Float[Tensor, "B N D"], layout: TokenLayout) -> Float[Tensor, "B N D"]:
        """Return what the attention adds to the tokens."""
        return self.ls1(self.attn(self.norm1(x), layout))

    def mlp_branch(self, x: Float[Tensor, "B N D"], layout: TokenLayout) -> Float[Tensor, "B N D"]:
        """Return what the MLP adds to the tokens."""
        return self.ls2(self.mlp(self.norm2(x)))


class PatchDropout(nn.Module):
    """Leave out random patches while training, equally many of every sample (Liu et al. 2023, "PatchDropout")."""

    def __init__(self, rate: float, num_prefix: int) -> None:
        super().__init__()
        self.rate, self.num_prefix = rate, num_prefix

    def forward(self, x: Float[Tensor, "B N D"], layout: TokenLayout) -> tuple[Float[Tensor, "B M D"], TokenLayout]:
        if not self.training or self.rate == 0.0:
            return x, layout
        count = x.shape[1] - self.num_prefix
        keep = num_kept_patches(count, self.rate)
        kept = torch.rand(x.shape[0], count, device=x.device).topk(keep, dim=1).indices.sort(dim=1).values
        prefix = torch.arange(self.num_prefix, device=x.device).expand(x.shape[0], -1)
        kept = torch.cat([prefix, kept + self.num_prefix], dim=1)
        if layout.rope is not None:
            layout = layout._replace(rope=layout.rope[kept][:, None])
        return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), layout


def num_kept_patches(patches: int, rate: float) -> int:
    """Return how many patches `PatchDropout` keeps."""
    return max(1, round(patches * (1.0 - rate)))
