"""Read the architecture of a timm model from its modules, or say why `ViT` cannot express it."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models import Eva, ResNetV2, VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from vitrail.models.config import ViTConfig
from vitrail.weights import naming
from vitrail.weights.finalise import mlp_ratio
from vitrail.weights.key_mapping import Rule


class TimmArchitecture(NamedTuple):
    """The architecture of a timm model in our terms.

    Attributes:
        config: the architecture.
        rules: the table of the model's names.
        any_size: whether the model takes images of other sizes than its own.
        notes: what was expressed in another way, one line each.
    """

    config: ViTConfig
    rules: tuple[Rule, ...]
    any_size: bool
    notes: tuple[str, ...] = ()


KINDS = (VisionTransformer, VisionTransformerDistilled, Eva)
POOLS = {"token": "token", "avg": "mean", "map": "attention"}


def read_architecture(model: Any, origin: str) -> TimmArchitecture:
    """Return the architecture of a timm model and the table of its names.

    Raises:
        ValueError: Vitrail's ViT cannot compute the same; every reason is named.
    """
    if type(model) not in KINDS:
        raise ValueError(
            f"{origin}: is timm's {type(model).__name__}, which is not among what Vitrail's ViT can be: "
            + ", ".join(kind.__name__ for kind in KINDS)
        )
    problems: list[str] = []
    fields = {
        **_stem(model, problems),
        **_attention(model, problems),
        **_mlp(model, problems),
        **_tokens(model, problems),
        **_pooling(model, problems),
        "layer_norm_eps": _epsilon(model, problems),
        "depth": len(model.blocks),
        "num_classes": model.num_classes,
    }
    if problems:
        raise ValueError(f"{origin}: Vitrail's ViT cannot express it: {'; '.join(problems)}")
    notes = ()
    if type(model) is VisionTransformerDistilled:
        notes = ("head: the mean of the two heads as one over both tokens",) if model.num_classes else ()
    any_size = getattr(model, "dynamic_img_size", False)
    return TimmArchitecture(ViTConfig(**fields), _rules(model), any_size, notes)


def _stem(model: Any, problems: list[str]) -> dict[str, Any]:
    """Return the fields of the encoder, its stride and the image size."""
    embed: Any = model.patch_embed
    fields = {"embed_dim": model.embed_dim, "in_channels": getattr(model, "in_chans", 3)}
    height, width = embed.img_size
    is_hybrid = isinstance(embed, HybridEmbed)
    ratio: Any = embed.feat_ratio(as_scalar=False) if is_hybrid else embed.patch_size
    stride = int(ratio[0])
    fields |= {"image_size": height, "patch_size": stride}
    if height != width or ratio[0] != ratio[1]:
        problems.append(f"images of {height}×{width} in patches of {ratio[0]}×{ratio[1]} are not square")
    elif height % stride:
        problems.append(f"images of {height} px are no multiple of its patches of {stride}, and timm drops the rest")
    if is_hybrid:
        return fields | {"encoder": _cnn(embed, stride, problems)}
    if type(embed) is not PatchEmbed or not isinstance(getattr(embed, "norm", None), nn.Identity):
        problems.append(f"its patch embedding is a {type(embed).__name__} with more than one linear layer")
    elif embed.proj.bias is None:
        problems.append("its patch embedding has no bias")
    return fields


def _cnn(embed: Any, stride: int, problems: list[str]) -> str:
    backbone: Any = embed.backbone
    if embed.proj.kernel_size != (1, 1):
        problems.append(f"its CNN's map is cut into patches of {embed.proj.kernel_size[0]}")
        return "r50"
    if isinstance(backbone, ResNetV2):
        stages: Any = backbone.stages
        layers = [len(stage.blocks) for stage in stages]
        if layers != ([3, 4, 9] if stride == 16 else [3, 4, 6, 3]):
            problems.append(f"its ResNet has stages of {layers} blocks")
        return "r50"
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    if not cfg.get("architecture"):
        problems.append(f"its encoder is a {type(backbone).__name__} without a name")
    return str(cfg.get("architecture", "r50"))


def _attention(model: Any, problems: list[str]) -> dict[str, Any]:
    """Return the fields of the attention: heads, biases, norms, LayerScale."""
    first = model.blocks[0]
    attn, kind = first.attn, type(first.attn).__name__
    allowed = {"Block": "Attention", "EvaBlock": "EvaAttention"}
    if allowed.get(type(first).__name__) != kind:
        problems.append(f"its blocks are {type(first).__name__} with {kind}")
        return {}
    if attn.qkv is None:
        problems.append("its queries, keys and values are separate layers")
        return {}
    if not isinstance(attn.norm, nn.Identity) or getattr(attn, "gate", None) is not None:
        problems.append("its attention normalises or gates its output")
    if attn.proj.bias is None:
        problems.append("its attention's projection has no bias")
    fields: dict[str, Any] = {
        "num_heads": attn.num_heads,
        "qkv_bias": attn.qkv.bias is not None or getattr(attn, "q_bias", None) is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
    }
    if attn.head_dim * attn.num_heads != model.embed_dim:
        fields["head_dim"] = attn.head_dim
    scales = [_scale(first, name) for name in ("1", "2")]
    if (scales[0] is None) != (scales[1] is None):
        problems.append("only one of a block's branches has LayerScale")
    return fields | {"layer_scale": scales[0] or (1e-5 if scales[0] is not None else 0.0)}


def _scale(block: Any, branch: str) -> float | None:
    """Return the initial LayerScale of a branch, or None where it has none."""
    if hasattr(block, "gamma_1"):
        return None if getattr(block, f"gamma_{branch}") is None else float(block.init_values)
    scale = getattr(block, f"ls{branch}")
    return float(scale.init_values) if isinstance(scale, LayerScale) else None


def _mlp(model: Any, problems: list[str]) -> dict[str, Any]:
    """Return the fields of a block's MLP."""
    mlp = model.blocks[0].mlp
    name = _mlp_name(mlp)
    if name is None:
        problems.append(f"its MLP is a {type(mlp).__name__} with {type(mlp.act).__name__}")
        return {}
    if not isinstance(mlp.norm, nn.Identity) or mlp.fc2.bias is None:
        problems.append("its MLP has a norm inside, or no bias")
    return {"mlp": name, "mlp_ratio": mlp_ratio(mlp.fc2.in_features, model.embed_dim)}


