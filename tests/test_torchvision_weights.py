"""torchvision's models come in with the logits that torchvision gives, from the image file on.

A tiny model is registered as torchvision's own are, with weights at a `file://` address: everything but the network is real.
"""

import hashlib
from functools import partial

import pytest
import timm
import torch
import torchvision.models._api as api
from photographs import assert_same_logits, redrawn, write_photographs
from torchvision.models import VisionTransformer, Weights, WeightsEnum
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from vitrail.models.config import ViTConfig
from vitrail.weights.key_mapping import to_ours, to_theirs
from vitrail.weights.naming import TORCHVISION
from vitrail.weights.resolve import open_weights

SHAPE = {"patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 80}
LABELS = ["ant", "bee", "cat", "dog", "elk"]
TRANSFORM = partial(ImageClassification, crop_size=32, resize_size=37)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("images"))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Register a tiny model with published weights; returns the model that they are of."""
    model = redrawn(VisionTransformer(image_size=32, num_classes=5, **SHAPE))
    torch.save(model.state_dict(), tmp_path / "draft")
    digest = hashlib.sha256((tmp_path / "draft").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "draft").rename(tmp_path / f"vit_tiny-{digest}.pth")
    meta = {"categories": LABELS, "min_size": (32, 32)}

    class TinyWeights(WeightsEnum):
        V1 = Weights(file.as_uri(), TRANSFORM, meta)
        V2 = Weights((tmp_path / "nowhere-01234567.pth").as_uri(), TRANSFORM, meta)
        DEFAULT = V1

    def vit_tiny(*, weights: TinyWeights | None = None, progress: bool = True, **how):
        return VisionTransformer(**{"image_size": 32, **SHAPE, **how})

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(api.BUILTIN_MODELS, "vit_tiny", vit_tiny)
    return model


def test_published_weights_by_name(tiny, photographs):
    for model_spec in ("torchvision:vit_tiny", "torchvision:vit_tiny.V1"):
        imported = open_weights(model_spec)
        assert imported.header.labels == tuple(LABELS)
        assert imported.header.architecture.layer_norm_eps == 1e-6
        assert_same_logits(imported, tiny, TRANSFORM(), photographs)
    assert not imported.report.notes


def test_a_file_under_the_name_of_its_model(tiny, photographs, tmp_path):
    old = {
        name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): x
        for name, x in tiny.state_dict().items()
    }
    torch.save({"model": old, "epoch": 1}, tmp_path / "a.pth")
    imported = open_weights(f"torchvision:vit_tiny={tmp_path / 'a.pth'}")
    assert any("assumed of the file" in note for note in imported.report.notes)
    assert_same_logits(imported, tiny, TRANSFORM(), photographs)


def test_tables_in_both_directions_are_bit_equal(tiny):
    before = {name: tensor.detach() for name, tensor in tiny.state_dict().items()}
    ours, unknown = to_ours(before, TORCHVISION, ViTConfig())
    after, lost = to_theirs(ours, TORCHVISION, ViTConfig())
    assert not unknown + lost
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_file_alone(tmp_path, photographs):
    model = redrawn(VisionTransformer(image_size=48, num_classes=3, **SHAPE))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="weights alone do not tell num_heads; .*--to vitrail --describe num_heads=N"):
        open_weights(tmp_path / "a.pth")
    description = {"num_heads": 3, "interpolation": "bicubic", "crop_fraction": 1.0}
    imported = open_weights(tmp_path / "a.pth", description)
    assert imported.header.labels == ("0", "1", "2")
    assert any("preprocessing assumed: mean 0.485,0.456,0.406" in note for note in imported.report.notes)
    transform = ImageClassification(crop_size=48, resize_size=48, interpolation=InterpolationMode.BICUBIC)
    assert_same_logits(imported, model, transform, photographs)


@pytest.mark.parametrize(
    ("model_spec", "expected"),
    [
        ("torchvision:vit_b_61", r"no model 'vit_b_61'; did you mean 'vit_b_16'\? Its ViTs: vit_b_16, vit_b_32"),
        ("torchvision:vit_b_16.V9", r"vit_b_16 has no weights 'V9'; it has IMAGENET1K_V1, IMAGENET1K_SWAG_E2E_V1"),
        ("torchvision:resnet18", r"is a ResNet; Vitrail's ViT can be torchvision's VisionTransformer"),
        ("torchvision:vit_b_16=nowhere.pth", r"nowhere\.pth: no such file"),
        ("torchvision:vit_tiny.V2", r"could not be had \(.*they need the network once.*=FILE"),
    ],
)
def test_what_cannot_be_had_is_one_clear_error(tiny, model_spec, expected):
    with pytest.raises(ValueError, match=expected):
        open_weights(model_spec)


def test_a_file_of_another_model(tiny, tmp_path):
    model = VisionTransformer(image_size=32, num_classes=5, **{**SHAPE, "hidden_dim": 24, "num_layers": 1})
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"(?s)missing: blocks\.1.*shape: blocks\.0\.attn\.proj\.bias is \(24,\)"):
        open_weights(f"torchvision:vit_tiny={tmp_path / 'a.pth'}")
    torch.save(VisionTransformer(image_size=32, num_classes=9, **SHAPE).state_dict(), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="its head has 9 classes, those weights 5"):
        open_weights(f"torchvision:vit_tiny={tmp_path / 'b.pth'}")


@pytest.mark.parametrize("model_spec", ["torchvision:vit_tiny", "timm:test_vit"])
def test_a_file_of_another_library_says_whose_names_it_has(tiny, tmp_path, model_spec):
    timms = timm.create_model("test_vit").state_dict()
    tensors = timms if model_spec.startswith("torchvision") else tiny.state_dict()
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"their names are those of (timm|torchvision)'s VisionTransf") as caught:
        open_weights(f"{model_spec}={tmp_path / 'a.pth'}")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert "(0,)" not in str(caught.value)


def test_a_tanh_layer_before_the_head_is_refused(tmp_path):
    model = VisionTransformer(image_size=32, num_classes=5, representation_size=16, **SHAPE)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"unexpected: heads\.pre_logits\.bias, heads\.pre_logits\.weight"):
        open_weights(tmp_path / "a.pth", {"num_heads": 3})
