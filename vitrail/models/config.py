"""The configuration of a Vision Transformer, as one frozen value. Imports no torch: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

from vitrail.config_schema import setting
from vitrail.lookup import unknown

ENCODER_NAMES = ("patch", "conv", "r50")  # and every CNN of timm by its own name
POSITION_NAMES = ("learned", "sincos2d", "rope2d", "none")
ATTENTION_NAMES = ("global", "local")
DECODER_NAMES = ("token", "mean", "token_mean", "token_pair", "attention", "concat")
MLP_NAMES = ("gelu", "gelu_tanh", "quick_gelu", "relu", "swiglu")
INIT_NAMES = ("normal", "mimetic")


@dataclass(frozen=True)
class ViTConfig:
    """The architecture: image → Encoder → Transformer → Decoder → logits.

    The defaults are ViT-B/16 (Dosovitskiy et al. 2021, table 1).

    Raises:
        ValueError: a value or a combination of values cannot work; the message names the field and a remedy.
    """

    image_size: int = setting(224, "side of the square input image, pixels")
    patch_size: int = setting(16, "pixels per token along a side: the patch, or the stride of a convolutional encoder")
    patch_sizes: tuple[int, ...] = setting(
        (), "train with a random one of these per step (Beyer et al. 2023, FlexiViT)"
    )
    patch_norm: bool = setting(False, "layer norms before and after the patch projection (Kumar et al. 2023)")
    in_channels: int = setting(3, "3: colour, 1: grey")
    num_classes: int = setting(1000, "number of labels; 0: no head, the model returns the pooled vector")
    encoder: str = setting(
        "patch", "what turns pixels into patch vectors: patch, conv, r50, or a CNN of timm such as resnet50"
    )
    embed_dim: int = setting(768, "width D of every token; a multiple of num_heads")
    depth: int = setting(12, "number of Transformer blocks")
    num_heads: int = setting(12, "attention heads K")
    head_dim: int = setting(0, "width d of a head; 0: embed_dim / num_heads")
    mlp: str = setting("gelu", f"a block's MLP: {', '.join(MLP_NAMES)}")
    mlp_ratio: float = setting(4.0, "hidden width of a block's MLP, as a multiple of embed_dim; swiglu of 2.67 costs 4")
    qkv_bias: bool = setting(True, "bias in the query, key and value projections")
    qk_norm: bool = setting(False, "layer norm of every head's queries and keys (Dehghani et al. 2023, ViT-22B)")
    attention: str = setting(
        "global",
        "who attends to whom: global, local (each patch to its window and the prefix tokens), or a pattern that repeats over "
        "the blocks, such as local,local,global",
    )
    window: int = setting(0, "local attention: side of the window, patches, odd, such as 7; 0 with global attention")
    positions: str = setting("learned", f"position encoding: {', '.join(POSITION_NAMES)}")
    class_token: bool = setting(True, "put a learned class token before the patches")
    num_registers: int = setting(0, "learned register tokens after the class token (Darcet et al. 2024)")
    decoder: str = setting("token", f"tokens to one vector: {', '.join(DECODER_NAMES)}")
    fc_norm: bool = setting(True, "decoder mean: layer norm after pooling, as in timm, and not before")
    dropout: float = setting(0.0, "dropout after positions, attention, each MLP layer, and before the head")
    attention_dropout: float = setting(0.0, "dropout of attention weights")
    drop_path: float = setting(0.0, "stochastic depth: chance to skip the last block's branches; grows linearly")
    layer_scale: float = setting(0.0, "initial LayerScale (Touvron et al. 2021, CaiT); 0: none")
    patch_dropout: float = setting(0.0, "share of patches left out while training (Liu et al. 2023, PatchDropout)")
    layer_norm_eps: float = setting(1e-6, "epsilon of every layer norm")
    init: str = setting("normal", f"how weights start: {', '.join(INIT_NAMES)}")

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_attention()
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(unknown(f"model.{field}", getattr(self, field), known))
        self._check_sizes()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for field in ("image_size", "patch_size", "embed_dim", "depth", "num_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} is {getattr(self, field)}; expected at least 1")
        for field in ("num_classes", "num_registers", "window", "head_dim"):
            if getattr(self, field) < 0:
                raise ValueError(f"model.{field} is {getattr(self, field)}; expected 0 or more")
        for field in ("dropout", "attention_dropout", "drop_path", "patch_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"model.{field} is {getattr(self, field)}; expected a share from 0 up to, not including, 1"
                )
        if self.mlp_ratio <= 0 or self.layer_norm_eps <= 0 or self.layer_scale < 0:
            raise ValueError(
                f"model.mlp_ratio ({self.mlp_ratio}) and model.layer_norm_eps ({self.layer_norm_eps}) must be above 0, "
                f"model.layer_scale ({self.layer_scale}) 0 or more"
            )
        if self.in_channels not in (1, 3):
            raise ValueError(f"model.in_channels is {self.in_channels}; expected 3 (colour) or 1 (grey)")

    def _check_sizes(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}; "
                f"try --model.image_size {max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        if self.embed_dim % self.num_heads and not self.head_dim:
            raise ValueError(
                f"model.embed_dim {self.embed_dim} is not a multiple of model.num_heads {self.num_heads}; "
                f"try --model.embed_dim {-(-self.embed_dim // self.num_heads) * self.num_heads}"
            )
        if self.head_dim and self.init == "mimetic" and self.head_dim * self.num_heads != self.embed_dim:
            raise ValueError(
                f"model.init 'mimetic' needs heads that are together as wide as the tokens, but model.num_heads "
                f"{self.num_heads} × model.head_dim {self.head_dim} is not model.embed_dim {self.embed_dim}"
            )
        if self.decoder == "attention" and self.embed_dim % self.num_heads:
            raise ValueError(
                f"model.decoder 'attention' divides model.embed_dim {self.embed_dim} among model.num_heads "
                f"{self.num_heads} heads; make it a multiple"
            )
        if self.positions == "sincos2d" and self.embed_dim % 4:
            raise ValueError(
                f"model.positions 'sincos2d' needs model.embed_dim to be a multiple of 4, got {self.embed_dim}"
            )
        if self.positions == "rope2d" and self.head_width % 4:
            raise ValueError(
                f"model.positions 'rope2d' turns pairs of rows and of columns, so a head's width must be a multiple of 4, "
                f"got {self.head_width} (model.head_dim, or model.embed_dim {self.embed_dim} / model.num_heads "
                f"{self.num_heads})"
            )
        unfit = [size for size in self.patch_sizes if size < 1 or self.image_size % size]
        if unfit or len(set(self.patch_sizes)) != len(self.patch_sizes):
            fitting = [size for size in range(2, self.image_size // 2 + 1) if self.image_size % size == 0]
            raise ValueError(
                f"model.patch_sizes {' '.join(map(str, self.patch_sizes))}: each must divide model.image_size "
                f"{self.image_size} and stand once; these divide it: {' '.join(map(str, fitting))}"
            )
        if self.patch_sizes and self.patch_size not in self.patch_sizes:
            raise ValueError(
                f"model.patch_size {self.patch_size}, at which the run is evaluated, is not among model.patch_sizes "
                f"{' '.join(map(str, self.patch_sizes))}; add it, or try --model.patch_size {max(self.patch_sizes)}"
            )
        if self.encoder == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(
                f"model.encoder 'conv' halves the image with every layer, so model.patch_size must be a power of two, "
                f"such as 4, 8 or 16, got {self.patch_size}"
            )
        if self.encoder == "conv" and self.embed_dim % (self.patch_size // 2):
            raise ValueError(
                f"model.encoder 'conv' doubles its width with every layer up to model.embed_dim, so that must be a multiple "
                f"of {self.patch_size // 2} at model.patch_size {self.patch_size}, got {self.embed_dim}"
            )
        if self.encoder == "r50" and self.patch_size not in (16, 32):
            raise ValueError(f"model.encoder 'r50' has stride 16 or 32, got model.patch_size {self.patch_size}")

    def _check_combinations(self) -> None:
        if self.encoder != "patch" and (self.patch_sizes or self.patch_norm):
            field = "patch_sizes" if self.patch_sizes else "patch_norm"
            raise ValueError(
                f"model.{field} is for model.encoder 'patch'; {self.encoder!r} has its own strides and norms"
            )
        if self.patch_sizes and self.patch_norm:
            raise ValueError(
                "model.patch_norm has one weight per pixel of a patch, which cannot follow model.patch_sizes; "
                "leave one of them out"
            )
        if self.decoder == "token_pair" and not (self.class_token and self.num_registers):
            raise ValueError(
                "model.decoder 'token_pair' reads the class token and the first register; set model.class_token True and "
                f"model.num_registers 1 or more, got {self.num_registers}"
            )
        if self.decoder in ("token", "token_mean") and not self.class_token:
            raise ValueError(
                f"model.decoder {self.decoder!r} reads the class token, but model.class_token is False; use 'mean'"
            )
        if not self.fc_norm and self.decoder != "mean":
            raise ValueError(f"model.fc_norm has no effect with model.decoder {self.decoder!r}; leave it on")

    def _check_attention(self) -> None:
        pattern = self.attention.split(",")
        for name in pattern:
            if name not in ATTENTION_NAMES:
                raise ValueError(unknown("model.attention", name, ATTENTION_NAMES))
        if len(pattern) > self.depth:
            raise ValueError(
                f"model.attention {self.attention!r} is a pattern of {len(pattern)} blocks, but model.depth is {self.depth}"
            )
        if "local" not in pattern:
            if self.window:
                raise ValueError(
                    f"model.window {self.window} has no effect with model.attention {self.attention!r}; leave it 0, or add "
                    "--model.attention local"
                )
            return
        if self.window % 2 == 0:
            raise ValueError(
                f"model.attention {self.attention!r} needs model.window, an odd number of patches, so that the window has a "
                f"middle, such as --model.window 7; got {self.window}"
            )
        if self.patch_dropout:
            raise ValueError(
                f"model.patch_dropout {self.patch_dropout} leaves holes in the grid on which local attention finds its "
                "neighbours; leave it 0 with local attention"
            )

    @property
    def attentions(self) -> tuple[str, ...]:
        """The kind of attention of every block: the pattern, repeated."""
        pattern = self.attention.split(",")
        return tuple(pattern[i % len(pattern)] for i in range(self.depth))

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns (h, w) at `image_size`."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return int(self.class_token) + self.num_registers

    @property
    def head_width(self) -> int:
        """Width d of an attention head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden layer of a block's MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def is_cnn(self) -> bool:
        """Whether the encoder is a CNN of timm."""
        return self.encoder not in ("patch", "conv")


# The encoder is not among them: whether timm has a CNN of that name is known when it is built.
_CHOICES = {
    "positions": POSITION_NAMES,
    "decoder": DECODER_NAMES,
    "mlp": MLP_NAMES,
    "init": INIT_NAMES,
}
