"""Configuration: writing and reading JSON, dotted overrides, refusals; what `auto` chooses."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.config import RunConfig, load_config, save_config
from vitrail.config_schema import from_dict, leaves, override, to_dict
from vitrail.durations import parse_duration, to_steps
from vitrail.lookup import pick, unknown
from vitrail.recipes import DatasetFacts, build_config

DIGITS = DatasetFacts(1438, 10, 8, True, 1, "a mirrored digit is another sign", "cpu", True)
CIFAR = DatasetFacts(45_000, 10, 32, True, 3, "", "cpu", True)
PHOTOS = DatasetFacts(2_000, 5, 480, False, 3, "", "cpu", False)
FACTS = {
    "digits": DIGITS,
    "cifar": CIFAR,
    "photos": PHOTOS,
    "gpu": dataclasses.replace(PHOTOS, device="cuda", bf16=True),
}


def test_json_round_trip(tmp_path):
    config = override(
        RunConfig(), {"optim.lr": 3e-4, "preprocess.mean": [0.1, 0.2, 0.3], "model.depth": 3, "epochs": 2}
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim.lrr": 1.0}, "unknown setting 'optim.lrr'; did you mean 'optim.lr'"),
        ({"modle.depth": 1}, "did you mean 'model.depth'"),
        ({"epochs": "ten"}, "epochs: expected float, got 'ten'"),
        ({"model.depth": 2.5}, "model.depth: expected int"),
        ({"compile": 1}, "compile: expected bool"),
        ({"preprocess.mean": 0.5}, "expected a list of float"),
        ({"preprocess.mean": [0.5]}, "preprocess.mean"),
        ({"optim.lr": 0.0}, "optim.lr is 0.0"),
        ({"data.val_fraction": 0.6, "data.test_fraction": 0.5}, "leave nothing to train on"),
        ({"augment.flip": 2.0}, "augment.flip is 2.0"),
        ({"schedule.decay": "cosin"}, "did you mean 'cosine'"),
        ({"log.every": "often"}, "log.every is 'often'"),
        ({"precision": "fp16"}, "did you mean 'bf16'"),
    ],
)
def test_refusals_name_the_setting_and_a_remedy(change, message):
    with pytest.raises(ValueError) as caught:
        override(RunConfig(), change)
    assert message in str(caught.value)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    for text in ("{", '{"optim": {"lrr": 1}}', '{"optim": 3}', "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            load_config(path)


def test_durations():
    lengths = {"total_steps": 1000, "steps_per_epoch": 12.5}
    assert to_steps("500 steps", "x", **lengths) == 500
    assert to_steps("2epochs", "x", **lengths) == 25
    assert to_steps("5 %", "x", **lengths) == 50
    assert parse_duration("1 epoch", "x") == (1.0, "epoch")
    for wrong in ("", "5", "-1 steps", "5 minutes", "% 5"):
        with pytest.raises(ValueError, match="x is"):
            parse_duration(wrong, "x")


def test_lookup_lists_what_is_known():
    assert pick({"a": 1}, "a", "thing") == 1
    with pytest.raises(ValueError, match="unknown thing 'resnet5'; did you mean 'resnet50'"):
        pick({"resnet50": 1, "patch": 2}, "resnet5", "thing")
    assert unknown("thing", "zzz", ["abc"]) == "unknown thing 'zzz'. Known: abc"


def test_auto_suits_the_data():
    digits, _ = build_config("auto", DIGITS, {})
    assert digits.augment.flip == 0.0
    assert digits.model.in_channels == 1
    assert digits.model.image_size == 8
    cifar, _ = build_config("auto", CIFAR, {})
    assert cifar.augment.flip == 0.5
    assert (cifar.model.image_size, cifar.model.patch_size) == (32, 4)
    assert cifar.precision == "bf16"
    photos, _ = build_config("auto", PHOTOS, {})
    assert photos.precision == "fp32", "no bfloat16 where the machine would emulate it"
    assert photos.model.patch_size == 16


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 3_000_000), st.integers(2, 5000), st.integers(1, 9000), st.booleans(), st.sampled_from([1, 3]),
    st.sampled_from(["cpu", "cuda"]), st.booleans(),
)  # fmt: skip
def test_auto_never_fails(num_train, num_classes, side, uniform, channels, device, bf16):
    facts = DatasetFacts(num_train, num_classes, side, uniform, channels, "", device, bf16)
    config, _ = build_config("auto", facts, {})
    assert 1 <= config.batch_size <= num_train


@pytest.mark.parametrize(
    "given",
    [
        {"variant": "ti16"},
        {"variant": "s4-concat", "epochs": 3.0},
        {"model.patch_size": 8},
        {"model.image_size": 64},
        {"batch_size": 32, "optim.lr": 1e-4},
        {"variant": "micro2", "model.image_size": 16},
        {"model.in_channels": 1},
        {"model.decoder": "token"},
    ],
)
@pytest.mark.parametrize("facts", FACTS)
def test_what_the_user_fixes_is_never_changed(given, facts):
    # `--model s4-concat` fixes the decoder by its suffix.

    config, choices = build_config("auto", FACTS[facts], given)
    values = dict(leaves(config))
    for name, value in given.items():
        assert values[name] == value
    assert not {choice.setting for choice in choices} & set(given)
    assert config.model.decoder == ("concat" if "concat" in config.variant else given.get("model.decoder", "mean"))


def test_uneven_classes_are_sampled_by_the_square_root_of_their_size_unless_the_user_corrects_them_otherwise():
    uneven = dataclasses.replace(CIFAR, class_sizes=(50, 500))
    config, choices = build_config("auto", uneven, {"data.source": "x"})
    assert config.data.sampling == "sqrt"
    (reason,) = [choice.reason for choice in choices if choice.setting == "data.sampling"]
    assert reason.startswith("classes have 50 to 500 images")
    for fixed, sampling in (({"data.sampling": "natural"}, "natural"), ({"optim.class_weights": "inverse"}, "natural")):
        config, choices = build_config("auto", uneven, {"data.source": "x", **fixed})
        assert config.data.sampling == sampling
        assert "data.sampling" not in {choice.setting for choice in choices}
    for even in (CIFAR, dataclasses.replace(CIFAR, class_sizes=(51, 500))):
        config, choices = build_config("auto", even, {"data.source": "x"})
        assert config.data.sampling == "natural"
        assert "data.sampling" not in {choice.setting for choice in choices}


def test_class_weights_without_effect_are_refused():
    with pytest.raises(ValueError, match="optim.effective_beta 0.9 has no effect with optim.class_weights 'none'"):
        build_config("auto", CIFAR, {"data.source": "x", "optim.effective_beta": 0.9})
    config = build_config("auto", CIFAR, {"optim.effective_beta": 0.9, "optim.class_weights": "effective"})[0]
    assert config.optim.effective_beta == 0.9


def test_auto_decodes_large_images_smaller_from_scratch():
    facts = DatasetFacts(1000, 2, 300, False, 3, "", "cpu", False, (500, 500))
    config, choices = build_config("auto", facts, {})
    assert (config.model.image_size, config.data.decode) == (128, "fast")
    assert any(choice.setting == "data.decode" and "300 px" in choice.reason for choice in choices)
    assert build_config("auto", dataclasses.replace(facts, side=200), {})[0].data.decode == "exact"
    assert build_config("auto", facts, {"augment.crop_scale": 1.0})[0].data.decode == "exact"
    with pytest.raises(ValueError, match=r"data.decode 'fast' has no effect with augment.crop_scale"):
        build_config("auto", facts, {"augment.crop_scale": 1.0, "data.decode": "fast"})


@pytest.mark.parametrize("name", ["augment.mixup", "augment.cutmix", "log.save_minutes"])
def test_nan_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is nan; expected 0 or more"):
        override(RunConfig(), {name: float("nan")})
