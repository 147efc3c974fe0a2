"""Weights of one model as the start of another: what must stay the same does, and every difference is reported."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from vitrail.data.images.preprocess import Preprocess
from vitrail.models.config import ViTConfig
from vitrail.models.encoders import kernel_resize, resize_kernel
from vitrail.models.positions import resize_table
from vitrail.models.vit import ViT
from vitrail.weights.adapt import Start, adapt
from vitrail.weights.imported_model import ImportedModel, LoadReport
from vitrail.weights.match_labels import match_labels
from vitrail.weights.model_file import ModelHeader, build_model

LABELS = ("ant", "bee", "cat", "dog", "eel")
SMALL = ViTConfig(image_size=32, patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=3)


def trained(config: ViTConfig = SMALL, labels: tuple[str, ...] = LABELS) -> ImportedModel:
    """Return a model whose every weight means something: none is zero or one."""
    weights = ViT(config).state_dict()
    weights = {name: tensor + (0.1 * torch.randn(tensor.shape)).to(tensor.dtype) for name, tensor in weights.items()}
    half = (0.5,) * config.in_channels
    preprocess = Preprocess(image_size=config.image_size, channels=config.in_channels, mean=half, std=half)
    header = ModelHeader(config, labels, preprocess)
    return ImportedModel(header, weights, LoadReport("theirs", loaded=len(weights)))


def started(imported: ImportedModel, labels: tuple[str, ...] = LABELS, **changes) -> tuple[ViT, Start]:
    config = dataclasses.replace(imported.header.architecture, num_classes=len(labels), **changes)
    start = adapt(imported, config, labels, ViT(config).state_dict())
    return build_model(config, start.weights, "ours"), start


def theirs(imported: ImportedModel) -> ViT:
    return build_model(imported.header.architecture, imported.weights, "theirs")


def test_nothing_changed_is_nothing_said():
    imported = trained()
    model, start = started(imported)
    assert all(torch.equal(start.weights[name], tensor) for name, tensor in imported.weights.items())
    assert start.report == LoadReport("theirs", loaded=len(imported.weights))
    assert start.random == ()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), theirs(imported)(images))


@pytest.mark.parametrize("positions", ["learned", "rope2d", "none"])
def test_another_image_size_computes_what_the_old_model_does_at_that_size(positions):
    imported = trained(dataclasses.replace(SMALL, positions=positions, num_registers=2))
    model, start = started(imported, image_size=48)
    images = torch.rand(2, 3, 48, 48)
    assert_close(model(images), theirs(imported)(images), atol=1e-5, rtol=1e-5)
    if positions == "learned":
        wanted = resize_table(imported.weights["pos_embed"], (4, 4), (6, 6), num_prefix=3)
        assert torch.equal(start.weights["pos_embed"], wanted)
        assert start.report.resized == ("pos_embed: 4×4 → 6×6 patches",)
        assert start.report.loaded == len(imported.weights) - 1


def test_a_fixed_table_goes_on_as_a_learned_one_on_another_grid():
    imported = trained(dataclasses.replace(SMALL, positions="sincos2d"))
    model, start = started(imported, image_size=48, positions="learned")
    images = torch.rand(2, 3, 48, 48)
    assert_close(model(images), theirs(imported)(images), atol=1e-5, rtol=1e-5)
    assert start.random == ()
    assert "fixed sine-cosine table" in " ".join(start.report.lines())


def test_another_patch_size_computes_what_the_old_model_does_with_such_patches():
    imported = trained()
    model, start = started(imported, patch_size=4)
    images = torch.rand(2, 3, 32, 32)
    assert_close(model(images), theirs(imported)(images, patch_size=4), atol=1e-5, rtol=1e-5)
    kernel = resize_kernel(imported.weights["patch_embed.proj.weight"], kernel_resize(8, 4))
    assert torch.equal(start.weights["patch_embed.proj.weight"], kernel)
    assert "patch_embed.proj.weight: 8×8 → 4×4 pixels" in start.report.resized
    with pytest.raises(ValueError, match=r"model\.patch_size 4 \(they have 8\)"):
        started(trained(dataclasses.replace(SMALL, encoder="conv")), patch_size=4)


@pytest.mark.parametrize("encoder", ["patch", "conv"])
@pytest.mark.parametrize(("of", "to"), [(3, 1), (1, 3)])
def test_grey_images_get_the_same_answer_through_other_channels(encoder, of, to):
    imported = trained(dataclasses.replace(SMALL, encoder=encoder, in_channels=of))
    model, start = started(imported, in_channels=to)
    grey = torch.rand(2, 1, 32, 32)
    ours, expected = model(grey.expand(-1, to, -1, -1)), theirs(imported)(grey.expand(-1, of, -1, -1))
    assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert f"{of} → {to} channels" in start.report.resized[0]


def test_channels_and_patch_size_together():
    imported = trained()
    model, start = started(imported, in_channels=1, patch_size=16)
    grey = torch.rand(2, 1, 32, 32)
    expected = theirs(imported)(grey.expand(-1, 3, -1, -1), patch_size=16)
    assert_close(model(grey), expected, atol=1e-5, rtol=1e-5)
    assert start.report.resized[0] == "patch_embed.proj.weight: 3 → 1 channels, 8×8 → 16×16 pixels"


def test_local_attention_takes_the_weights_of_global():
    imported = trained()
    model, _ = started(imported, attention="local", window=7)  # over the whole grid of 4 × 4: the same function
    images = torch.rand(2, 3, 32, 32)
    assert_close(model(images), theirs(imported)(images), atol=1e-5, rtol=1e-5)


def test_new_registers_are_new_and_different_and_the_rest_stays():
    imported = trained(dataclasses.replace(SMALL, num_registers=1))
    _, start = started(imported, num_registers=3)
    table, old = start.weights["pos_embed"], imported.weights["pos_embed"]
    assert torch.equal(table[:, :2], old[:, :2])
    assert torch.equal(table[:, 4:], old[:, 2:])
    assert torch.equal(start.weights["reg_token"][:, :1], imported.weights["reg_token"])
    assert not torch.equal(table[:, 2], table[:, 3]), "equal tokens would learn the same for ever"
    assert start.random == ("pos_embed", "reg_token")
    assert "reg_token: 1 → 3 tokens" in start.report.resized
    _, fewer = started(trained(dataclasses.replace(SMALL, num_registers=3)), num_registers=1)
    assert fewer.random == ()
    _, first = started(trained(), num_registers=2)
    assert first.report.missing == ("reg_token",)


def test_another_decoder_keeps_the_trunk_and_says_what_is_new():
    imported = trained()
    model, start = started(imported, decoder="mean")
    assert torch.equal(start.weights["fc_norm.weight"], imported.weights["norm.weight"])
    assert "the decoder is a different one" in start.report.head
    assert "decoder: token → mean" in start.report.notes
    assert start.random == ("head.bias", "head.weight")
    assert model(torch.rand(1, 3, 32, 32)).abs().sum() == 0, "a new head starts at zero"
    _, start = started(imported, decoder="concat")
    assert {"decoder.join.weight", "decoder.norm.bias"} <= set(start.report.missing) <= set(start.random)
    _, start = started(trained(dataclasses.replace(SMALL, decoder="concat")), decoder="token")
    assert {"decoder.join.weight", "decoder.norm.bias"} <= set(start.report.unexpected)


def test_the_first_blocks_of_a_deeper_model():
    imported = trained()
    _, start = started(imported, depth=1)
    assert "blocks.1.attn.qkv.weight" in start.report.unexpected
    assert torch.equal(start.weights["blocks.0.mlp.fc1.weight"], imported.weights["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 48}, r"model\.embed_dim 48 \(they have 24\)"),
        ({"num_heads": 4}, r"model\.num_heads 4 \(they have 3\)"),  # the shapes would fit
        ({"depth": 4}, r"model\.depth 4 \(they have 2\)"),
        ({"positions": "rope2d", "num_heads": 2}, r"model\.num_heads 2 \(.*model\.positions 'rope2d' \(they have 'learned"),
        ({"mlp": "relu"}, r"model\.mlp 'relu' \(they have 'gelu'\)"),
        ({"encoder": "conv"}, r"model\.encoder 'conv' \(they have 'patch'\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_reconciled_is_one_error_with_both_values(changes, message):
    with pytest.raises(ValueError, match=message):
        started(trained(), **changes)


def test_the_head_follows_names_not_places():
    imported = trained()
    images, old = torch.rand(2, 3, 32, 32), LABELS
    logits = theirs(imported)(images)
    model, start = started(imported, tuple(reversed(old)))
    assert_close(model(images), logits.flip(1))
    assert start.report.head == "all 5 rows found by name among 5 classes"
    assert start.random == ()
    model, start = started(imported, ("dog", "bee"))
    assert_close(model(images), logits[:, [3, 1]])
    model, start = started(imported, ("Cat", "ant", "yak"))
    assert_close(model(images)[:, :2], logits[:, [2, 0]])
    assert model(images)[:, 2].abs().max() == 0
    assert start.report.head == "2 of 3 rows found by name among 5 classes; new: yak"
    assert start.random == ("head.bias", "head.weight")
    _, start = started(imported, ("x", "y"))
    assert start.report.head == "new, 2 classes instead of 5: no name is the same"
    headless = trained(dataclasses.replace(SMALL, num_classes=0), ())
    _, start = started(headless, ("x", "y"))
    assert start.report.head == "new, 2 classes; the weights have none"


@pytest.mark.parametrize(
    ("known", "wanted", "found"),
    [
        (("cat", "Cat"), ("Cat", "cat"), {0: 1, 1: 0}),  # equal names come first
        (("tabby cat", "dog"), ("Tabby_Cat", "DOG "), {0: 0, 1: 1}),
        (("tench, Tinca tinca", "goldfish, Carassius auratus"), ("tinca-tinca", "goldfish"), {0: 0, 1: 1}),
        (("crane, bird", "crane, machine"), ("crane",), {}),  # could be either
        (("crane", "crane"), ("crane",), {}),
        (("tench, Tinca tinca",), ("tench", "Tinca tinca"), {}),  # both claim it
        (("cat",), ("cat", "CAT"), {0: 0}),  # taken by the equal name
        (("n01440764", "n01443537"), ("n01443537", "n01440764"), {0: 1, 1: 0}),
        (("cat", "dog"), ("catfish", "hot dog"), {}),
        ((), ("cat",), {}),
        (("", "a"), (" ", "b"), {}),
    ],
)
def test_labels_by_name(known, wanted, found):
    assert match_labels(known, wanted) == found


def test_half_precision_and_buffers_come_in_as_the_model_has_them():
    imported = trained(dataclasses.replace(SMALL, encoder="resnet18"))
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in imported.weights.items()}
    _, start = started(dataclasses.replace(imported, weights=half))
    wanted = ViT(imported.header.architecture).state_dict()
    assert {name: tensor.dtype for name, tensor in start.weights.items()} == {n: t.dtype for n, t in wanted.items()}


def test_what_the_file_lacked_starts_at_random_and_may_learn_first():
    imported = trained()
    report = dataclasses.replace(imported.report, missing=("norm.weight",), loaded=len(imported.weights) - 1)
    _, start = started(dataclasses.replace(imported, report=report))
    assert start.random == ("norm.weight",)
    assert start.report.missing == ("norm.weight",)
    assert start.report.loaded == len(imported.weights) - 1


@pytest.mark.parametrize(
    "numbers", [("0", "1", "2", "3", "4"), ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")]
)
def test_numbers_that_stand_for_no_names_are_matched_with_none(numbers):
    imported = trained(labels=numbers)
    model, start = started(imported, numbers[:3])
    assert not model.head.weight.any()
    assert "the weights number their classes and do not name them" in start.report.head
    own = dataclasses.replace(imported, header=dataclasses.replace(imported.header, split={"source": "digits"}))
    model, start = started(own, numbers[:3])  # a run's labels are names, also where they are numbers
    assert torch.equal(model.head.weight, imported.weights["head.weight"][:3])
