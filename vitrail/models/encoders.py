"""Encoders: from the image to a feature map with one vector per patch."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.models.config import ViTConfig


class PatchEncoder(nn.Module):
    """ViT's own encoder: a linear projection of every patch's pixels (Dosovitskiy et al. 2021, eq. 1).

    Written as a convolution whose stride is its kernel size, which is the same. The kernel can be resized to any other
    patch size (Beyer et al. 2023, FlexiViT): see `resize_kernel`.
    """

    def __init__(self, in_channels: int, embed_dim: int, *, patch_size: int, patch_sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        for size in {*patch_sizes} - {patch_size}:  # a pseudo-inverse takes longer than a training step: once is enough
            self.register_buffer(f"resize_{size}", kernel_resize(patch_size, size), persistent=False)

    def forward(self, images: Float[Tensor, "B C H W"], patch_size: int | None = None) -> Float[Tensor, "B D h w"]:
        if patch_size is None or patch_size == self.patch_size:
            return self.proj(images)
        return F.conv2d(images, self.kernel(patch_size), self.proj.bias, stride=patch_size)

    def kernel(self, patch_size: int) -> Float[Tensor, "D C P P"]:
        """Return the kernel resized to another patch size, from the trained one."""
        weight = self.proj.weight
        matrix = getattr(self, f"resize_{patch_size}", None)
        if matrix is None:
            matrix = kernel_resize(self.patch_size, patch_size).to(weight.device)
        return resize_kernel(weight, matrix)


class NormedPatchEncoder(nn.Module):
    """The patch encoder between two layer norms (Kumar et al. 2023, "Dual PatchNorm"), as in vit-pytorch's `SimpleViT`."""

    def __init__(self, in_channels: int, embed_dim: int, *, patch_size: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_in = nn.LayerNorm(in_channels * patch_size**2, eps=layer_norm_eps)
        self.proj = nn.Linear(in_channels * patch_size**2, embed_dim)
        self.norm_out = nn.LayerNorm(embed_dim, eps=layer_norm_eps)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        patches = rearrange(images, "B C (h p) (w q) -> B h w (C p q)", p=self.patch_size, q=self.patch_size)
        return rearrange(self.norm_out(self.proj(self.norm_in(patches))), "B h w D -> B D h w")


class ConvEncoder(nn.Module):
    """Overlapping 3×3 convolutions that halve the image until one pixel is a patch (Xiao et al. 2021, "Early
    convolutions help transformers see better", section 4).

    Layer norm over channels instead of the paper's batch norm: an image's vector then depends on that image alone,
    whatever the batch size, gradient accumulation or number of processes.
    """

    def __init__(self, in_channels: int, embed_dim: int, *, patch_size: int, layer_norm_eps: float = 1e-6) -> None:
        super().__init__()
        widths = [embed_dim * 2**i * 2 // patch_size for i in range(patch_size.bit_length() - 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, kernel_size=3, stride=2, padding=1, bias=False)
            for before, width in zip([in_channels, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=layer_norm_eps) for width in widths)
        self.proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        # Channels last: the layer norm then needs no copy, and oneDNN's convolutions are fastest so.
        x = images.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.gelu(norm(conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.proj(x)


class CnnEncoder(nn.Module):
    """A CNN's feature map at a stride, projected 1×1 to the model's width (the article's ResNet and EfficientNet
    encoders; Dosovitskiy et al. 2021, section 3.1, "Hybrid architecture").

    Names are those of timm's `HybridEmbed`.
    """

    def __init__(self, backbone: nn.Module, num_features: int, embed_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.proj = nn.Conv2d(num_features, embed_dim, kernel_size=1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        features = self.backbone(images)
        return self.proj(features[-1] if isinstance(features, (list, tuple)) else features)


@cache
def kernel_resize(source: int, target: int) -> Float[Tensor, "t s"]:
    """Return the matrix that resizes a flattened patch kernel from one side to another.

    It is the pseudo-inverse of a bicubic, antialiased resize of patches: the new kernel gives a resized patch the same
    vector as the old kernel gives the patch (Beyer et al. 2023, FlexiViT, section 3.4; timm's `resample_patch_embed`).
    """
    pixels = torch.eye(source**2, device="cpu").view(source**2, 1, source, source)
    resized = F.interpolate(pixels, size=(target, target), mode="bicubic", antialias=True)
    return torch.linalg.pinv(resized.view(source**2, target**2))


def resize_kernel(weight: Float[Tensor, "D C P Q"], matrix: Float[Tensor, "t s"]) -> Float[Tensor, "D C S T"]:
    """Return a patch kernel resized by a matrix of `kernel_resize`; differentiable."""
    side = round(matrix.shape[0] ** 0.5)
    # In fp32 also under autocast: a kernel rounded twice would differ from the trained one.
    with torch.autocast(weight.device.type, enabled=False):
        return (weight.float().flatten(2) @ matrix.float().T).unflatten(2, (side, side)).to(weight.dtype)


def _patch(config: ViTConfig) -> PatchEncoder | NormedPatchEncoder:
    shape = {"in_channels": config.in_channels, "embed_dim": config.embed_dim, "patch_size": config.patch_size}
    if config.patch_norm:
        return NormedPatchEncoder(**shape, layer_norm_eps=config.layer_norm_eps)
    return PatchEncoder(**shape, patch_sizes=config.patch_sizes)


def _conv(config: ViTConfig) -> ConvEncoder:
    return ConvEncoder(
        config.in_channels, config.embed_dim, patch_size=config.patch_size, layer_norm_eps=config.layer_norm_eps
    )


def _r50(config: ViTConfig) -> CnnEncoder:
    """Return ViT's own ResNet-50: group norm, weight standardisation, and at stride 16 the last stage's blocks in the
    stage before (Dosovitskiy et al. 2021, section 4.1)."""
    from functools import partial

    from timm.layers.std_conv import StdConv2dSame
    from timm.models import ResNetV2

    backbone = ResNetV2(
        layers=[3, 4, 9] if config.patch_size == 16 else [3, 4, 6, 3],
        num_classes=0,
        global_pool="",
        in_chans=config.in_channels,
        preact=False,
        stem_type="same",
        conv_layer=partial(StdConv2dSame, eps=1e-8),
    )
    return CnnEncoder(backbone, backbone.num_features, config.embed_dim)


def _timm(config: ViTConfig) -> CnnEncoder:
    from vitrail.models.cnns import build_cnn

    backbone, num_features = build_cnn(config.encoder, config.patch_size, config.in_channels, config.image_size)
    return CnnEncoder(backbone, num_features, config.embed_dim)


ENCODERS = {"patch": _patch, "conv": _conv, "r50": _r50}


def build_encoder(config: ViTConfig) -> nn.Module:
    """Return the encoder that a configuration names.

    Raises:
        ValueError: there is no such encoder, nor a CNN of that name in timm, or it has no feature map of the stride.
    """
    return ENCODERS.get(config.encoder, _timm)(config)
