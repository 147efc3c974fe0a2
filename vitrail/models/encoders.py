"""Encoder: image → feature map, one vector per patch."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.config import ViTConfig


class PatchEncoder(nn.Module):
    """ViT's own encoder: one linear map of every patch's pixels (Dosovitskiy et al. 2021, eq. 1).

    Written as a convolution whose stride is its kernel, which is the same map.
    """

    def __init__(self, in_channels: int, embed_dim: int, *, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return self.proj(images)


def _patch(config: ViTConfig) -> PatchEncoder:
    return PatchEncoder(config.in_channels, config.embed_dim, patch_size=config.patch_size)


ENCODERS = {"patch": _patch}
