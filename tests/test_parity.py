"""Parity: small random models give the logits and input gradients of timm, transformers and vit-pytorch.

Weights are copied; the tables below say what a peer calls them, for transformers those that read its files. Every parameter is drawn again, so that no bias, norm or
position is hidden by the zeros and ones that a fresh model has.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import HybridEmbed, LayerNorm, SwiGLUPacked, resample_abs_pos_embed, resample_patch_embed
from timm.models import Eva, VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTForImageClassification,
)
from transformers import ViTConfig as HFViTConfig
from vit_pytorch.simple_vit import SimpleViT

from vitrail.models.config import ViTConfig
from vitrail.models.encoders import kernel_resize, resize_kernel
from vitrail.models.vit import ViT
from vitrail.weights.formats.hf_config import absent_biases
from vitrail.weights.formats.hf_tables import FAMILIES
from vitrail.weights.key_mapping import Rule, to_ours
from vitrail.weights.naming import EVA, SPLIT_GATE, TIMM, vit_pytorch

# A table that importing uses as well, or names that are left out, as regular expressions.
Rules = list[tuple[str, str | None]] | tuple[Rule, ...]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it where other work shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def converted(peer: nn.Module, rules: Rules, config: ViTConfig) -> dict[str, Tensor]:
    """Return a peer's weights under our names."""
    if isinstance(rules, tuple):
        weights, unknown = to_ours(peer.state_dict(), rules, config)
        assert not unknown
        return weights
    out, joined = {}, defaultdict(dict)
    for source, tensor in peer.state_dict().items():
        name = source
        for pattern, ours in rules:
            if ours is None and re.search(pattern, name):
                break
            name = re.sub(pattern, ours or "", name)
        else:
            part = re.search(r"/(\d)", name)
            if part:
                joined[name.replace(part[0], "")][int(part[1])] = tensor
            else:
                out[name] = tensor
    for name, parts in joined.items():
        out[name] = torch.cat([parts.get(i, torch.zeros_like(parts[0])) for i in range(max(parts) + 1)])
    return out


def with_prefix_rows(table: Tensor, at: int, count: int) -> Tensor:
    """Return a position table in which `count` prefix tokens from row `at` on, which have no position, get zeros."""
    return torch.cat([table[:, :at], torch.zeros(1, count, table.shape[2]), table[:, at:]], dim=1)


@torch.no_grad()
def drawn(peer: nn.Module, std: float = 0.2) -> Any:
    """Draw every parameter of a peer again; returns it in evaluation mode.

    The weights of norms vary around one, else the images would hardly reach the class token and a mistake on their way
    would not show. A CNN's kernels are random already, at a scale that its depth can bear; for the same reason batch norm
    gets the statistics of some images.
    """
    for name, module in peer.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 or ".backbone" not in name:
                parameter.normal_(mean=float(own == "weight" and parameter.ndim == 1), std=std)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    if any(isinstance(module, nn.BatchNorm2d) for module in peer.modules()):
        peer.train()(torch.randn(8, 3, 64, 64))
    return peer.eval()


def epsilons(model: nn.Module) -> set[float]:
    """Return the epsilons of a model's layer norms: of tokens of usual size, outputs would not show them."""
    return {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}


def twin(peer: nn.Module, config: ViTConfig, rules: Rules, **special: Callable[[Tensor], Tensor]) -> ViT:
    """Return our model with a peer's weights; `special` changes the tensors of one name."""
    weights = converted(peer, rules, config)
    for name, change in special.items():
        weights[name] = change(weights[name])
    model = ViT(config).eval()
    model.load_state_dict(weights)
    assert epsilons(model) == epsilons(peer)
    return model


def hf_twin(peer: Any, config: ViTConfig) -> ViT:
    """Return our model with the weights of a model of transformers, by the tables that read its files."""
    family = FAMILIES[peer.config.model_type]
    _, in_memory = family.tables(config, absent_biases(peer.config.to_dict()))
    named = {name.removeprefix(family.prefix): tensor for name, tensor in peer.state_dict().items()}
    weights, unknown = to_ours(named, in_memory, config)
    assert {name.split(".")[-1] for name in unknown} <= {"mask_token"}
    model = ViT(config).eval()
    model.load_state_dict(weights)
    assert epsilons(model) == epsilons(peer)
    return model


