"""`vitrail export`: transformers opens the folder and gives our logits; what it cannot express is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_folders import FAMILIES, redrawn, save_family, their_answer, their_pixels, write_images
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import vitrail
from vitrail.api import train
from vitrail.cli import run
from vitrail.console import Console
from vitrail.data.images.decode import read_image
from vitrail.data.images.preprocess import Preprocess
from vitrail.export.formats import FORMATS, export
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.weights.model_file import ModelHeader, save_model, versions
from vitrail.weights.resolve import open_weights

SHAPE = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
LABELS = ("cat", "dog", "unknown bird")


@pytest.fixture(autouse=True, scope="module")
def _quiet_and_alone() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images"))


def saved(folder: Path, preprocess: dict[str, Any] | None = None, temperature: float = 1.0, **fields: Any) -> Path:
    """Save a random model file."""
    config = ViTConfig(**{**SHAPE, **fields})
    values = (0.3,) * config.in_channels
    header = ModelHeader(
        architecture=config,
        labels=LABELS[: config.num_classes],
        preprocess=Preprocess(
            image_size=config.image_size,
            channels=config.in_channels,
            mean=values,
            std=values,
            **(preprocess or {"resize": "squash"}),
        ),
        temperature=temperature,
        versions=versions(),
    )
    save_model(folder / "model.safetensors", redrawn(ViT(config)).state_dict(), header)
    return folder / "model.safetensors"


def opened(folder: Path, base: type = AutoModelForImageClassification) -> Any:
    """Open a folder with transformers, and check that it missed nothing and found nothing too much."""
    model, loading_info = base.from_pretrained(folder, output_loading_info=True)
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading_info
    return model.eval()


def agree(ours: Path | str, folder: Path, images: list[Path], *, backend: str = "pil", atol: float = 1e-4) -> None:
    classifier, model = vitrail.load(ours), opened(folder)
    assert [model.config.id2label[i] for i in range(len(classifier.labels))] == list(classifier.labels)
    for path in images:
        mine = classifier.logits([classifier.preprocess.apply(read_image(path))])
        with torch.no_grad():
            theirs = model(their_pixels(folder, path, backend=backend)).logits
        assert_close(mine, theirs, atol=atol, rtol=0)
        assert mine.abs().max() > 0.1


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "vit"),
        ({"layer_norm_eps": 1e-3, "mlp": "quick_gelu", "mlp_ratio": 56 / 24, "qkv_bias": False, "head_dim": 4}, "vit"),
        ({"mlp": "relu", "positions": "sincos2d"}, "vit"),
        ({"mlp": "gelu_tanh", "positions": "none", "embed_dim": 26, "num_heads": 2}, "vit"),
        ({"patch_sizes": (4, 8)}, "vit"),
        ({"num_registers": 1, "mlp_ratio": 56 / 24}, "deit"),
        ({"num_registers": 1, "decoder": "token_pair"}, "deit"),
        ({"num_registers": 3}, "dinov2_with_registers"),
        ({"layer_scale": 0.1}, "dinov2"),
        ({"decoder": "mean", "fc_norm": False}, "dinov2"),
        ({"decoder": "token_mean", "layer_scale": 1.0, "num_registers": 2, "mlp_ratio": 3.0}, "dinov2_with_registers"),
        ({"decoder": "token_mean", "mlp": "swiglu", "mlp_ratio": 64 / 24}, "dinov2"),
    ],
    ids=str,
)
def test_transformers_gives_our_logits(fields, model_type, tmp_path, images):
    ours = saved(tmp_path, **fields)
    made = export(ours, "hf", out=tmp_path / "folder")
    assert json.loads((made.path / "config.json").read_text())["model_type"] == model_type
    assert sorted(path.name for path in made.path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    agree(ours, made.path, images)


PREPROCESSINGS = [
    {"resize": "squash", "interpolation": "lanczos"},
    {"resize": "squash_crop", "crop_fraction": 0.7, "crop_offset": "down"},
    {"resize": "crop", "crop_fraction": 0.9, "crop_offset": "down", "interpolation": "bilinear"},
]


@pytest.mark.parametrize("preprocess", PREPROCESSINGS, ids=str)
def test_preprocessing_goes_out_too(preprocess, tmp_path, images):
    ours = saved(tmp_path, preprocess)
    agree(ours, export(ours, "hf", out=tmp_path / "folder").path, images)


@pytest.mark.parametrize("preprocess", PREPROCESSINGS, ids=str)
def test_with_torchvisions_resampler_the_default_processor_agrees_too(preprocess, tmp_path, images):
    ours = saved(tmp_path, {**preprocess, "resampler": "torchvision"})
    folder = export(ours, "hf", out=tmp_path / "folder").path
    assert AutoImageProcessor.from_pretrained(folder).backend == "torchvision"
    agree(ours, folder, images, backend="torchvision")


def test_with_pillows_the_default_processor_differs_by_single_levels_which_is_told(tmp_path, images):
    ours = saved(tmp_path)
    made = export(ours, "hf", out=tmp_path / "folder")
    assert any('backend="pil") gives the very pixels' in note for note in made.notes)
    for path in images:
        fast, slow = (their_pixels(made.path, path, backend=backend) for backend in ("torchvision", "pil"))
        levels = (fast - slow).abs() * 0.3 * 255
        assert levels.max() < 1.01
        assert (levels > 0.5).float().mean() < 0.2


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_grey_images(resize, backend, tmp_path, images):
    resampler = "pillow" if backend == "pil" else "torchvision"
    ours = saved(tmp_path, {"resize": resize, "resampler": resampler, "crop_offset": "down"}, in_channels=1)
    made = export(ours, "hf", out=tmp_path / "folder")
    assert any("open them as mode L" in note for note in made.notes)
    classifier, model = vitrail.load(ours), opened(made.path)
    image = read_image(images[2], mode="L")
    processor = AutoImageProcessor.from_pretrained(made.path, backend=backend)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert_close(classifier.logits([classifier.preprocess.apply(image)]), model(pixels).logits, atol=1e-4, rtol=0)


def test_labels_that_stand_twice_are_told(tmp_path):
    config = ViTConfig(**SHAPE)
    header = ModelHeader(config, ("cat", "dog", "cat"), Preprocess(image_size=32))
    save_model(tmp_path / "model.safetensors", ViT(config).state_dict(), header)
    made = export(tmp_path / "model.safetensors", "hf", out=tmp_path / "folder")
    assert any("labels that stand for several classes: cat; label2id" in note for note in made.notes)


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "vit"),
        ({"num_registers": 2, "positions": "rope2d"}, "dinov3_vit"),
        ({"positions": "rope2d", "mlp": "swiglu", "layer_scale": 0.1, "qkv_bias": False}, "dinov3_vit"),
        ({"num_registers": 1}, "deit"),
        ({"layer_scale": 0.1}, "dinov2"),
    ],
    ids=str,
)
def test_without_a_classifier_the_base_model_is_written(fields, model_type, tmp_path, images):
    ours = saved(tmp_path, num_classes=0, **fields)
    made = export(ours, "hf", out=tmp_path / "folder")
    model, loading_info = AutoModel.from_pretrained(made.path, output_loading_info=True)
    assert model.config.model_type == model_type
    assert all("pooler" in name for name in loading_info["missing_keys"])
    assert not loading_info["unexpected_keys"]
    classifier = vitrail.load(ours)
    pixels = classifier.preprocess.apply(read_image(images[0]))
    theirs = their_answer(model.eval(), classifier.preprocess.normalise(torch.from_numpy(pixels[None])))
    assert_close(classifier.logits([pixels]), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if not name.startswith(("mae", "vit-mim", "vit-gelu", "dinov3-fewer"))]
)
def test_from_transformers_and_back_every_bit_is_the_same(name, tmp_path):
    save_family(name, tmp_path / "theirs")
    first = open_weights(tmp_path / "theirs")
    export(tmp_path / "theirs", "hf", out=tmp_path / "ours")
    second = open_weights(tmp_path / "ours")
    assert second.header.labels == first.header.labels
    assert second.header.preprocess == first.header.preprocess
    assert second.weights.keys() == first.weights.keys()
    assert all(torch.equal(second.weights[key], first.weights[key]) for key in first.weights)
    assert second.header.architecture == first.header.architecture
    assert second.report.resized == ()


def test_through_vitrail_the_tensors_of_the_file_are_the_same(tmp_path):
    save_family("vit", tmp_path / "theirs")
    export(f"hf:{tmp_path / 'theirs'}", "vitrail", out=tmp_path / "own.safetensors")
    export(tmp_path / "own.safetensors", "hf", out=tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert opened(tmp_path / "back").config.layer_norm_eps == 1e-12


def test_a_model_file_says_where_it_came_from_and_keeps_its_temperature(tmp_path):
    ours = saved(tmp_path, temperature=1.7)
    made = export(ours, "hf")
    assert made.path == tmp_path / "model-hf"
    assert any("temperature 1.7" in note for note in made.notes)
    header = open_weights(made.path).header
    assert header.temperature == 1.7
    assert header.versions["imported_from"] == str(made.path)
    assert export(made.path, "vitrail").path == tmp_path / "model-hf.safetensors"
    assert vitrail.load(tmp_path / "model-hf.safetensors").header.temperature == 1.7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "local", "window": 3}, "its attention is local"),
        ({"attention": "local,global", "window": 3}, "its attention is local"),
        ({"decoder": "concat"}, "its decoder is 'concat'"),
        ({"decoder": "attention"}, "its decoder is 'attention'"),
        ({"decoder": "mean"}, "has its layer norm after pooling"),
        ({"decoder": "mean", "fc_norm": False, "class_token": False}, "it has no class token"),
        ({"encoder": "conv"}, "its encoder is 'conv'"),
        ({"patch_norm": True}, "patch_norm"),
        ({"qk_norm": True}, "qk_norm"),
        ({"positions": "rope2d"}, "rotary positions are DINOv3's"),
        ({"decoder": "token_pair", "num_registers": 2}, "'token_pair' is DeiT's alone"),
        ({"layer_scale": 0.1, "mlp_ratio": 2.5}, "its MLP is 60 wide"),
        ({"decoder": "token_mean", "num_classes": 0}, "without a classifier, decoder 'token_mean' has no place"),
    ],
)
def test_what_transformers_cannot_express_is_refused_with_the_reason(fields, message, tmp_path, capsys):
    ours = saved(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"transformers cannot express this model: .*{message}"):
        export(ours, "hf", out=tmp_path / "folder")
    assert run(["export", str(ours), "--to", "hf", "--out", str(tmp_path / "folder")]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_whole_images_in_their_aspect_ratio_are_refused(tmp_path):
    ours = saved(tmp_path, {"resize": "aspect", "multiple": 8})
    with pytest.raises(ValueError, match="preprocessing 'aspect'"):
        export(ours, "hf", out=tmp_path / "folder")


def test_a_crop_that_transformers_rounds_otherwise_is_told(tmp_path):
    ours = saved(tmp_path, {"resize": "crop"})
    assert any("are seen one pixel beside" in note for note in export(ours, "hf").notes)


def test_no_half_of_a_folder_is_left(tmp_path, monkeypatch):
    ours = saved(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitrail.weights.formats.hf_writer.save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        export(ours, "hf", out=tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_there_is_not_overwritten_but_an_empty_folder_is_taken(tmp_path, capsys):
    ours = saved(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    for to, out in (("hf", "full"), ("hf", "model.safetensors"), ("vitrail", "model.safetensors")):
        assert run(["export", str(ours), "--to", to, "--out", str(tmp_path / out)]) == 1
        assert "is there already" in capsys.readouterr().err
    assert run(["export", str(ours), "--to", "hf", "--out", str(tmp_path / "no" / "folder")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(["export", str(ours), "--to", "hf", "--out", str(tmp_path / "empty")]) == 0
    assert "ViTForImageClassification" in capsys.readouterr().out
    assert (tmp_path / "empty" / "config.json").is_file()
    (tmp_path / "another").mkdir()
    assert run(["export", str(ours), "--to", "vitrail", "--out", str(tmp_path / "another")]) == 1
    assert "is a folder; name a file" in capsys.readouterr().err
    assert run(["export", str(ours), "--to", "hff"]) == 1
    assert "unknown --to 'hff'; did you mean 'hf'" in capsys.readouterr().err


def test_a_bare_folder_becomes_a_model_file_by_description(tmp_path, capsys):
    save_family("vit", tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    arguments = ["export", str(tmp_path / "bare"), "--to", "vitrail", "--out", str(tmp_path / "own.safetensors")]
    assert run(arguments) == 1
    assert "--describe mean=0.5 std=0.5" in capsys.readouterr().err
    description = ["--describe", "mean=0.5", "std=0.25", "resize=squash", "interpolation=bilinear", "labels=a,b,c"]
    assert run([*arguments, *description]) == 0
    classifier = vitrail.load(tmp_path / "own.safetensors")
    assert classifier.labels == ("a", "b", "c")
    assert classifier.preprocess.std == (0.25, 0.25, 0.25)
    assert run([*arguments, "--describe", "maen=0.5"]) == 1
    assert "did you mean 'mean'" in capsys.readouterr().err


def test_a_trained_run_is_evaluated_alike_by_transformers(tiny_run, tmp_path):

    _, data = tiny_run
    settings = {
        "variant": "nano8",
        "epochs": 1.0,
        "batch_size": 16,
        "model.depth": 2,
        "model.embed_dim": 24,
        "model.num_heads": 2,
    }
    settings |= {"model.decoder": "token", "model.class_token": True, "preprocess.resize": "squash"}
    result = train(data, out=tmp_path / "run", console=Console(quiet=True), **settings)
    folder = export(result.folder, "hf").path
    assert folder == tmp_path / "run-hf"
    files = sorted(data.rglob("*.png"))
    rows = vitrail.load(result.folder).predict(files)
    model = opened(folder)
    pixels = torch.cat([their_pixels(folder, path, backend="pil") for path in files])
    with torch.no_grad():
        theirs = [model.config.id2label[int(i)] for i in model(pixels).logits.argmax(1)]
    assert theirs == [row.label for row in rows]


@pytest.mark.parametrize("name", FORMATS)
def test_every_target_writes_what_loads_again(name, tmp_path):
    # Of two middles transformers takes the smaller, timm the nearest.
    ours = saved(tmp_path, {"resize": "crop", "crop_offset": "nearest" if name == "timm" else "down"})
    made = export(ours, name, out=tmp_path / "again")
    again = open_weights(made.path)
    first = open_weights(ours)
    assert all(torch.equal(again.weights[key], first.weights[key]) for key in first.weights)
    assert again.header.preprocess == dataclasses.replace(
        first.header.preprocess, crop_fraction=again.header.preprocess.crop_fraction
    )
    assert int(32 / again.header.preprocess.crop_fraction) == int(32 / 0.9)


@pytest.mark.slow
def test_transformers_itself_is_not_needed(tmp_path):
    save_family("vit", tmp_path / "vit")
    code = (
        "import sys\nsys.modules['transformers'] = None\nfrom vitrail.export.formats import export\n"
        f"export({str(tmp_path / 'vit')!r}, 'hf', out={str(tmp_path / 'out')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert opened(tmp_path / "out").config.model_type == "vit"


def test_transformers_opens_what_is_written_for_timm(tmp_path, images):
    # What `auto` trains from scratch; transformers' own families all want a class token.
    fields = {"decoder": "mean", "class_token": False, "positions": "sincos2d", "mlp_ratio": 2.0}
    ours = saved(tmp_path, {"resize": "crop", "crop_offset": "nearest"}, **fields)
    with pytest.raises(ValueError, match="no class token.*what --to timm writes"):
        export(ours, "hf", out=tmp_path / "refused")
    folder = export(ours, "timm", out=tmp_path / "out").path
    model, processor = opened(folder), AutoImageProcessor.from_pretrained(folder)
    classifier = vitrail.load(ours)
    for path in images:
        image = read_image(path)
        with torch.no_grad():
            theirs = model(**processor(image, return_tensors="pt")).logits
        assert_close(theirs, classifier.logits([classifier.preprocess.apply(image)]), atol=1e-4, rtol=0)
    assert tuple(model.config.id2label[i] for i in range(len(classifier.labels))) == classifier.labels
