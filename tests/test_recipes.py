"""Recipes: each builds a configuration for every kind of dataset; each page says what to type and what to expect."""

import dataclasses
import re
import shlex
import subprocess
import sys

import pytest

import vitrail.cli
from vitrail.api import train
from vitrail.config import RECIPE_NAMES, RunConfig
from vitrail.config_schema import from_dict, leaves, to_dict
from vitrail.data.images.preprocess import Preprocess
from vitrail.models.config import ViTConfig
from vitrail.models.variants import variant_config
from vitrail.recipes import RECIPES, DatasetFacts, build_config
from vitrail.weights.model_file import ModelHeader

DIGITS = DatasetFacts(1438, 10, 8, True, 1, "a mirrored digit is another sign", "cpu", True)
CIFAR = DatasetFacts(45_000, 10, 32, True, 3, "", "cpu", True)
PHOTOS = DatasetFacts(2_000, 5, 480, False, 3, "", "cpu", False)
FACTS = {
    "digits": DIGITS,
    "cifar": CIFAR,
    "photos": PHOTOS,
    "grey photos": dataclasses.replace(PHOTOS, channels=1),
    "gpu": dataclasses.replace(PHOTOS, device="cuda", bf16=True),
}
WEIGHTS = ModelHeader(variant_config("ti16", num_classes=3), ("a", "b", "c"), Preprocess(image_size=224))
FROM_SCRATCH = ("digits", "cifar10", "s16_in1k", "deit3_s16")


def start_of(recipe: str) -> tuple[dict, ModelHeader | None]:
    """Return the settings and the header that `--model` gives a recipe that needs trained weights; empty for the others."""
    return ({"pretrained": "runs/photos"}, WEIGHTS) if recipe == "fine_tune" else ({}, None)


def test_the_help_names_the_recipes_that_there_are():
    assert tuple(RECIPES) == RECIPE_NAMES


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("facts", FACTS)
def test_every_recipe_builds_a_config_for_every_kind_of_dataset(recipe, facts):
    known = FACTS[facts]
    config, choices = build_config(recipe, known, *start_of(recipe))
    assert config.recipe == recipe
    assert config.model.num_classes == known.num_classes
    assert from_dict(RunConfig, to_dict(config)) == config
    values = dict(leaves(config))
    assert all(choice.reason for choice in choices)
    for choice in choices:
        assert values[choice.setting] == choice.value, "the choice printed is the choice made"
    assert len({choice.setting for choice in choices}) == len(choices), "each setting is chosen once"
    if recipe not in ("article", "fine_tune"):  # the article's images are coloured, and weights bring their own
        assert config.model.in_channels == known.channels
    if known.flip_reason:
        assert config.augment.flip == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "given",
    [
        {"model.in_channels": 1},
        {"model.in_channels": 3, "augment.saturation": 0.2},
        {"batch_size": 12, "epochs": 2.0, "optim.lr": 1e-4},
        {"model.drop_path": 0.3},
        {"augment.crop_scale": 1.0},
    ],
)
@pytest.mark.parametrize("facts", ["digits", "photos"])
def test_what_the_user_fixes_stays_in_every_recipe(recipe, given, facts):
    start, pretrained = start_of(recipe)
    config, choices = build_config(recipe, FACTS[facts], {**start, **given}, pretrained)
    values = dict(leaves(config))
    assert {name: values[name] for name in given} == given
    assert not {choice.setting for choice in choices} & set(given)
    assert len(config.preprocess.mean) == config.model.in_channels


@pytest.mark.parametrize("recipe", FROM_SCRATCH)
@pytest.mark.parametrize("given", [{"variant": "ti16-token"}, {"variant": "micro8-concat"}, {"model.decoder": "token"}])
def test_another_model_has_the_class_token_that_its_decoder_needs(recipe, given):
    model = build_config(recipe, CIFAR, given)[0].model
    assert model.decoder == ("concat" if "concat" in str(given) else "token")
    assert model.class_token is (model.decoder == "token")