def agree(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Assert that two models give equal outputs and equal gradients of the images."""
    mine, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    got, expected = ours(mine), theirs(other)
    assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1
    # A sum of squares of normalised tokens hardly depends on the images; weights make each output count for itself.
    weights = torch.randn_like(expected)
    (got.square() * weights).sum().backward()
    (expected.square() * weights).sum().backward()
    assert mine.grad is not None
    assert other.grad is not None
    scale = other.grad.abs().max()
    assert scale > 1e-3
    assert_close(mine.grad / scale, other.grad / scale, atol=1e-5, rtol=0)


SHAPES = [(32, 8, 24, 3), (48, 16, 64, 4), (28, 4, 32, 2)]  # image, patch, width, heads


@pytest.mark.parametrize(("size", "patch", "width", "heads"), SHAPES)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"decoder": "attention"}, {"global_pool": "map"}),
        ({"decoder": "attention", "class_token": False}, {"global_pool": "map", "class_token": False}),
        ({"qk_norm": True}, {"qk_norm": True}),
        (
            {"mlp": "swiglu", "mlp_ratio": 1.5},
            {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 3.0},
        ),
        ({"decoder": "mean", "fc_norm": False}, {"global_pool": "avg", "fc_norm": False}),
        (
            {"decoder": "attention", "num_registers": 3, "layer_scale": 0.1},
            {"global_pool": "map", "reg_tokens": 3, "init_values": 0.1},
        ),
        (
            {"decoder": "mean", "qk_norm": True, "qkv_bias": False, "num_registers": 2, "mlp": "swiglu"},
            {
                "global_pool": "avg",
                "qk_norm": True,
                "qkv_bias": False,
                "reg_tokens": 2,
                "mlp_layer": SwiGLUPacked,
                "act_layer": nn.SiLU,
                "mlp_ratio": 8.0,
            },
        ),
    ],
    ids=["map", "map-no-class", "qk-norm", "swiglu", "mean-no-fc-norm", "map-registers-scale", "all"],
)
def test_timm_vision_transformer(size, patch, width, heads, ours, theirs):
    shape = {"embed_dim": width, "depth": 2, "num_heads": heads, "num_classes": 5}
    peer = drawn(VisionTransformer(img_size=size, patch_size=patch, **shape, **theirs))
    model = twin(peer, ViTConfig(image_size=size, patch_size=patch, **shape, **ours), TIMM)
    agree(model, peer, torch.randn(3, 3, size, size))


@pytest.mark.parametrize("class_token", [True, False])
def test_timm_without_positions_of_prefix_tokens(class_token):
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "class_token": class_token}
    peer = drawn(
        VisionTransformer(
            img_size=32, patch_size=8, global_pool="avg", reg_tokens=4, no_embed_class=True, init_values=1.0, **shape
        )
    )
    config = ViTConfig(image_size=32, patch_size=8, decoder="mean", num_registers=4, layer_scale=1.0, **shape)
    model = twin(peer, config, TIMM, pos_embed=partial(with_prefix_rows, at=0, count=config.num_prefix))
    agree(model, peer, torch.randn(3, 3, 32, 32))


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (48, 32), (16, 72), (40, 96), (31, 33), (50, 13), (9, 64), (65, 30)]
)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"decoder": "mean", "num_registers": 2}, {"global_pool": "avg", "reg_tokens": 2}),
        ({"decoder": "attention", "class_token": False}, {"global_pool": "map", "class_token": False}),
    ],
    ids=["token", "mean", "map"],
)
def test_timm_on_other_sizes_and_aspect_ratios(height, width, ours, theirs):
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    peer = drawn(
        VisionTransformer(img_size=32, patch_size=8, dynamic_img_size=True, dynamic_img_pad=True, **shape, **theirs)
    )
    model = twin(peer, ViTConfig(image_size=32, patch_size=8, **shape, **ours), TIMM)
    agree(model, peer, torch.randn(2, 3, height, width))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (32, 16)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"qkv_bias": False, "num_registers": 4}, {"qkv_bias": False, "num_reg_tokens": 4, "global_pool": "token"}),
        ({"num_registers": 4}, {"num_reg_tokens": 4, "global_pool": "token"}),
        ({"decoder": "mean", "fc_norm": False}, {"global_pool": "avg"}),
        (
            {"decoder": "mean", "fc_norm": False, "class_token": False, "qk_norm": True},
            {"global_pool": "avg", "class_token": False, "qk_norm": True},
        ),
        (
            {"num_registers": 2, "mlp": "swiglu", "qkv_bias": False},
            {"num_reg_tokens": 2, "swiglu_mlp": True, "swiglu_align_to": 8, "qkv_bias": False, "global_pool": "token"},
        ),
    ],
    ids=["small", "small-qkvb", "mean", "patches-only", "plus"],
)
def test_timm_dinov3_with_rotary_positions(height, width, ours, theirs):
    # As timm's `vit_small_patch16_dinov3` and its `_qkvb` and `_plus` forms set them.
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    peer = drawn(
        Eva(
            img_size=64,
            patch_size=16,
            dynamic_img_size=True,
            init_values=1e-5,
            rope_type="dinov3",
            rope_temperature=100,
            rope_rotate_half=True,
            use_rot_pos_emb=True,
            use_abs_pos_emb=False,
            use_fc_norm=False,
            norm_layer=partial(LayerNorm, eps=1e-5),
            **shape,
            **theirs,
        )
    )
    config = ViTConfig(
        image_size=64, patch_size=16, positions="rope2d", layer_scale=1e-5, layer_norm_eps=1e-5, **shape, **ours
    )
    rules = (*SPLIT_GATE, *EVA) if "swiglu_mlp" in theirs else EVA
    agree(twin(peer, config, rules), peer, torch.randn(2, 3, height, width))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "encoder", "patch", "mlp_ratio"),
    [
        ("vit_base_r50_s16_224", "r50", 16, 4.0),
        ("vit_large_r50_s32_224", "r50", 32, 4.0),
        ("vit_small_resnet26d_224", "resnet26d", 32, 3.0),
        ("vit_small_resnet50d_s16_224", "resnet50d", 16, 3.0),
    ],
)
def test_timm_hybrid(name, encoder, patch, mlp_ratio):
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    peer = drawn(timm.create_model(name, img_size=64, **shape))
    config = ViTConfig(image_size=64, patch_size=patch, encoder=encoder, mlp_ratio=mlp_ratio, **shape)
    agree(twin(peer, config, TIMM), peer, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("encoder", "patch", "index", "blocks"),
    [
        ("efficientnet_b0", 16, 3, 5),
        ("efficientnet_b0", 32, 4, 7),
        ("mobilenetv3_small_050", 16, 3, 4),
        ("convnext_atto", 16, 2, 0),
        ("resnet18", 8, 2, 0),
    ],
)
def test_timm_hybrid_of_a_cnns_feature_map(encoder, patch, index, blocks):
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    backbone = timm.create_model(encoder, features_only=True, out_indices=(index,))
    peer = drawn(
        VisionTransformer(img_size=64, patch_size=1, embed_layer=partial(HybridEmbed, backbone=backbone), **shape)
    )
    # timm keeps the EfficientNet blocks after the last map, and computes them; we do not.
    rules = [(rf"backbone\.blocks\.[{blocks}-9]\.", None)]
    model = twin(peer, ViTConfig(image_size=64, patch_size=patch, encoder=encoder, **shape), rules)
    agree(model, peer, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(("size", "patch", "width", "heads"), SHAPES)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_transformers_vit(size, patch, width, heads, qkv_bias):
    config = HFViTConfig(
        image_size=size,
        patch_size=patch,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=3 * width,
        qkv_bias=qkv_bias,
        num_labels=5,
    )
    peer = drawn(ViTForImageClassification(config))
    ours = ViTConfig(
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=2,
        num_heads=heads,
        mlp_ratio=3.0,
        qkv_bias=qkv_bias,
        num_classes=5,
        layer_norm_eps=config.layer_norm_eps,
    )
    agree(hf_twin(peer, ours), lambda images: peer(images).logits, torch.randn(3, 3, size, size))


@pytest.mark.parametrize(("height", "width"), [(28, 28), (56, 42), (14, 35)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"num_registers": 4}, {"num_register_tokens": 4}),
        ({"num_registers": 1, "qkv_bias": False}, {"num_register_tokens": 1, "qkv_bias": False}),
        # Two thirds of 4 · 24, a multiple of 8: as DINOv2 sizes its SwiGLU.
        (
            {"num_registers": 2, "mlp": "swiglu", "mlp_ratio": 64 / 24},
            {"num_register_tokens": 2, "use_swiglu_ffn": True},
        ),
    ],
    ids=["registers", "no-bias", "swiglu"],
)
def test_transformers_dinov2_with_registers(height, width, ours, theirs):
    config = Dinov2WithRegistersConfig(
        image_size=28, patch_size=7, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_labels=5, **theirs
    )
    peer = drawn(Dinov2WithRegistersForImageClassification(config))
    shape = {"image_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = hf_twin(peer, ViTConfig(decoder="token_mean", layer_scale=1.0, **shape, **ours))
    agree(model, lambda images: peer(images).logits, torch.randn(3, 3, height, width))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"num_registers": 4}, {"num_register_tokens": 4}),
        (
            {"num_registers": 2, "mlp": "swiglu"},
            {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"},
        ),
        (
            {"num_registers": 1, "qkv_bias": False},
            {"num_register_tokens": 1, "query_bias": False, "value_bias": False},
        ),
    ],
    ids=["registers", "gated", "no-bias"],
)
def test_transformers_dinov3(height, width, ours, theirs):
    config = DINOv3ViTConfig(
        image_size=64,
        patch_size=16,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        **theirs,
    )
    peer = drawn(DINOv3ViTModel(config))
    model = hf_twin(
        peer,
        ViTConfig(
            image_size=64,
            patch_size=16,
            embed_dim=48,
            depth=2,
            num_heads=3,
            mlp_ratio=2.0,
            num_classes=0,
            positions="rope2d",
            layer_scale=1.0,
            layer_norm_eps=config.layer_norm_eps,
            **ours,
        ),
    )
    agree(
        lambda images: model.features(images)["transformer"],
        lambda images: peer(images).last_hidden_state,
        torch.randn(2, 3, height, width),
    )


@pytest.mark.parametrize(("size", "patch", "width", "heads"), SHAPES)
@pytest.mark.parametrize("channels", [3, 1])
def test_vit_pytorch_simple_vit(size, patch, width, heads, channels):
    peer = drawn(
        SimpleViT(
            image_size=size,
            patch_size=patch,
            num_classes=5,
            dim=width,
            depth=2,
            heads=heads,
            mlp_dim=2 * width,
            channels=channels,
            dim_head=width // heads,
        )
    )
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        patch_norm=True,
        in_channels=channels,
        embed_dim=width,
        depth=2,
        num_heads=heads,
        mlp_ratio=2.0,
        qkv_bias=False,
        positions="sincos2d",
        class_token=False,
        decoder="mean",
        fc_norm=False,
        num_classes=5,
        layer_norm_eps=1e-5,
    )
    weights = converted(peer, vit_pytorch(peer.state_dict()), config)
    weights |= {f"blocks.{i}.attn.proj.bias": torch.zeros(width) for i in range(2)}  # it has none
    model = ViT(config).eval()
    model.load_state_dict(weights)
    assert epsilons(model) == epsilons(peer)
    agree(model, peer, torch.randn(3, channels, size, size))


@pytest.mark.parametrize(
    ("old", "new"), [(8, 4), (8, 16), (16, 14), (14, 16), (16, 8), (8, 12), (7, 10), (10, 3), (6, 5)]
)
def test_patch_kernel_resize_is_timms(old, new):
    kernel = 0.2 * torch.randn(5, 3, old, old)
    agree(
        lambda weight: resize_kernel(weight, kernel_resize(old, new)),
        lambda weight: resample_patch_embed(weight, [new, new]),
        kernel,
    )


@pytest.mark.parametrize("patch", [4, 6, 8, 12, 16, 24])
@pytest.mark.parametrize("registered", [True, False])
def test_another_patch_size_is_a_timm_model_of_that_patch(patch, registered):
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
    sizes = (
        (4, 6, 8, 12, 16, 24) if registered else ()
    )  # resize matrices registered in the model, or computed when needed
    config = ViTConfig(image_size=48, patch_size=8, patch_sizes=sizes, num_registers=2, **shape)
    # Two fp32 pseudo-inverses differ by a millionth; attention that is sharper than this makes ten of it in the gradient.
    model = drawn(ViT(config), std=0.1)
    peer = VisionTransformer(img_size=48, patch_size=patch, reg_tokens=2, **shape).eval()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    side = 48 // patch
    weights["patch_embed.proj.weight"] = resample_patch_embed(weights["patch_embed.proj.weight"], [patch, patch])
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [side, side], num_prefix_tokens=3)
    peer.load_state_dict(weights)
    agree(lambda images: model(images, patch), peer, torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56)])
@pytest.mark.parametrize("prefix", [{}, {"num_registers": 2}, {"class_token": False}])
def test_concat_decoder_by_hand(height, width, prefix):
    model = drawn(
        ViT(
            ViTConfig(
                image_size=32,
                patch_size=8,
                embed_dim=24,
                depth=2,
                num_heads=3,
                num_classes=5,
                decoder="concat",
                **prefix,
            )
        )
    )
    weights = model.state_dict()

    def by_hand(images: Tensor) -> Tensor:
        features = model.features(images)
        encoded = rearrange(features["encoder"], "B D h w -> B (h w) D")
        encoded = F.layer_norm(encoded, (24,), weights["decoder.norm.weight"], weights["decoder.norm.bias"], eps=1e-6)
        patches = features["transformer"][:, model.config.num_prefix :]
        pooled = torch.cat([encoded, patches], dim=2).mean(dim=1)
        hidden = F.gelu(pooled @ weights["decoder.join.weight"].T + weights["decoder.join.bias"])
        return hidden @ weights["head.weight"].T + weights["head.bias"]

    agree(model, by_hand, torch.randn(3, 3, height, width))