def _mlp_name(mlp: Any) -> str | None:
    if isinstance(mlp, (GluMlp, SwiGLU)):
        return "swiglu" if isinstance(mlp.act, nn.SiLU) else None
    return _activation(mlp.act) if type(mlp) is Mlp else None


def _activation(act: nn.Module) -> str | None:
    """Return our name of an activation, which may be of timm's own classes or of PyTorch's."""
    if type(act).__name__ == "GELU":
        return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu"
    return {"GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu"}.get(type(act).__name__)


def _tokens(model: Any, problems: list[str]) -> dict[str, Any]:
    """Return the fields of prefix tokens and positions."""
    registers = [token for token in (model.reg_token, getattr(model, "dist_token", None)) if token is not None]
    if len(registers) > 1:
        problems.append("it has registers and a distillation token")
    fields: dict[str, Any] = {
        "class_token": model.cls_token is not None,
        "num_registers": registers[0].shape[1] if registers else 0,
        "positions": "learned" if model.pos_embed is not None else "none",
    }
    if not isinstance(model.norm_pre, nn.Identity):
        problems.append("it normalises tokens before the first block (pre_norm, as CLIP)")
    rope = getattr(model, "rope", None)
    if rope is None:
        return fields
    same = (
        isinstance(rope, RotaryEmbeddingDinoV3)
        and (rope.temperature, rope.normalize_coords, rope.grid_offset, rope.grid_indexing)
        == (100, "separate", 0, "ij")
        and rope.rotate_half
    )
    if not same or model.pos_embed is not None:
        problems.append(f"its rotary positions ({type(rope).__name__}) are not DINOv3's, or are added to learned ones")
    return fields | {"positions": "rope2d"}


def _pooling(model: Any, problems: list[str]) -> dict[str, Any]:
    """Return the fields of the decoder; timm pools before or after its last norm."""
    if type(model) is VisionTransformerDistilled:
        return {"decoder": "token_pair"}
    pool, before, after = model.global_pool, not isinstance(model.norm, nn.Identity), _has_fc_norm(model)
    if pool not in POOLS or getattr(model, "pool_include_prefix", False):
        problems.append(f"its pooling is {pool!r}; known: {', '.join(POOLS)}, without prefix tokens")
    elif before == after:
        problems.append("it has " + ("two last norms" if before else "no last norm"))
    elif pool == "map" and (after or not _is_our_pool(model)):
        problems.append("its attention pooling has another norm or activation than its blocks")
    decoder = POOLS.get(pool, "token")
    return {"decoder": decoder, "fc_norm": after if decoder == "mean" else True}


def _has_fc_norm(model: Any) -> bool:
    return not isinstance(model.fc_norm, nn.Identity)


def _is_our_pool(model: Any) -> bool:
    pool, act = model.attn_pool, _mlp_name(model.blocks[0].mlp)
    expected = "gelu" if act == "swiglu" else act
    return (
        pool.pool == "token"
        and pool.latent_len == 1
        and pool.pos_embed is None
        and isinstance(pool.q, nn.Linear)
        and isinstance(pool.q_norm, nn.Identity)
        and pool.num_heads == model.blocks[0].attn.num_heads
        and _activation(pool.mlp.act) == expected
        and pool.mlp.fc1.out_features == model.blocks[0].mlp.fc2.in_features
    )


def _epsilon(model: Any, problems: list[str]) -> float:
    """Return the epsilon of a model's norms, without those of a CNN."""
    norms = [
        module
        for name, module in model.named_modules()
        if "norm" in name.rpartition(".")[2] and "backbone" not in name and not isinstance(module, nn.Identity)
    ]
    others = {type(norm).__name__ for norm in norms if not isinstance(norm, nn.LayerNorm) or norm.bias is None}
    epsilons = {norm.eps for norm in norms if isinstance(norm, nn.LayerNorm)}
    if others or len(epsilons) != 1:
        problems.append(f"its norms are {', '.join(sorted(others)) or 'LayerNorm'} with epsilons {sorted(epsilons)}")
    return min(epsilons, default=1e-6)


def _rules(model: Any) -> tuple[Rule, ...]:
    """Return the table of a model's names."""
    if type(model) is VisionTransformerDistilled:
        return naming.TIMM
    mlp = model.blocks[0].mlp
    rules = naming.EVA if isinstance(model, Eva) else naming.TIMM_REGISTERS
    if isinstance(mlp, SwiGLU):
        rules = (*naming.SPLIT_GATE, *rules)
    elif isinstance(mlp, GluMlp) and mlp.gate_last:
        rules = (naming.GATE_LAST, *rules)
    if model.global_pool == "token" and _has_fc_norm(model):
        rules = (naming.TOKEN_NORM, *rules)
    return rules
