"""Random augmentation: drawn from (seed, visit, image) alone, and each exactly what its name says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode

from vitrail.config import AugmentConfig
from vitrail.data.augment.random_changes import augment_batch, crop_boxes, draw_changes, geometry

MIDDLE = 0.5  # the draw at which a symmetric change does nothing


def draws(count: int = 1, **given: float) -> dict[str, np.ndarray]:
    """Return draws that change nothing but what is given."""
    names = draw_changes(0, np.zeros(1, int), np.zeros(1, int))
    assert set(given) <= set(names)
    return {name: np.full(count, given.get(name, MIDDLE)) for name in names}


def images(count: int = 2, channels: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return an image without fine detail, [height, width, channels] uint8."""
    coarse = np.random.default_rng(1).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())[None].float() / 255


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**31), st.lists(st.integers(0, 2**40), min_size=1, max_size=8))
def test_draws_are_a_pure_function_of_seed_epoch_and_image(seed, epoch, indices):
    indices = np.asarray(indices)
    together = draw_changes(seed, np.full(len(indices), epoch), indices)
    for position in range(len(indices)):
        alone = draw_changes(seed, np.asarray([epoch]), indices[position : position + 1])
        assert {name: values[position] for name, values in together.items()} == {
            name: v[0] for name, v in alone.items()
        }
    assert all((values >= 0).all() and (values < 1).all() for values in together.values())


def test_the_first_draws_are_those_that_earlier_versions_drew():
    """A run that is resumed, or repeated from its config.json, sees the same crops and flips."""
    found = draw_changes(7, np.asarray([0, 3]), np.asarray([11, 12]))
    golden = {
        "area": [0.04894409534913635, 0.14182842516990468],
        "ratio": [0.3670477928221403, 0.5335482523549774],
        "left": [0.10845536664426181, 0.40091300101692595],
        "top": [0.542092696858021, 0.3635940678558255],
        "flip": [0.07303595171768495, 0.5312451439788148],
        "vertical": [0.6711497961828466, 0.025284602526154387],
        "angle": [0.7466781730517001, 0.29528642040257813],
        "right": [0.9740708952499142, 0.6074068560751499],
        "down": [0.8488517645615201, 0.44206006381686247],
        "bright": [0.7611732933383263, 0.3025612385156482],
        "contrast": [0.11624728560888253, 0.3324250774744114],
        "saturation": [0.35702690205867016, 0.5810271537273368],
    }
    assert list(found)[:12] == list(golden)
    assert {name: found[name].tolist() for name in golden} == golden


def test_draws_differ_between_seeds_epochs_images_and_purposes():
    seen = set()
    for seed in range(3):
        for epoch in range(3):
            found = draw_changes(seed, np.full(50, epoch), np.arange(50))
            seen |= {float(value) for values in found.values() for value in values}
    assert len(seen) == 3 * 3 * 50 * len(draws())


@pytest.mark.parametrize("vary", ["seed", "epoch", "image"])
def test_draws_are_uniform_and_independent(vary):
    n, counts = 4000, np.arange(4000)
    zeros = np.zeros(n, int)
    if vary == "seed":
        draws_of_seeds = [draw_changes(int(seed), zeros[:1], zeros[:1]) for seed in counts]
        found = {name: np.concatenate([each[name] for each in draws_of_seeds]) for name in draws_of_seeds[0]}
    else:
        found = draw_changes(0, counts, zeros) if vary == "epoch" else draw_changes(0, zeros, counts)
    bound = 1.95 / np.sqrt(n)  # Kolmogorov-Smirnov at one in a thousand
    for name, values in found.items():
        ordered = np.sort(values)
        distance = max((np.arange(1, n + 1) / n - ordered).max(), (ordered - np.arange(n) / n).max())
        assert distance < bound, name
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(n), name
    correlation = np.corrcoef(np.stack(list(found.values())))
    assert np.abs(correlation - np.eye(len(correlation))).max() < 4 / np.sqrt(n)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_augmentation_the_image_is_identical(channels):
    batch = images(channels=channels)
    before = batch.clone()
    out = augment_batch(batch, AugmentConfig(), draw_changes(0, np.zeros(2, int), np.arange(2)), None, 8)
    assert torch.equal(out, before)
    assert torch.equal(batch, before)


def test_draws_in_the_middle_leave_the_image_as_it_is():
    config = AugmentConfig(
        rotation=30.0, shift=0.2, brightness=0.4, contrast=0.4, saturation=0.4, flip=0.5, vertical_flip=0.5
    )
    batch = images()
    torch.testing.assert_close(augment_batch(batch, config, draws(2), None, 8), batch, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("setting", "name", "axis"), [("flip", "flip", 3), ("vertical_flip", "vertical", 2)])
