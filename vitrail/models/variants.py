"""Named architectures: size + patch + suffixes, for instance `b16`, `ti4`, `s16-concat`. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

from vitrail.lookup import pick, unknown
from vitrail.models.config import DECODER_NAMES, ENCODER_NAMES, POSITION_NAMES, ViTConfig

# Ti, S: DeiT (Touvron et al. 2021, table 1). B, L, H: ViT (Dosovitskiy et al. 2021, table 1).
# nano, micro: ours, for small images on CPUs; heads of 32, since 16 to 64 tokens need few heads, and MLP ratio 2: a third
# fewer parameters than 4 at equal accuracy on the digits (docs/log.md).
SIZES: dict[str, dict[str, Any]] = {
    "nano": {"embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 2.0},
    "micro": {"embed_dim": 128, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0},
    "ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "h": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}

# Suffixes of a variant's name → the fields that they set. Besides these, local with a window (local7) is one, and any
# other suffix names a CNN of timm as encoder.
SUFFIXES: dict[str, dict[str, Any]] = {
    **{decoder: {"decoder": decoder} for decoder in DECODER_NAMES},
    **{encoder: {"encoder": encoder} for encoder in ENCODER_NAMES},
    **{positions: {"positions": positions} for positions in POSITION_NAMES if positions != "none"},
    "swiglu": {"mlp": "swiglu", "mlp_ratio": 8 / 3},
}

# The variants that `vitrail models` lists; any other size and patch can be named in the same way.
LISTED = ("nano2", "nano4", "micro2", "micro4", "ti4", "s4", "ti16", "s16", "b16", "b32", "l16", "h14")


def variant_config(name: str, **changes: Any) -> ViTConfig:
    """Return the architecture called `name`, with `changes` (for instance `num_classes=10`) applied.

    Raises:
        ValueError: the name is not size + patch + known suffixes, or the changes are refused.
    """
    size = name.split("-")[0]
    parsed = re.fullmatch(r"([a-z]+?)(\d+)", size)
    if parsed is None:
        raise ValueError(unknown("model", name, LISTED))
    fields = dict(pick(SIZES, parsed[1], f"model size in {name!r}:"))
    fields["patch_size"] = int(parsed[2])
    # Small patches are for small images: 16 patches a side, at most 32 px for nano and micro of patch 2.
    fields["image_size"] = 224 if fields["patch_size"] > 8 else 8 * fields["patch_size"]
    fields |= suffix_fields(name)
    return ViTConfig(**{**fields, **changes})


def suffix_fields(name: str) -> dict[str, Any]:
    """Return the fields that the suffixes of a variant's name set.

    Raises:
        ValueError: a suffix is unknown.
    """
    fields: dict[str, Any] = {}
    set_by: dict[str, str] = {}
    for suffix in name.split("-")[1:]:
        if local := re.fullmatch(r"local(\d+)", suffix):
            added = {"attention": "local", "window": int(local[1])}
        else:
            added = SUFFIXES[suffix] if suffix in SUFFIXES else {"encoder": cnn_suffix(suffix, name)}
        if again := sorted(set(added) & set(fields)):
            raise ValueError(f"model {name!r} names its {again[0]} twice: {set_by[again[0]]!r} and {suffix!r}")
        fields |= added
        set_by |= dict.fromkeys(added, suffix)
    return fields


def cnn_suffix(suffix: str, name: str) -> str:
    """Return the name of timm's CNN for a suffix.

    Raises:
        ValueError: the suffix is neither one of `SUFFIXES` nor a model of timm.
    """
    from vitrail.models.cnns import nearest, refuse_unknown_cnn

    try:
        refuse_unknown_cnn(suffix)
    except ValueError:
        near = nearest(suffix, SUFFIXES)
        hint = f"; did you mean {near!r}?" if near else "."
        raise ValueError(
            f"unknown suffix in model {name!r}: {suffix!r}{hint} Known: {', '.join(SUFFIXES)}, local and an odd window, such "
            "as local7, and timm's CNNs, such as resnet50, efficientnet_b0"
        ) from None
    return suffix


def is_variant(name: str) -> bool:
    """Whether a model spec reads as a variant's name, known or misspelt, and not as a path or `hf:NAME`."""
    return not any(mark in name for mark in "/\\:.") and name != ""
