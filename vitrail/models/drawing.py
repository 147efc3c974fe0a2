"""Draw an architecture as text: its data flow with shapes and costs."""

from __future__ import annotations

import torch

from vitrail.models.config import ViTConfig
from vitrail.models.cost import block_macs, encoder_macs, num_macs
from vitrail.models.vit import ViT


def draw_architecture(config: ViTConfig) -> str:
    """Return the data flow from image to logits: shapes as the model computes them, parameters and multiply-adds.

    Raises:
        ValueError: the encoder is unknown or has no feature map of this stride.
    """
    with torch.device("meta"):
        model = ViT(config).eval().to("meta")  # position tables are made on the CPU
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in model.features(_image(config)).items()}
    macs = encoder_macs(config)
    head_macs = (model.decoder.out_dim if config.num_classes else 0) * config.num_classes
    tokens = shapes["transformer"]
    transformer = sum(block_macs(config, tokens[0], attention) for attention in config.attentions)
    rows = [
        ("image", (config.in_channels, config.image_size, config.image_size), "", "", ""),
        ("│ Encoder", None, _encoder(config), _size(model, "patch_embed"), _giga(macs)),
        ("feature map", shapes["encoder"], "", "", ""),
        ("│", None, _tokens(config), _size(model, "cls_token", "reg_token", "pos_embed"), ""),
        ("tokens", tokens, "", "", ""),
        ("│ Transformer", None, _transformer(config), _size(model, "blocks", "norm"), _giga(transformer)),
        ("tokens", tokens, "", "", ""),
        (
            "│ Decoder",
            None,
            _DECODERS[config.decoder],
            _size(model, "decoder", "fc_norm"),
            _giga(num_macs(config) - macs - transformer - head_macs),
        ),
        ("vector", shapes["pooled"], "", "", ""),
    ]
    if config.num_classes:
        rows += [
            ("│ head", None, "linear", _size(model, "head"), _giga(head_macs)),
            ("logits", shapes["logits"], "", "", ""),
        ]
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{total / 1e6:.2f} M parameters, {num_macs(config) / 1e9:.2f} G multiply-adds an image, {tokens[0]} tokens",
        "",
    ]
    for name, shape, text, size, cost in rows:
        if shape is not None:
            lines.append(f"{name:<14}[B, {', '.join(map(str, shape))}]")
        else:
            lines.append(f"{name:<14}{text}".rstrip())
            if size or cost:
                lines.append(f"{'│':<14}{', '.join(filter(None, (size, cost)))}")
    if config.decoder == "concat":
        lines += _concat(config)
    return "\n".join(lines)


_DECODERS = {
    "token": "the class token",
    "mean": "mean over the patches, norm",
    "token_mean": "the class token and the mean over the patches, side by side",
    "token_pair": "the class token and the first register, side by side",
    "attention": "one learned query attends to the patches, then an MLP",
    "concat": "feature map and tokens joined per patch, mean over patches, Linear, GELU",
}


def _concat(config: ViTConfig) -> list[str]:
    """Return a drawing of how the article's decoder joins the encoder's and the Transformer's output."""
    dim, patches = config.embed_dim, config.grid[0] * config.grid[1]
    above = f"  feature map  [B, {dim}, {config.grid[0]}, {config.grid[1]}] ─ norm ─"
    below = f"  patch tokens [B, {patches}, {dim}] ─"
    width = max(len(above), len(below))
    return [
        "",
        "The decoder joins the outputs of the encoder and of the Transformer for each patch:",
        f"{above:─<{width}}┐",
        f"{'':<{width}}├─ join [B, {patches}, {2 * dim}] ─ mean [B, {2 * dim}] ─ Linear, GELU [B, {dim}] ─ head",
        f"{below:─<{width}}┘",
    ]


def _image(config: ViTConfig) -> torch.Tensor:
    return torch.empty(1, config.in_channels, config.image_size, config.image_size)


def _encoder(config: ViTConfig) -> str:
    patch = config.patch_size
    if config.encoder == "patch":
        norms = " between layer norms" if config.patch_norm else ""
        sizes = f", trained with patches of {', '.join(map(str, config.patch_sizes))} px" if config.patch_sizes else ""
        return f"patch: one linear map of {patch}×{patch} pixels{norms}{sizes}"
    if config.encoder == "conv":
        layers = patch.bit_length() - 1
        return f"conv: {layers} overlapping 3×3 convolution{'s' * (layers > 1)} of stride 2, projection 1×1"
    return f"{config.encoder}: feature map of stride {patch}, projection 1×1"


def _tokens(config: ViTConfig) -> str:
    terms = ["one token per patch"]
    if config.class_token:
        terms.append("class token")
    if config.num_registers:
        terms.append(f"{config.num_registers} registers")
    if config.positions in ("learned", "sincos2d"):
        terms.append(f"positions {config.positions}")
    return " + ".join(terms)


def _transformer(config: ViTConfig) -> str:
    heads = f"{config.num_heads} heads of {config.head_width}"
    extras = [name for name, on in (("QK-norm", config.qk_norm), ("rope2d", config.positions == "rope2d")) if on]
    attention = ", ".join([f"{_attention(config)}, {heads}", *extras])
    scale = ", LayerScale" if config.layer_scale else ""
    return f"{config.depth} × [norm, {attention}; norm, MLP {config.hidden_dim} {config.mlp}], both residual{scale}"


def _attention(config: ViTConfig) -> str:
    local = f"local attention in windows of {config.window}×{config.window}"
    if set(config.attentions) == {"local"}:
        return local
    if set(config.attentions) == {"global"}:
        return "global attention"
    counts = {name: config.attentions.count(name) for name in ("local", "global")}
    return f"{local} ({counts['local']} blocks) or global ({counts['global']}), in turn {config.attention}"


def _size(model: ViT, *modules: str) -> str:
    count = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in modules)
    return f"{count:,} parameters" if count else ""


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.2f} G multiply-adds" if macs > 1e8 else f"{macs / 1e6:.2f} M multiply-adds" if macs else ""