def test_a_flip_is_numpys_flip_of_the_chosen_images(setting, name, axis):
    batch = images(4)
    chance = draws(4)
    chance[name] = np.asarray([0.0, 0.49, 0.5, 0.99])
    out = augment_batch(batch, replace(AugmentConfig(), **{setting: 0.5}), chance, None, 8).numpy()
    np.testing.assert_array_equal(out[:2], np.flip(batch.numpy()[:2], axis))
    np.testing.assert_array_equal(out[2:], batch.numpy()[2:])


@pytest.mark.parametrize(("setting", "name", "axis"), [("flip", "flip", 3), ("vertical_flip", "vertical", 2)])
def test_a_flip_inside_the_affine_map_is_the_same_flip(setting, name, axis):
    batch = images(2)
    out = augment_batch(
        batch, replace(AugmentConfig(rotation=10.0), **{setting: 0.5}), draws(2, **{name: 0.0}), None, 8
    )
    np.testing.assert_allclose(out.numpy(), np.flip(batch.numpy(), axis), atol=1e-5)


@pytest.mark.parametrize(("rotation", "drawn", "turns"), [(90.0, 1.0, 1), (90.0, 0.0, -1), (180.0, 1.0, 2)])
@pytest.mark.parametrize("fill", ["black", "edge", "mirror"])
def test_right_angles_are_numpys_rot90(rotation, drawn, turns, fill):
    batch = images(1)
    config = AugmentConfig(rotation=rotation, fill=fill)
    out = augment_batch(batch, config, draws(angle=drawn), None, 8).numpy()
    np.testing.assert_allclose(out, np.rot90(batch.numpy(), turns, axes=(2, 3)), atol=1e-5)


def test_a_rotation_is_torchvisions():
    image = as_batch(smooth(32, 32))
    ours = augment_batch(image, AugmentConfig(rotation=30.0, fill="black"), draws(angle=1.0), None, 32)
    theirs = tv.rotate(image, 30.0, interpolation=InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "drawn", "shift"),
    [("right", 1.0, (0, -2)), ("right", 0.0, (0, 2)), ("down", 1.0, (-2, 0)), ("down", 0.0, (2, 0))],
)
def test_a_shift_moves_the_view_by_its_share_of_the_side(name, drawn, shift):
    """`right` and `down` say where the view goes; what is seen moves the other way."""
    batch = images(1)
    out = augment_batch(batch, AugmentConfig(shift=0.25, fill="black"), draws(**{name: drawn}), None, 8).numpy()
    down, right = shift
    wanted = np.zeros_like(batch.numpy())
    wanted[..., max(down, 0) : 8 + min(down, 0), max(right, 0) : 8 + min(right, 0)] = batch.numpy()[
        ..., max(-down, 0) : 8 + min(-down, 0), max(-right, 0) : 8 + min(-right, 0)
    ]
    np.testing.assert_allclose(out, wanted, atol=1e-5)


@pytest.mark.parametrize(("fill", "mode"), [("edge", "edge"), ("mirror", "symmetric")])
def test_pixels_from_outside_the_image_are_numpys_padding(fill, mode):
    batch = images(1)
    out = augment_batch(batch, AugmentConfig(shift=0.25, fill=fill), draws(right=0.0), None, 8).numpy()
    np.testing.assert_allclose(
        out, np.pad(batch.numpy(), ((0, 0), (0, 0), (0, 0), (2, 0)), mode=mode)[..., :8], atol=1e-5
    )


def test_a_crop_is_a_resize_of_the_box():
    image = smooth(48, 64)
    boxes = np.asarray([[10.0, 6.0, 32.0, 24.0]])
    out = augment_batch(as_batch(image), AugmentConfig(crop_scale=0.2), draws(), boxes, 32)[0].numpy() * 255
    wanted = Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR, box=(10, 6, 42, 30))
    np.testing.assert_allclose(out.transpose(1, 2, 0), np.asarray(wanted), atol=1.0)


def test_a_crop_in_whole_pixels_is_a_slice():
    batch = images(1, height=12, width=16)
    out = augment_batch(batch, AugmentConfig(crop_scale=0.2), draws(), np.asarray([[5.0, 3.0, 8.0, 8.0]]), 8)
    torch.testing.assert_close(out, batch[:, :, 3:11, 5:13], rtol=0, atol=1e-5)


