"""Where a patch is: learned tables, fixed sine-cosine tables, and their resize in two dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def sincos2d(grid: tuple[int, int], embed_dim: int, temperature: float = 10_000.0) -> Float[Tensor, "1 hw D"]:
    """Return the fixed 2-D sine-cosine table (Beyer et al. 2022, "Better plain ViT baselines", section 3).

    The first half of the channels encodes the column, the second half the row, as in big_vision's `posemb_sincos_2d`.
    """
    h, w = grid
    omega = temperature ** -torch.linspace(0, 1, embed_dim // 4, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    row, column = rows.reshape(-1, 1) * omega, columns.reshape(-1, 1) * omega
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()[None]


def resize_table(
    table: Float[Tensor, "1 N D"], source: tuple[int, int], target: tuple[int, int], num_prefix: int = 0
) -> Float[Tensor, "1 M D"]:
    """Resize a learned table from one patch grid to another; rows of prefix tokens stay as they are.

    Bicubic with antialiasing, as timm's `resample_abs_pos_embed` (timm 1.0, layers/pos_embed.py). Neither grid needs
    to be square.
    """
    if source == target:
        return table
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    image = rearrange(patches.float(), "1 (h w) D -> 1 D h w", h=source[0], w=source[1])
    image = F.interpolate(image, size=target, mode="bicubic", antialias=True)
    return torch.cat([prefix, rearrange(image, "1 D h w -> 1 (h w) D").to(table.dtype)], dim=1)
