"""Infer the architecture of a weights file from the shapes, the user's description and the conventions of its library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vitrail.data.images.preprocess import Preprocess
from vitrail.models.config import ViTConfig
from vitrail.weights.finalise import depth_of, mlp_ratio, plain_labels, table_grid
from vitrail.weights.naming import pixels_of
from vitrail.weights.user_spec import UserSpec

HEADS_OF_64 = "heads of 64"  # and 16 of 80 in ViT-H: what every published size has (Dosovitskiy et al. 2021, table 1)


@dataclass(frozen=True)
class Conventions:
    """What the code behind a naming scheme does where shapes do not tell; None: the user must describe it.

    Attributes:
        num_heads: a rule for the number of heads; None: there is none.
        preprocess: fields of `Preprocess`; the user must describe those of `REQUIRED` that are not among them.
    """

    layer_norm_eps: float | None = 1e-6
    mlp: str | None = "gelu"
    num_heads: str | None = HEADS_OF_64
    positions: str | None = None  # of a file without a table of them
    decoder: str = "token"
    preprocess: Mapping[str, Any] = field(default_factory=dict)


REQUIRED = ("mean", "std")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def infer_architecture(
    origin: str, weights: Mapping[str, Tensor], conventions: Conventions, user_spec: UserSpec
) -> tuple[ViTConfig, Preprocess, tuple[str, ...], list[str]]:
    """Return the architecture, preprocessing and labels of weights under our names, and a note on each assumption.

    Raises:
        ValueError: something needed is neither told by the weights nor described (all such keys are named), or the
            description contradicts the weights.
    """
    fields = fields_from_shapes(weights, origin)
    _refuse_contradictions(origin, fields, user_spec)
    notes: list[str] = []
    lacking = _apply_conventions(fields, conventions, user_spec, notes)
    if "image_size" not in fields and "image_size" not in user_spec.model:
        lacking.append("image_size")
    preprocess = {**conventions.preprocess, **user_spec.preprocess}
    lacking += [key for key in REQUIRED if key not in preprocess]
    if lacking:
        raise ValueError(
            f"{origin}: weights alone do not tell {', '.join(_EXPLAINED.get(key, key) for key in lacking)}; make a model file that does, for every command: "
            f"vitrail export {origin} --to vitrail --describe " + " ".join(f"{key}={EXAMPLES[key]}" for key in lacking)
        )
    fields |= user_spec.model
    if (
        "patch_size" in user_spec.model
        and "image_size" not in user_spec.model
        and fields["image_size"] % fields["patch_size"]
    ):
        raise ValueError(f"{origin}: describe image_size as well, a multiple of patch_size {fields['patch_size']}")
    config = ViTConfig(**_with_head_dim(fields, origin))
    notes += _preprocess_note(conventions, user_spec)
    labels = user_spec.labels or plain_labels(config.num_classes)
    if len(labels) != config.num_classes:
        raise ValueError(
            f"{origin}: {len(labels)} labels were described, but its head has {config.num_classes} classes"
        )
    if config.num_classes and not user_spec.labels:
        notes.append("labels are numbers: the file names none; --describe labels=…")
    return config, to_preprocess(config, preprocess), labels, notes


EXAMPLES = {
    "num_heads": "N", "layer_norm_eps": "1e-6", "mlp": "gelu", "positions": "KIND", "image_size": "224",
    "mean": "0.5", "std": "0.5",
}  # fmt: skip
_EXPLAINED = {"positions": "positions (there is no table of them: none, sincos2d or rope2d)"}


def fields_from_shapes(weights: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that the shapes of weights tell, and `inner`, the width of all heads together, K·d.

    Raises:
        ValueError: a weight that every ViT has is missing, or a block is.
    """
    needed = (
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
    )
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"{origin}: no ViT without {', '.join(missing)} (Vitrail's names)")
    kernel, qkv = weights["patch_embed.proj.weight"], weights["blocks.0.attn.qkv.weight"]
    first, second = weights["blocks.0.mlp.fc1.weight"], weights["blocks.0.mlp.fc2.weight"]
    channels, side = (kernel.shape[1], kernel.shape[-1]) if kernel.ndim == 4 else pixels_of(kernel.shape[1])
    facts: dict[str, Any] = {
        "in_channels": channels,
        "patch_size": side,
        "patch_norm": "patch_embed.norm_in.weight" in weights,
        "embed_dim": kernel.shape[0],
        "depth": depth_of(weights, r"blocks\.(\d+)\.", origin),
        "inner": qkv.shape[0] // 3,
        "mlp_ratio": mlp_ratio(second.shape[1], kernel.shape[0]),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "layer_scale": 1e-5 if "blocks.0.ls1.gamma" in weights else 0.0,
        "class_token": "cls_token" in weights,
        "num_registers": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "num_classes": weights["head.weight"].shape[0] if "head.weight" in weights else 0,
    }
    if first.shape[0] == 2 * second.shape[1]:
        facts["mlp"] = "swiglu"
    if facts["qk_norm"]:
        facts["num_heads"] = facts["inner"] // weights["blocks.0.attn.q_norm.weight"].shape[0]
    facts |= _decoder(weights, facts)
    if "pos_embed" in weights:
        prefix = facts["num_registers"] + facts["class_token"]
        facts |= {
            "positions": "learned",
            "image_size": table_grid(weights["pos_embed"], prefix, f"{origin}: positions")[0] * side,
        }
    return facts