def test_the_fixed_recipes_are_what_their_pages_say():
    cifar = build_config("cifar10", CIFAR, {})[0]
    assert (cifar.model.encoder, cifar.model.decoder, cifar.model.embed_dim) == ("conv", "attention", 128)
    assert (cifar.model.image_size, cifar.model.patch_size, cifar.precision) == (32, 4, "bf16")
    big_vision = build_config("s16_in1k", FACTS["gpu"], {})[0]
    assert big_vision.model == ViTConfig(
        num_classes=5,
        embed_dim=384,
        num_heads=6,
        positions="sincos2d",
        class_token=False,
        decoder="mean",
        fc_norm=False,
    )
    assert (big_vision.epochs, big_vision.batch_size, big_vision.schedule.warmup) == (90, 1024, "10000 steps")
    assert big_vision.optim.lr * big_vision.optim.weight_decay == pytest.approx(1e-4)
    deit = build_config("deit3_s16", FACTS["gpu"], {})[0]
    assert deit.model == ViTConfig(num_classes=5, embed_dim=384, num_heads=6, layer_scale=1e-4, drop_path=0.1)
    assert deit.batch_size % 8 == deit.batch_size // 8 % 2 == deit.batch_size // 8 % deit.augment.repeats == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_page_says_what_to_type_and_what_to_expect(recipe, monkeypatch):
    text = sys.modules[RECIPES[recipe].__module__].__doc__ or ""
    assert text.startswith(f"`{recipe}`")
    entries = {
        name: re.search(rf"^{name}: (.*?)(?=^[A-Z]\w+: |\n\n|\Z)", text, re.M | re.S)
        for name in ("Hardware", "Time", "Expect")
    }
    missing = [name for name, entry in entries.items() if not entry]
    assert not missing, f"the page of {recipe} says nothing of {missing}"
    assert re.search(r"\bnot measured\b|\d %", entries["Expect"][1])
    assert re.search(r"\bnot measured\b|\d (s|min|h)\b", entries["Time"][1])
    (line,) = re.findall(r"^    (?:torchrun .* -m )?(vitrail train .*)$", text, re.M)

    class CalledError(Exception):
        pass

    def record_call(source: str, *, out, model, recipe, resume, console, **settings):
        raise CalledError(model, recipe, settings)

    monkeypatch.setattr("vitrail.api.train", record_call)
    with pytest.raises(CalledError) as called:
        vitrail.cli.run(shlex.split(line)[1:])
    model, named, settings = called.value.args
    assert (named or "auto") == recipe
    start, pretrained = start_of(recipe)
    assert (model is not None) == (pretrained is not None)
    assert build_config(recipe, PHOTOS, {**settings, **start}, pretrained)[0].recipe == recipe


def test_recipes_need_no_torch():
    program = "import sys, vitrail.recipes; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("recipe", "given", "pretrained", "message"),
    [
        ("cifar", {}, None, "unknown recipe 'cifar'; did you mean 'cifar10'"),
        ("no/such/config.json", {}, None, "no such file; expected a config.json of an earlier run, or a recipe's name"),
        ("fine_tune", {}, None, "'fine_tune' starts from trained weights; give --model a run"),
        *((name, {"pretrained": "runs/x"}, WEIGHTS, f"'{name}' trains from scratch.* --recipe fine_tune") for name in FROM_SCRATCH),
        ("auto", {"batch_size": 0}, None, "batch_size is 0; expected 1 or more"),
        ("digits", {"epochs": 0.0}, None, "epochs is 0.0; expected above 0"),
        ("auto", {"model.patch_sizes": (4, 0)}, None, "model.patch_sizes is 0"),
        ("article", {"optim.lrr": 1.0}, None, "unknown setting 'optim.lrr'; did you mean 'optim.lr'"),
        ("s16_in1k", {"schedule.step_gamma": 0.1}, None, "has no effect with schedule.decay 'cosine'; leave it out"),
        ("cifar10", {"model.patch_size": 3}, None, "model.image_size 32 is not a multiple of model.patch_size 3"),
        ("deit3_s16", {"batch_size": 2048}, None, "batch_size 2048 is not a multiple of augment.repeats 3"),
        ("auto", {"pretrained": "runs/x", "preprocess.mean": (0.5,) * 3}, WEIGHTS, "belong together"),
        ("auto", {"variant": "tii16"}, None, "did you mean 'ti'"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_one_error_with_a_remedy(recipe, given, pretrained, message):
    with pytest.raises(ValueError, match=message):
        build_config(recipe, CIFAR, given, pretrained)


def test_too_few_images_for_a_published_warm_up_are_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ValueError, match="'10000 steps' is 10000 steps, but the run has only 127; shorten it"):
        train("digits", out=tmp_path / "run", recipe="s16_in1k")
    assert not (tmp_path / "run").exists()