def test_crop_flip_and_rotation_are_applied_in_this_order():
    batch = images(1, height=12, width=16)
    config = AugmentConfig(crop_scale=0.2, flip=1.0, rotation=90.0)
    out = augment_batch(batch, config, draws(angle=1.0), np.asarray([[5.0, 3.0, 8.0, 8.0]]), 8).numpy()
    crop = batch.numpy()[:, :, 3:11, 5:13]
    np.testing.assert_allclose(out, np.flip(np.rot90(crop, 1, axes=(2, 3)), 3), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.01, 1.0),
    st.floats(1.0, 4.0),
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=30),
)
def test_crops_lie_inside_and_have_the_area_and_the_ratio_asked_for(scale, ratio, seed, sizes):
    config, size = AugmentConfig(crop_scale=scale, crop_ratio=ratio), np.asarray(sizes)
    drawn = draw_changes(seed, np.zeros(len(size), int), np.arange(len(size)))
    left, top, width, height = crop_boxes(config, drawn, size).T
    heights, widths = size.T.astype(float)
    assert (left >= 0).all()  # exactly: Pillow refuses a box that begins at -1e-14
    assert (top >= 0).all()
    assert (left + width <= widths * (1 + 1e-12)).all()
    assert (top + height <= heights * (1 + 1e-12)).all()
    share = width * height / (widths * heights)
    assert (share <= 1 + 1e-9).all()
    full = np.isclose(width, widths) | np.isclose(height, heights)  # what would not fit is shrunk
    assert (full | (share >= scale - 1e-9)).all()
    limit = np.where(scale < 1, ratio, 1.0) * (1 + 1e-9)
    shape = width / height if scale < 1 else width / height / (widths / heights)
    assert ((1 / limit <= shape) & (shape <= limit)).all()


def test_crops_spread_over_the_area_the_ratio_and_the_position():
    n = 2000
    config = AugmentConfig(crop_scale=0.25, crop_ratio=4 / 3)
    drawn = draw_changes(3, np.zeros(n, int), np.arange(n))
    left, top, width, height = crop_boxes(config, drawn, np.tile((300, 300), (n, 1))).T
    fits = (width < 299.9) & (height < 299.9)
    assert fits.mean() > 0.6
    share, shape = width * height / 300**2, np.log(width / height) / np.log(4 / 3)
    assert 0.25 < share.min() < 0.26
    np.testing.assert_allclose(np.quantile(share, [0.25, 0.5]), [0.4375, 0.625], atol=0.05)
    np.testing.assert_allclose(np.quantile(shape, [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=0.08)
    for start, free in ((left, 300 - width), (top, 300 - height)):
        np.testing.assert_allclose(
            np.quantile(start[fits] / free[fits], [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05
        )


@pytest.mark.parametrize("drawn", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize(
    ("setting", "name", "reference"),
    [
        ("brightness", "bright", tv.adjust_brightness),
        ("contrast", "contrast", tv.adjust_contrast),
        ("saturation", "saturation", tv.adjust_saturation),
    ],
)
def test_colour_changes_are_torchvisions(setting, name, reference, drawn):
    batch = images(3)
    out = augment_batch(batch, replace(AugmentConfig(), **{setting: 0.6}), draws(3, **{name: drawn}), None, 8)
    wanted = reference(batch, 1 + (2 * drawn - 1) * 0.6)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-4)  # torchvision rounds the weight of red to 0.2989
    assert out.min() >= 0
    assert out.max() <= 1


def test_colour_changes_are_applied_in_torchvisions_order():
    batch = images(2)
    config = AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.5)
    out = augment_batch(batch, config, draws(2, bright=0.9, contrast=0.9, saturation=0.1), None, 8)
    wanted = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(batch, 1.4), 1.4), 0.6)
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-3)


def test_grey_images_have_no_saturation():
    batch = images(2, channels=1)
    assert torch.equal(augment_batch(batch, AugmentConfig(saturation=1.0), draws(2, saturation=0.0), None, 8), batch)


def test_each_image_of_a_batch_is_changed_by_its_own_draws():
    config = AugmentConfig(flip=0.5, rotation=20.0, shift=0.1, brightness=0.3, contrast=0.3, saturation=0.3)
    batch, drawn = images(5), draw_changes(1, np.zeros(5, int), np.arange(5))
    together = augment_batch(batch, config, drawn, None, 8)
    for position in range(5):
        one = {name: values[position : position + 1] for name, values in drawn.items()}
        torch.testing.assert_close(
            augment_batch(batch[position : position + 1], config, one, None, 8)[0], together[position]
        )


def test_a_crop_alone_is_the_same_with_every_fill_but_black():
    """No sample lies further out than half a pixel, where a mirror and the edge are one."""
    noise = torch.rand(6, 3, 9, 13)
    drawn = draw_changes(0, np.zeros(6, dtype=int), np.arange(6))
    boxes = crop_boxes(AugmentConfig(crop_scale=0.2), drawn, np.tile((9, 13), (6, 1)))
    one, other = (
        augment_batch(noise, AugmentConfig(crop_scale=0.2, fill=fill), drawn, boxes, 16) for fill in ("mirror", "edge")
    )
    maps = torch.from_numpy(geometry(AugmentConfig(crop_scale=0.2), drawn, boxes, (9, 13))).float()
    grid = F.affine_grid(maps, [6, 3, 16, 16], align_corners=False)
    reflected = F.grid_sample(noise, grid, padding_mode="reflection", align_corners=False)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, reflected, rtol=0, atol=1e-5)
