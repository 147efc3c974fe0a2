"""RandAugment, TrivialAugment, 3-Augment and erasing: torchvision's operations and ranges, chosen by draws alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode, v2

from vitrail.config import AugmentConfig, RunConfig
from vitrail.data.augment.erasing import ERASED_AREA, ERASED_RATIO, erase_, erased_boxes
from vitrail.data.augment.policies import (
    BINS,
    OPERATIONS,
    SIGMAS,
    STRONGEST,
    apply_policy,
    choose_operations,
    strength_of,
)
from vitrail.data.augment.random_changes import augment_batch, draw_changes
from vitrail.models.config import ViTConfig
from vitrail.recipes import refuse_idle

THEIRS = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
SIZE = (24, 31)


def named(theirs: str) -> str:
    """Our name of torchvision's operation."""
    flat = {"AutoContrast": "autocontrast", "ShearX": "shear_x", "ShearY": "shear_y"}
    return flat.get(theirs, theirs.lower().replace("translatex", "translate_x").replace("translatey", "translate_y"))


def levels(count: int = 6, channels: int = 3) -> torch.Tensor:
    """Images with detail and contrast, uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    fine = torch.rand(count, channels, *SIZE, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear", align_corners=False)
    return ((0.7 * smooth + 0.25 * fine) * 255).to(torch.uint8)


@pytest.mark.parametrize("policy", THEIRS)
def test_the_operations_and_their_strengths_are_torchvisions(policy):
    space = THEIRS[policy]._AUGMENTATION_SPACE
    assert [named(name) for name in space] == list(STRONGEST[policy])
    for name, (values, signed) in space.items():
        wanted = values(BINS, *SIZE)
        for step in range(BINS):
            plus, minus = (strength_of(policy, named(name), step, negative, SIZE) for negative in (False, True))
            assert plus == (0.0 if wanted is None else float(wanted[step])), (name, step)
            assert minus == (-plus if signed else plus), (name, step)


@pytest.mark.parametrize("policy", THEIRS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_at_every_strength_is_torchvisions(policy, channels):
    pixels, theirs = levels(2, channels), THEIRS[policy]()
    for name in theirs._AUGMENTATION_SPACE:
        for step in (0, 3, 9, 17, 30):
            for negative in (False, True):
                strength = strength_of(policy, named(name), step, negative, SIZE)
                ours = OPERATIONS[named(name)](tv, pixels, strength)
                for one, image in zip(ours, pixels, strict=True):
                    wanted = theirs._apply_image_or_video_transform(
                        image, name, strength, interpolation=InterpolationMode.NEAREST, fill=theirs._fill
                    )
                    assert torch.equal(one, wanted), (name, step)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(policy="randaugment"),
        AugmentConfig(policy="randaugment", policy_ops=4, policy_magnitude=30),
        AugmentConfig(policy="trivialaugment"),
        AugmentConfig(policy="three_augment"),
    ],
)
def test_a_batch_is_each_of_its_images_changed_one_after_the_other(config, channels):
    pixels = levels(40, channels)
    drawn = draw_changes(3, np.full(40, 2), np.arange(40))
    out = apply_policy(pixels.float() / 255, config, drawn)
    rounds = choose_operations(config, drawn, channels=channels, size=SIZE)
    assert len(rounds) == (config.policy_ops if config.policy == "randaugment" else 1)
    wanted = []
    for position, image in enumerate(pixels):
        for operations in rounds:
            name, strength = operations[position]
            image = OPERATIONS[name](tv, image[None], strength)[0]
        wanted.append(image)
    assert torch.equal(out, torch.stack(wanted).float() / 255)
    assert not torch.equal(out, pixels.float() / 255)
    for position in range(40):
        one = {name: values[position : position + 1] for name, values in drawn.items()}
        assert torch.equal(apply_policy(pixels[position : position + 1].float() / 255, config, one)[0], out[position])


def test_three_augment_is_deits_grey_solarised_or_blurred():
    pixels, config = levels(1), AugmentConfig(policy="three_augment")
    drawn = draw_changes(0, np.zeros(1, int), np.zeros(1, int))
    wanted = {
        0.1: v2.Grayscale(3)(pixels),
        0.5: v2.RandomSolarize(128, p=1.0)(pixels),
        0.9: v2.GaussianBlur(13, (1.3, 1.3))(pixels),
    }
    for chosen, theirs in wanted.items():
        given_draws = {**drawn, "op_1": np.asarray([chosen]), "strength": np.asarray([12.5 / len(SIGMAS)])}
        assert torch.equal(apply_policy(pixels.float() / 255, config, given_draws), theirs.float() / 255), chosen
    assert (SIGMAS[0], SIGMAS[-1]) == (0.1, 2.0)


def test_a_blur_of_an_image_smaller_than_its_kernel():
    pixels = levels(1)[..., :3, :2]
    out = OPERATIONS["blur"](tv, pixels, 2.0)
    assert out.shape == pixels.shape
    assert out.float().std() < pixels.float().std()


@pytest.mark.parametrize("policy", STRONGEST)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_are_equally_frequent_and_grey_images_get_none_on_colour(policy, channels):
    n = 6000
    config = AugmentConfig(policy=policy)
    [first, *_] = choose_operations(
        config, draw_changes(0, np.zeros(n, int), np.arange(n)), channels=channels, size=SIZE
    )
    names = [name for name in STRONGEST[policy] if channels == 3 or name not in ("color", "greyscale")]
    counts = {name: sum(each == name for each, _ in first) for name in names}
    assert sum(counts.values()) == n
    expected = n / len(names)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 35  # chi², one in a thousand
    if policy == "trivialaugment":
        strengths = {strength for name, strength in first if name == "rotate"}
        assert len(strengths) > 55
        assert min(strengths) == -135
        assert max(strengths) == 135


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_operations_do_not_change_grey_images(channels):
    pixels = levels(2, 1).expand(-1, channels, -1, -1)
    for name in ("color", "greyscale"):
        if channels == 1 or name == "color":
            assert (OPERATIONS[name](tv, pixels, 0.5).int() - pixels.int()).abs().max() <= 1


def test_policies_are_applied_after_geometry_and_colour():
    pixels = levels(8)[..., :24]
    config = AugmentConfig(flip=0.5, rotation=20.0, brightness=0.3, policy="trivialaugment")
    drawn = draw_changes(1, np.zeros(8, int), np.arange(8))
    plain = augment_batch(pixels.float() / 255, replace(config, policy="none"), drawn, None, 24)
    assert torch.equal(augment_batch(pixels.float() / 255, config, drawn, None, 24), apply_policy(plain, config, drawn))


def test_erasing_fills_one_box_with_the_mean_and_leaves_the_rest():
    n = 400
    drawn = draw_changes(0, np.zeros(n, int), np.arange(n))
    images = torch.rand(n, 3, *SIZE) + 1
    out = erase_(images.clone(), AugmentConfig(erasing=0.25), drawn)
    changed = (out != images).any(dim=1)
    assert (out[:, 0][changed] == 0).all()
    assert changed.flatten(1).any(1).tolist() == (drawn["erase"] < 0.25).tolist()
    for mask, (left, top, right, bottom) in zip(changed, erased_boxes(drawn, SIZE).astype(int), strict=True):
        if mask.any():
            wanted = torch.zeros(SIZE, dtype=torch.bool)
            wanted[top:bottom, left:right] = True
            assert torch.equal(mask, wanted)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(1, 300))
def test_erased_boxes_lie_inside(seed, height, width):
    left, top, right, bottom = erased_boxes(draw_changes(seed, np.zeros(50, int), np.arange(50)), (height, width)).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left < right).all()
    assert (top < bottom).all()
    assert (right <= width).all()
    assert (bottom <= height).all()


def test_erased_boxes_have_the_area_the_ratio_and_the_positions_of_the_paper():
    n = 4000
    left, top, right, bottom = erased_boxes(draw_changes(0, np.zeros(n, int), np.arange(n)), (1000, 1000)).T
    wide, tall = right - left, bottom - top
    share, ratio = wide * tall / 1e6, tall / wide
    np.testing.assert_allclose(np.quantile(share, [0, 0.5, 1]), [0.02, 0.175, 0.33], atol=0.012)
    np.testing.assert_allclose(np.quantile(np.log(ratio), [0, 0.5, 1]), [np.log(0.3), 0, np.log(3.3)], atol=0.07)
    for start, free in ((left, 1000 - wide), (top, 1000 - tall)):
        np.testing.assert_allclose(
            np.quantile(start[free > 50] / free[free > 50], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03
        )
    theirs = v2.RandomErasing()
    assert (tuple(theirs.scale), tuple(theirs.ratio)) == (ERASED_AREA, ERASED_RATIO)


def test_noise_is_of_unit_deviation_and_each_images_own():
    n = 12
    config = AugmentConfig(erasing=1.0, erasing_fill="noise")
    drawn, images = draw_changes(0, np.zeros(n, int), np.arange(n)), torch.full((n, 3, 64, 64), 9.0)
    out = erase_(images.clone(), config, drawn)
    noise = out[out != 9.0]
    assert noise.numel() > 10_000
    assert noise.mean().abs() < 0.05
    assert (noise.std() - 1).abs() < 0.05
    for position in range(n):
        one = {name: values[position : position + 1] for name, values in drawn.items()}
        assert torch.equal(erase_(images[position : position + 1].clone(), config, one)[0], out[position])
    assert len({float(each.std()) for each in out}) == n


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "randaug"}, "unknown augment.policy 'randaug'; did you mean 'randaugment'"),
        ({"policy_ops": 0}, "augment.policy_ops is 0; expected 1 to 4"),
        ({"policy_ops": 5}, "augment.policy_ops is 5; expected 1 to 4"),
        ({"policy_magnitude": 31}, "augment.policy_magnitude is 31; expected 0 to 30"),
        ({"erasing": 1.5}, "augment.erasing is 1.5; expected 0 to 1"),
        ({"erasing_fill": "black"}, "unknown augment.erasing_fill 'black'"),
        ({"mixup": -1.0}, "augment.mixup is -1.0; expected 0 or more"),
        ({"cutmix": -0.1}, "augment.cutmix is -0.1; expected 0 or more"),
        ({"mix_chance": 1.1}, "augment.mix_chance is 1.1; expected 0 to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**change)


@pytest.mark.parametrize(
    ("given_settings", "augment", "other"),
    [
        ({"augment.policy_ops": 3}, AugmentConfig(policy_ops=3), "augment.policy 'none'"),
        ({"augment.policy_magnitude": 5}, AugmentConfig(policy="trivialaugment"), "augment.policy 'trivialaugment'"),
        ({"augment.erasing_fill": "noise"}, AugmentConfig(erasing_fill="noise"), "augment.erasing 0.0"),
        ({"augment.mix_chance": 0.5}, AugmentConfig(mix_chance=0.5), "augment.mixup 0.0"),
    ],
)
def test_settings_without_effect_are_refused(given_settings, augment, other):
    with pytest.raises(ValueError, match=rf"has no effect with {other}"):
        refuse_idle(RunConfig(augment=augment, model=ViTConfig()), given_settings)
