"""What a Vision Transformer is made of, as one frozen value. Imports no torch: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

from vitrail.lookup import unknown
from vitrail.settings import setting

ENCODER_NAMES = ("patch",)
POSITION_NAMES = ("learned", "sincos2d", "none")
ATTENTION_NAMES = ("global",)
DECODER_NAMES = ("token", "mean", "concat")


@dataclass(frozen=True)
class ViTConfig:
    """The architecture: image → Encoder → Transformer → Decoder → logits.

    The defaults are ViT-B/16 (Dosovitskiy et al. 2021, table 1).

    Raises:
        ValueError: a value or a combination of values cannot work; the message names the field and a remedy.
    """

    image_size: int = setting(224, "side of the square input picture, pixels")
    patch_size: int = setting(16, "side of a square patch, pixels; divides image_size")
    in_channels: int = setting(3, "3: colour, 1: grey")
    num_classes: int = setting(1000, "number of labels; 0: no head, the model returns the pooled vector")
    encoder: str = setting("patch", f"what turns pixels into patch vectors: {', '.join(ENCODER_NAMES)}")
    embed_dim: int = setting(768, "width D of every token; a multiple of num_heads")
    depth: int = setting(12, "number of Transformer blocks")
    num_heads: int = setting(12, "attention heads K; each is D/K wide")
    mlp_ratio: float = setting(4.0, "hidden width of a block's MLP, as a multiple of embed_dim")
    qkv_bias: bool = setting(True, "bias in the query, key and value projections")
    attention: str = setting("global", f"who attends to whom: {', '.join(ATTENTION_NAMES)}")
    window: int = setting(0, "neighbourhood side of local attention, patches; 0 with global attention")
    positions: str = setting("learned", f"position encoding: {', '.join(POSITION_NAMES)}")
    class_token: bool = setting(True, "put a learned class token before the patches")
    num_registers: int = setting(0, "learned register tokens after the class token (Darcet et al. 2024)")
    decoder: str = setting("token", f"tokens to one vector: {', '.join(DECODER_NAMES)}")
    dropout: float = setting(0.0, "dropout after positions, attention, each MLP layer, and before the head")
    attention_dropout: float = setting(0.0, "dropout of attention weights")
    drop_path: float = setting(0.0, "stochastic depth: chance to skip the last block's branches; grows linearly")
    layer_scale: float = setting(0.0, "initial LayerScale (Touvron et al. 2021, CaiT); 0: none")
    patch_dropout: float = setting(0.0, "share of patches left out while training (Liu et al. 2023, FLIP)")
    layer_norm_eps: float = setting(1e-6, "epsilon of every layer norm")

    def __post_init__(self) -> None:
        for field in ("image_size", "patch_size", "embed_dim", "depth", "num_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} is {getattr(self, field)}; expected at least 1")
        for field in ("num_classes", "num_registers", "window"):
            if getattr(self, field) < 0:
                raise ValueError(f"model.{field} is {getattr(self, field)}; expected 0 or more")
        for field in ("dropout", "attention_dropout", "drop_path", "patch_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"model.{field} is {getattr(self, field)}; expected a share from 0 up to, not including, 1"
                )
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(unknown(f"model.{field}", getattr(self, field), known))
        if self.mlp_ratio <= 0 or self.layer_norm_eps <= 0 or self.layer_scale < 0:
            raise ValueError(
                f"model.mlp_ratio ({self.mlp_ratio}) and model.layer_norm_eps ({self.layer_norm_eps}) must be above 0, "
                f"model.layer_scale ({self.layer_scale}) 0 or more"
            )
        if self.in_channels not in (1, 3):
            raise ValueError(f"model.in_channels is {self.in_channels}; expected 3 (colour) or 1 (grey)")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}; "
                f"try --model.image_size {max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"model.embed_dim {self.embed_dim} is not a multiple of model.num_heads {self.num_heads}; "
                f"try --model.embed_dim {-(-self.embed_dim // self.num_heads) * self.num_heads}"
            )
        if self.positions == "sincos2d" and self.embed_dim % 4:
            raise ValueError(
                f"model.positions 'sincos2d' needs model.embed_dim to be a multiple of 4, got {self.embed_dim}"
            )
        if self.decoder == "token" and not self.class_token:
            raise ValueError("model.decoder 'token' reads the class token, but model.class_token is False; use 'mean'")
        if self.decoder == "concat" and self.patch_dropout:
            raise ValueError("model.patch_dropout leaves out patches that model.decoder 'concat' joins; set it to 0")
        if self.window:
            raise ValueError(
                f"model.window {self.window} has no effect with model.attention {self.attention!r}; leave it 0"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns (h, w) at `image_size`."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return int(self.class_token) + self.num_registers


_CHOICES = {
    "encoder": ENCODER_NAMES,
    "positions": POSITION_NAMES,
    "attention": ATTENTION_NAMES,
    "decoder": DECODER_NAMES,
}
