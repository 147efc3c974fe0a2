"""The model: parity with timm, shapes, initialisation, refusals."""

import dataclasses
from functools import partial

import pytest
import timm
import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from torch.testing import assert_close

from vitrail.kernels.window import window_mask
from vitrail.models.attention import GlobalAttention, LocalAttention, TokenLayout
from vitrail.models.blocks import DropPath, PatchDropout
from vitrail.models.config import DECODER_NAMES, ViTConfig
from vitrail.models.cost import num_macs, num_parameters
from vitrail.models.positions import resize_table, rope2d, sincos2d
from vitrail.models.variants import LISTED, variant_config
from vitrail.models.vit import ViT

SMALL = ViTConfig(image_size=32, patch_size=8, num_classes=7, embed_dim=24, depth=2, num_heads=3)


def small(**changes) -> ViT:
    torch.manual_seed(0)
    return ViT(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize(
    ("size", "patch", "width", "heads"), [(32, 8, 24, 3), (64, 16, 192, 3), (48, 16, 64, 4), (28, 4, 32, 1)]
)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"decoder": "mean"}, {"global_pool": "avg"}),
        ({"decoder": "mean", "class_token": False}, {"global_pool": "avg", "class_token": False}),
        ({"qkv_bias": False}, {"qkv_bias": False}),
        ({"num_registers": 3, "layer_scale": 0.1}, {"reg_tokens": 3, "init_values": 0.1}),
        ({"in_channels": 1, "mlp_ratio": 2.0}, {"in_chans": 1, "mlp_ratio": 2.0}),
    ],
)
def test_timm_weights_give_timm_logits_and_gradients(size, patch, width, heads, ours, theirs):
    torch.manual_seed(1)
    peer = timm.models.VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=2, num_heads=heads, num_classes=5, **theirs
    ).eval()
    for parameter in peer.parameters():  # fresh ones would hide a forgotten bias or norm
        torch.nn.init.normal_(parameter, std=0.2)
    model = ViT(
        ViTConfig(image_size=size, patch_size=patch, embed_dim=width, depth=2, num_heads=heads, num_classes=5, **ours)
    ).eval()
    model.load_state_dict(peer.state_dict())
    images = torch.randn(3, model.config.in_channels, size, size)
    mine, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    logits, expected = model(mine), peer(other)
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert logits.abs().max() > 0.1
    logits.square().sum().backward()
    expected.square().sum().backward()
    assert mine.grad is not None
    assert other.grad is not None
    scale = other.grad.abs().max()
    assert scale > 0
    assert_close(mine.grad / scale, other.grad / scale, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("ti16", 5_717_416, 1.26e9),
        ("s16", 22_050_664, 4.61e9),
        ("b16", 86_567_656, 17.58e9),
        ("b32", 88_224_232, 4.41e9),
        ("l16", 304_326_632, 61.60e9),
    ],
)
def test_sizes_and_costs_are_the_published_ones(name, parameters, macs):
    assert num_parameters(variant_config(name)) == parameters
    assert num_macs(variant_config(name)) == pytest.approx(macs, rel=0.006)


def test_article_shapes():
    model = ViT(ViTConfig(depth=1))
    images = torch.rand(1, 3, 224, 224)
    assert model(images).shape == (1, 1000)
    assert model.patch_embed(images).shape == (1, 768, 14, 14)
    assert model.positional_encoding(images.shape).shape == (1, 768, 14, 14)


def test_features_name_every_intermediate_and_agree_with_forward():
    model = small(num_registers=2).eval()
    images = torch.rand(2, 3, 32, 32)
    features = model.features(images)
    assert list(features) == ["encoder", "blocks.0", "blocks.1", "transformer", "pooled", "logits"]
    assert features["encoder"].shape == (2, 24, 4, 4)
    assert features["blocks.1"].shape == (2, 1 + 2 + 16, 24)
    assert_close(features["logits"], model(images), atol=0, rtol=0)


@pytest.mark.parametrize("decoder", DECODER_NAMES)
def test_other_sizes_and_aspect_ratios_work_without_a_flag(decoder):
    model = small(decoder=decoder, num_registers=1).eval()
    for size in [(32, 32), (40, 24), (8, 64), (9, 33)]:
        assert model(torch.rand(1, 3, *size)).shape == (1, 7)


