"""Position encodings: fixed sine-cosine tables, rotary positions, and learned tables resized to any grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def sincos2d(
    grid: tuple[int, int], embed_dim: int, *, source: tuple[int, int] | None = None, temperature: float = 10_000.0
) -> Float[Tensor, "1 hw D"]:
    """Return the fixed 2-D sine-cosine table (Beyer et al. 2022, "Better plain ViT baselines", section 3).

    The first half of the channels encodes the column, the second half the row, as in big_vision's `posemb_sincos_2d`.

    Args:
        grid: patch rows and columns (h, w).
        source: the grid in training; on another grid positions are measured in its units, so that a patch in the middle
            of the image is in the middle of the table, as when a learned table is resized.
    """
    h, w = grid
    # On the CPU even where a model is built without storage: tables are in no file.
    omega = temperature ** -torch.linspace(0, 1, embed_dim // 4, dtype=torch.float64, device="cpu")
    rows, columns = (
        (torch.arange(to, dtype=torch.float64, device="cpu") + 0.5) * (of / to) - 0.5
        for to, of in zip(grid, source or grid, strict=True)
    )
    row, column = rows.repeat_interleave(w)[:, None] * omega, columns.repeat(h)[:, None] * omega
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1).float()[None]


def rope2d(grid: tuple[int, int], head_dim: int, *, num_prefix: int = 0, base: float = 100.0) -> Float[Tensor, "N dd"]:
    """Return the sines and cosines, side by side, that rotate queries and keys by the position of their patch.

    Axial rotary positions as in DINOv3 (Siméoni et al. 2025; `RopePositionEmbedding`): positions are the patches' centres
    in -1 to 1 along each axis, whatever the grid, so another image size needs no change. The first quarter of a head
    rotates with the row, the second with the column, each paired with a channel of the other half. Prefix tokens are not
    rotated.
    """
    h, w = grid
    periods = base ** (torch.arange(head_dim // 4, dtype=torch.float32, device="cpu") * (4 / head_dim))
    rows, columns = ((torch.arange(side, device="cpu") + 0.5) / side * 2 - 1 for side in grid)
    positions = torch.stack([rows.repeat_interleave(w), columns.repeat(h)], dim=1)
    angles = (2 * math.pi * positions[:, :, None] / periods).flatten(1).tile(2)
    angles = F.pad(angles, (0, 0, num_prefix, 0))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def rotate(x: Float[Tensor, "B K N d"], table: Float[Tensor, "*samples N dd"]) -> Float[Tensor, "B K N d"]:
    """Rotate queries or keys by a table of `rope2d`, [N, 2d] or [B, 1, N, 2d]; channel i is paired with i + d/2."""
    sine, cosine = table.chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    # The table is fp32 and lifts bf16 queries to it: a rotation by a rounded angle would shift positions.
    return (x * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)


def resize_table(
    table: Float[Tensor, "1 N D"], source: tuple[int, int], target: tuple[int, int], num_prefix: int = 0
) -> Float[Tensor, "1 M D"]:
    """Return a learned table resized from one patch grid to another; rows of prefix tokens stay as they are.

    Bicubic with antialiasing, as timm's `resample_abs_pos_embed` (timm 1.0, layers/pos_embed.py). Neither grid needs
    to be square.
    """
    if source == target:
        return table
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    image = rearrange(patches.float(), "1 (h w) D -> 1 D h w", h=source[0], w=source[1])
    image = F.interpolate(image, size=target, mode="bicubic", antialias=True)
    return torch.cat([prefix, rearrange(image, "1 D h w -> 1 (h w) D").to(table.dtype)], dim=1)