def _decoder(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the decoder; none where there is a class token and names do not tell whether it is read."""
    if "decoder.attn_pool.latent" in weights:
        return {"decoder": "attention"}
    if "fc_norm.weight" in weights:
        return {"decoder": "mean", "fc_norm": True}
    if not facts["class_token"]:
        return {"decoder": "mean", "fc_norm": False}
    if "head.weight" in weights and weights["head.weight"].shape[1] == 2 * facts["embed_dim"]:
        return {"decoder": "token_pair" if facts["num_registers"] == 1 else "token_mean"}
    return {}


def _apply_conventions(
    fields: dict[str, Any], conventions: Conventions, user_spec: UserSpec, notes: list[str]
) -> list[str]:
    """Add the fields that the conventions give, with a note on each; return the keys that are still unknown."""
    lacking = []
    if "num_heads" not in fields and "num_heads" not in user_spec.model:
        heads = _usual_num_heads(fields["inner"]) if conventions.num_heads else 0
        if heads:
            fields["num_heads"] = heads
            notes.append(f"num_heads {heads} assumed: heads of {fields['inner'] // heads}")
        else:
            lacking.append("num_heads")
    for key in ("layer_norm_eps", "mlp", "positions"):
        if key in fields or key in user_spec.model:
            continue
        if (value := getattr(conventions, key)) is None:
            lacking.append(key)
            continue
        fields[key] = value
        notes.append(f"{key} {value} assumed, as the code of this naming scheme has it")
    if "decoder" not in fields and "decoder" not in user_spec.model:
        fields["decoder"] = conventions.decoder
        notes.append(f"decoder {conventions.decoder} assumed")
    return lacking


def _usual_num_heads(inner: int) -> int:
    """Return the number of heads of the published ViT of this width; 0: none has it."""
    return 16 if inner == 1280 else inner // 64 if inner % 64 == 0 else 0


def _refuse_contradictions(origin: str, fields: Mapping[str, Any], user_spec: UserSpec) -> None:
    resizable = ("image_size", "patch_size", "layer_scale", "mlp_ratio")
    wrong = [
        f"{key} {value!r} (its weights have {fields[key]!r})"
        for key, value in user_spec.model.items()
        if key in fields and key not in resizable and value != fields[key]
    ]
    if wrong:
        raise ValueError(f"{origin}: its weights contradict what was described: {', '.join(wrong)}")


def _with_head_dim(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the fields with the width of one head in place of `inner`."""
    inner, heads = fields["inner"], fields["num_heads"]
    if heads < 1 or inner % heads:
        raise ValueError(f"{origin}: num_heads {heads} does not divide the width of all heads together, {inner}")
    rest = {key: value for key, value in fields.items() if key != "inner"}
    return rest if inner == fields["embed_dim"] else rest | {"head_dim": inner // heads}


def to_preprocess(config: ViTConfig, fields: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of an architecture from its fields; a single mean or std counts for every channel."""
    spread = {
        key: tuple(fields[key]) * (config.in_channels if len(fields[key]) == 1 else 1)
        for key in REQUIRED
        if key in fields
    }
    return Preprocess(image_size=config.image_size, channels=config.in_channels, **{**fields, **spread})


def _preprocess_note(conventions: Conventions, user_spec: UserSpec) -> list[str]:
    """Return a note on the preprocessing fields that were assumed, if any were."""
    squashed = "squash" in (user_spec.preprocess.get("resize"), conventions.preprocess.get("resize"))
    resize = {"resize", "interpolation"} | ({"crop_fraction"} if not squashed else set())
    assumed = sorted({key for key in (*conventions.preprocess, *resize) if key not in user_spec.preprocess})
    if not assumed:
        return []
    default = Preprocess()
    values = {key: conventions.preprocess.get(key, getattr(default, key)) for key in assumed}
    return ["preprocessing assumed: " + ", ".join(f"{key} {_short(value)}" for key, value in values.items())]


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{number:g}" for number in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