def test_without_positions_permuted_patches_give_equal_logits():
    model = small(positions="none", decoder="mean").eval()
    torch.manual_seed(5)
    images = torch.rand(1, 3, 32, 32)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(1, 3, 16, 8, 8)
    patches = patches[:, :, torch.randperm(16)].reshape(1, 3, 4, 4, 8, 8)
    permuted = patches.permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 32)
    assert not torch.equal(images, permuted)
    assert_close(model(images), model(permuted), atol=1e-5, rtol=1e-5)
    placed = small(decoder="mean").eval()
    for parameter in placed.parameters():  # fresh weights attend so evenly that positions hardly matter
        torch.nn.init.normal_(parameter, std=0.3)
    assert (placed(images) - placed(permuted)).abs().max() > 1e-3, "with positions they differ"


@pytest.mark.parametrize(("source", "target"), [((4, 4), (7, 3)), ((14, 14), (16, 16)), ((3, 5), (2, 9))])
def test_position_resize_is_timms(source, target):
    torch.manual_seed(0)
    table = torch.randn(1, 2 + source[0] * source[1], 8)
    ours = resize_table(table, source, target, num_prefix=2)
    # timm 1.0 takes the number of prefix tokens and old grids that are not square.
    theirs = resample_abs_pos_embed(table, list(target), list(source), num_prefix_tokens=2)
    assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_sincos_table_by_hand():
    table = sincos2d((2, 3), 8)[0]
    assert table.shape == (6, 8)
    omega = torch.tensor([1.0, 1e-4])
    row, column = 1, 2
    angle = torch.cat([(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()])
    assert_close(table[row * 3 + column], angle)
    assert len(table.unique(dim=0)) == 6


def test_initialisation_is_seeded_and_as_stated():
    first, second = small(), small()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    weight = first.blocks[0].mlp.fc1.weight  # type: ignore[union-attr]
    assert weight.abs().max() <= 0.04
    assert 0.012 < weight.std() < 0.025
    assert first.patch_embed.proj.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.25)


def test_dropout_acts_after_every_layer_only_in_training():
    model = small(dropout=0.5)
    drops = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)]
    expected = ["pos_drop", "head_drop"] + [
        f"blocks.{i}.{part}" for i in range(2) for part in ("attn.proj_drop", "mlp.drop")
    ]
    assert sorted(drops) == sorted(expected)
    images = torch.rand(1, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("setting", ["attention_dropout", "drop_path", "patch_dropout"])
def test_each_regulariser_really_acts(setting):
    torch.manual_seed(3)
    model = small(**{setting: 0.6})
    images = torch.rand(4, 3, 32, 32)
    outputs = torch.stack([model(images) for _ in range(6)])
    assert outputs.std(dim=0).max() > 1e-4
    model.eval()
    assert torch.equal(model(images), model(images))


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    for count, rate in [(4000, 0.25), (3, 0.1), (7, 0.4), (1, 0.5)]:
        seen, computed = [], []

        def branch(x, layout, computed=computed):
            computed.append(len(x))
            return torch.ones_like(x)

        for _ in range(max(1, 12_000 // count)):
            out = DropPath(rate).train()(torch.zeros(count, 2, 3), branch, TokenLayout())
            assert (out == out[:, :1, :1]).all()
            seen.append(out[:, 0, 0])
        kept = torch.cat(seen)
        assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
        # Binomial at worst: three deviations of 12,000 draws.
        assert (kept == 0).float().mean() == pytest.approx(rate, abs=3 * (rate * (1 - rate) / 12_000) ** 0.5)
        assert set(computed) == {count - int(count * rate)}, "samples that skip are not computed"
    rates = [block.drop_path.rate for block in small(depth=5, drop_path=0.4).blocks]  # type: ignore[union-attr]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_patch_dropout_keeps_prefix_and_a_subset_in_order():
    torch.manual_seed(0)
    tokens = torch.arange(12.0)[None, :, None].expand(5, -1, 2)
    rope = torch.arange(12.0)[:, None].expand(-1, 4)
    out, layout = PatchDropout(0.5, num_prefix=2).train()(tokens, TokenLayout(rope))
    assert layout.rope is not None
    assert torch.equal(layout.rope[:, 0, :, :2], out), "a patch's rotation goes with it"
    assert out.shape == (5, 2 + 5, 2)
    assert (out[:, :2, 0] == torch.tensor([0.0, 1.0])).all()
    assert (out[:, 1:, 0].diff(dim=1) > 0).all()
    assert len(out[:, :, 0].unique(dim=0)) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 33}, "image_size 33 is not a multiple of model.patch_size 8; try --model.image_size 32"),
        ({"embed_dim": 25}, "embed_dim 25 is not a multiple of model.num_heads 3; try --model.embed_dim 27"),
        ({"decoder": "tokn"}, "did you mean 'token'"),
        ({"positions": "learnt"}, "did you mean 'learned'"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"class_token": False}, "reads the class token"),
        ({"window": 7}, "window 7 has no effect"),
        ({"attention": "local"}, "needs model.window, an odd number of patches, .*such as --model.window 7; got 0"),
        ({"attention": "local", "window": 4}, "needs model.window, an odd number .*got 4"),
        ({"attention": "locl", "window": 3}, "unknown model.attention 'locl'; did you mean 'local'"),
        ({"attention": "local,,global", "window": 3}, "unknown model.attention ''"),
        ({"attention": "local,local,global", "window": 3, "depth": 2}, "pattern of 3 blocks, but model.depth is 2"),
        ({"attention": "local", "window": 3, "patch_dropout": 0.5}, "leaves holes in the grid"),
        ({"in_channels": 4}, "in_channels is 4"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(changes, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        dataclasses.replace(SMALL, **changes)


def test_wrong_images_are_refused_clearly():
    model = small()
    with pytest.raises(ValueError, match="1 channels, but model.in_channels is 3"):
        model.encode(torch.rand(1, 1, 32, 32))
    for size in [(4, 4), (33, 7)]:
        with pytest.raises(ValueError, match="smaller than a patch of 8×8"):
            model.encode(torch.rand(1, 3, *size))


def test_variants():
    assert variant_config("s16-concat").decoder == "concat"
    assert variant_config("ti4").image_size == 32
    assert variant_config("s14", num_classes=3).grid == (16, 16)
    for name in LISTED:
        assert num_parameters(variant_config(name)) > 0
    with pytest.raises(ValueError, match="did you mean 'ti'"):
        variant_config("tii16")
    with pytest.raises(ValueError, match="did you mean 'concat'"):
        variant_config("s16-concta")
    with pytest.raises(ValueError, match="unknown model 'resnet'"):
        variant_config("resnet")


def test_a_batch_of_none_and_of_one():
    model = small().eval()
    assert model(torch.rand(0, 3, 32, 32)).shape == (0, 7)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 7)
    assert small(num_classes=0).eval()(torch.rand(1, 3, 32, 32)).shape == (1, 24)


def test_heads_may_be_wider_together_than_the_tokens():
    model = small(embed_dim=24, num_heads=2, head_dim=20)
    assert model.blocks[0].attn.qkv.weight.shape == (120, 24)
    assert model.blocks[0].attn.proj.weight.shape == (24, 40)
    assert num_macs(model.config) - num_macs(small(embed_dim=24, num_heads=2).config) > 0
    with pytest.raises(ValueError, match=r"model\.init 'mimetic'.*2 × model\.head_dim 20 is not model\.embed_dim 24"):
        small(embed_dim=24, num_heads=2, head_dim=20, init="mimetic")


@pytest.mark.parametrize("attention", ["global", "local"])
def test_mimetic_initialisation_reaches_local_attention_too(attention):
    window = {"attention": "local", "window": 3} if attention == "local" else {}
    plain, mimetic = small(**window), small(init="mimetic", **window)
    assert mimetic.blocks[0].attn.qkv.weight.norm() > 2 * plain.blocks[0].attn.qkv.weight.norm()


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", ["global", "local"])
def test_attention_weights_give_the_attention_again(kind, qk_norm):
    """What the kernels never hold: rows that add up to one, nothing outside the window, and the same output."""
    layer = {"global": GlobalAttention, "local": partial(LocalAttention, window=3)}[kind](24, 3, qk_norm=qk_norm)
    grid, prefix = (3, 5), 2
    layout = TokenLayout(rope=rope2d(grid, 8, num_prefix=prefix), grids=(grid,), num_prefix=prefix)
    x = torch.randn(2, prefix + 15, 24, requires_grad=True)
    weights = layer.weights(x, layout)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 17))
    outside = ~window_mask(grid, 3, prefix) if kind == "local" else torch.zeros(17, 17, dtype=torch.bool)
    assert (weights[:, :, outside] == 0).all()
    values = layer.project(x, layout)[2]
    again = layer.proj(rearrange(weights @ values, "B K N d -> B N (K d)"))
    torch.testing.assert_close(again, layer(x, layout), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(weights[0, 0, 0, 1], x)
    assert gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="weights of 2 images packed in one row"):
        layer.weights(x, TokenLayout(grids=((2, 3), (3, 3)), num_prefix=1))
