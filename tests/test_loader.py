"""Batches: every image in its turn, the same ones whoever reads them, and the model's preprocessing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from vitrail.config import AugmentConfig, DataConfig, PreprocessConfig, RunConfig
from vitrail.console import Console
from vitrail.data.augment.mixup import MixTargets
from vitrail.data.datasets.base import ArrayDataset
from vitrail.data.datasets.open import digits_dataset as all_digits
from vitrail.data.datasets.open import open_dataset
from vitrail.data.images.preprocess import Preprocess
from vitrail.data.loading.eval_loader import eval_batches
from vitrail.data.loading.reader import ImageReader
from vitrail.data.loading.train_loader import Batch, TrainLoader
from vitrail.data.setup import TrainData, build_train_data, is_identity, load_data
from vitrail.evaluation.predict_logits import predict_logits
from vitrail.models.config import ViTConfig

CPU = torch.device("cpu")
EVERYTHING = AugmentConfig(
    crop_scale=0.3, flip=0.5, rotation=15.0, shift=0.1, brightness=0.3, contrast=0.3, saturation=0.3
)
MIXED = replace(
    EVERYTHING, policy="randaugment", erasing=0.5, erasing_fill="noise", mixup=0.8, cutmix=1.0, mix_chance=0.8
)


def photo(seed: int, width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images of 20 × 16 pixels in two classes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(23):
        folder = root / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        photo(number, 20, 16).save(folder / f"{number:02d}.png")
    return root


def load(
    files: Path,
    augment: AugmentConfig,
    *,
    memory: bool,
    side: int = 24,
    workers: int = 2,
    batch_size: int = 6,
    **preprocess,
) -> tuple[TrainData, RunConfig]:
    """What `vitrail train` makes of a folder."""
    data = DataConfig(source=str(files), memory_bytes=10**8 if memory else 0, workers=workers, near_duplicates=False)
    model = ViTConfig(image_size=side, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=2)
    config = RunConfig(
        data=data,
        model=model,
        augment=augment,
        preprocess=PreprocessConfig(**preprocess),
        seed=5,
        batch_size=batch_size,
    )
    found = build_train_data(load_data(data, Console(quiet=True)), config)
    assert (found.reader.stored is not None) == memory
    return found, config


def stream(found: tuple[TrainData, RunConfig], rank: int = 0, ranks: int = 1) -> TrainLoader:
    data, config = found
    part = data.splits.indices["train"]
    return TrainLoader(
        data.reader,
        part,
        batch_size=config.batch_size,
        seed=config.seed,
        augment=config.augment,
        device=CPU,
        rank=rank,
        ranks=ranks,
    )


def same(one: Batch, other: Batch) -> bool:
    """Bit for bit."""
    parts = torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)
    if one.mix is not None and other.mix is not None:
        parts = parts and torch.equal(one.mix.labels_b, other.mix.labels_b)
        parts = parts and torch.equal(one.mix.lam, other.mix.lam)
    return parts and (one.mix is None) == (other.mix is None) and one.indices.tolist() == other.indices.tolist()


def joined(*batches: Batch) -> Batch:
    mixes = [batch.mix for batch in batches if batch.mix is not None]
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.targets for batch in batches]),
        np.concatenate([batch.indices for batch in batches]),
        mix=MixTargets(torch.cat([mix.labels_b for mix in mixes]), torch.cat([mix.lam for mix in mixes]))
        if mixes
        else None,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3), st.sampled_from([1, 2, 3]))
def test_each_image_comes_exactly_once_an_epoch(count, share, seed, ranks):
    """Positions alone decide: over every border of epochs, batches are full and no image is left out or repeated."""
    digits, preprocess = all_digits(), Preprocess(image_size=8, channels=1, mean=(0.5,), std=(0.5,), resize="squash")
    part = np.arange(100, 100 + count)
    images = ImageReader(digits, digits.targets, preprocess, digits.arrays[0][:, None], is_ready=True, workers=1)
    each = [
        TrainLoader(
            images,
            part,
            batch_size=share * ranks,
            seed=seed,
            augment=AugmentConfig(),
            device=CPU,
            rank=r,
            ranks=ranks,
        )
        for r in range(ranks)
    ]
    steps = -(-4 * count // (share * ranks))
    rows = [one.sampler.samples(step, one.rank, ranks) for step in range(steps) for one in each]
    assert all(len(epochs) == len(indices) == share for epochs, indices in rows)
    epochs, indices = (np.concatenate(column) for column in zip(*rows, strict=True))
    assert epochs.tolist() == sorted(epochs.tolist())
    for epoch in range(4):
        assert sorted(indices[epochs == epoch].tolist()) == list(range(count))
    if count >= 8:
        orders = [tuple(indices[epochs == epoch]) for epoch in range(4)]
        assert len(set(orders)) == 4


def test_another_seed_is_another_order(files):
    data, config = load(files, AugmentConfig(), memory=True)
    one, two = stream((data, config)), stream((data, replace(config, seed=6)))
    first, second = (each.sampler.epoch(0)[1].tolist() for each in (one, two))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(len(data.splits.indices["train"])))


def test_targets_belong_to_their_images(files):
    data, config = load(files, AugmentConfig(), memory=False)
    for batch in stream((data, config)).batches(0, 8):
        assert batch.images.shape == (6, 3, 24, 24)
        assert batch.targets.tolist() == data.dataset.targets[batch.indices].tolist()
        for image, index in zip(batch.images, batch.indices, strict=True):
            pixels = data.reader.preprocess.apply(data.dataset.read(int(index), "RGB"))
            torch.testing.assert_close(image, torch.from_numpy(pixels).float() / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("augment", [AugmentConfig(), EVERYTHING])
@pytest.mark.parametrize("memory", [True, False])
def test_batches_do_not_depend_on_the_number_of_workers(files, augment, memory):
    auto, one, two, four = (
        list(stream(load(files, augment, memory=memory, workers=workers)).batches(0, 5)) for workers in (0, 1, 2, 4)
    )
    assert len(one) == 5
    batches = zip(auto, one, two, four, strict=True)
    assert all(same(a, b) and same(a, c) and same(a, d) for a, b, c, d in batches)


@pytest.mark.parametrize(
    "preprocess", [{}, {"resize": "squash"}, {"crop_fraction": 1.0, "interpolation": "bilinear"}], ids=str
)
def test_without_crops_memory_and_files_give_the_same_batches(files, preprocess):
    augment = AugmentConfig(flip=0.5, brightness=0.2)
    stored, read = (load(files, augment, memory=memory, **preprocess) for memory in (True, False))
    for one, other in zip(stream(stored).batches(0, 5), stream(read).batches(0, 5), strict=True):
        assert same(one, other)
    judged = [
        list(eval_batches(d.reader, d.splits.indices["val"], batch_size=4, device=CPU)) for d, _ in (stored, read)
    ]
    assert all(same(one, other) for one, other in zip(*judged, strict=True))


def test_with_crops_memory_and_files_give_the_same_images_within_the_filters_difference(files):
    augment = AugmentConfig(crop_scale=0.3, flip=0.5)
    stored, read = (load(files, augment, memory=memory, interpolation="bilinear") for memory in (True, False))
    for one, other in zip(stream(stored).batches(0, 5), stream(read).batches(0, 5), strict=True):
        assert one.indices.tolist() == other.indices.tolist()
        assert (one.images - other.images).abs().mean() < 0.02  # of a range of 2; another crop gives 0.3


@pytest.mark.parametrize("augment", [AugmentConfig(), EVERYTHING, MIXED])
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_together_are_one(files, augment, memory, ranks):
    found = load(files, augment, memory=memory, batch_size=12)  # a multiple of twice the processes: pairs stay whole
    alone = list(stream(found).batches(0, 5))
    shares = [list(stream(found, rank, ranks).batches(0, 5)) for rank in range(ranks)]
    for step in range(5):
        together = joined(*(share[step] for share in shares))
        assert together.indices.tolist() == alone[step].indices.tolist()
        torch.testing.assert_close(together.images, alone[step].images, rtol=0, atol=1e-6)
        assert same(replace(together, images=alone[step].images), alone[step])


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("augment", [EVERYTHING, MIXED])
def test_starting_at_a_step_is_as_running_up_to_it(files, augment, memory):
    run = list(stream(load(files, augment, memory=memory)).batches(0, 9))
    assert all(same(first, second) is False for first, second in pairwise(run))
    for start in (1, 4, 8):
        resumed = list(stream(load(files, augment, memory=memory)).batches(start, 9))
        assert len(resumed) == 9 - start
        assert all(same(one, other) for one, other in zip(resumed, run[start:], strict=True))
    assert list(stream(load(files, augment, memory=memory)).batches(9, 9)) == []


@pytest.mark.parametrize("memory", [True, False])
def test_the_number_of_threads_changes_nothing(files, memory):
    one, other = (stream(load(files, MIXED, memory=memory, workers=workers)) for workers in (1, 5))
    assert all(same(a, b) for a, b in zip(one.batches(0, 5), other.batches(0, 5), strict=True))


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_gives_each_image_once_over_all_processes(files, memory, ranks, batch_size):
    data, _ = load(files, EVERYTHING, memory=memory)
    part = data.splits.indices["val"]
    seen: dict[int, torch.Tensor] = {}
    for rank in range(ranks):
        for batch in eval_batches(data.reader, part, batch_size=batch_size, device=CPU, rank=rank, ranks=ranks):
            assert 0 < len(batch.indices) <= batch_size
            assert batch.targets.tolist() == data.dataset.targets[batch.indices].tolist()
            assert not set(batch.indices.tolist()) & set(seen)
            seen |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
    assert sorted(seen) == part.tolist()
    for index, image in seen.items():
        pixels = data.reader.preprocess.apply(data.dataset.read(index, "RGB"))
        torch.testing.assert_close(image, torch.from_numpy(pixels).float() / 127.5 - 1, rtol=0, atol=1e-6)


def copied(files: Path, root: Path) -> Path:
    for path in files.rglob("*.png"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    return root


def test_a_file_lost_after_the_scan_is_dropped_and_noted_and_never_replaced(files, tmp_path):
    found = load(copied(files, tmp_path), EVERYTHING, memory=False)
    data = found[0]
    whole = list(stream(found).batches(0, 3))
    lost = int(whole[1].indices[2])
    place = data.dataset.location(lost)
    Path(place).unlink()
    left = list(stream(found).batches(0, 3))
    assert same(left[0], whole[0])
    assert same(left[1], joined(whole[1].take(0, 2), whole[1].take(3, 6)))
    assert same(left[2], whole[2])
    assert list(data.reader.dropped) == [place]
    assert "No such file" in data.reader.dropped[place]


def test_the_partner_of_a_lost_file_stays_unmixed_and_all_others_are_as_before(files, tmp_path):
    found = load(copied(files, tmp_path), replace(MIXED, mix_chance=1.0), memory=False)
    data = found[0]
    [whole] = stream(found).batches(1, 2)
    Path(data.dataset.location(int(whole.indices[2]))).unlink()
    [left] = stream(found).batches(1, 2)
    assert left.indices.tolist() == np.delete(whole.indices, 2).tolist()
    assert same(joined(left.take(0, 2), left.take(3, 5)), joined(whole.take(0, 2), whole.take(4, 6)))
    assert left.mix is not None
    assert (left.mix.lam[2], left.mix.labels_b[2]) == (1, left.targets[2])
    unmixed = (data, replace(found[1], augment=replace(MIXED, mixup=0.0, cutmix=0.0)))
    [alone] = stream(unmixed).batches(1, 2)
    assert torch.equal(left.images[2], alone.images[2])


def test_a_file_broken_after_the_scan_is_left_out_of_the_evaluation_alone_in_its_batch_too(files, tmp_path):
    data, _ = load(copied(files, tmp_path), AugmentConfig(), memory=False)
    part = data.splits.indices["val"]
    assert len(part) == 4
    broken = int(part[3])
    Path(data.dataset.location(broken)).write_bytes(b"broken")
    for batch_size in (1, 3, 4):
        batches = list(eval_batches(data.reader, part, batch_size=batch_size, device=CPU))
        assert [index for batch in batches for index in batch.indices] == part[:3].tolist()
    assert list(data.reader.dropped) == [data.dataset.location(broken)]


def test_when_no_file_is_left_reading_stops(files, tmp_path):
    found = load(copied(files, tmp_path), AugmentConfig(), memory=False)
    data = found[0]
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"none of 6 files can be read any more.*\.png"):
        next(stream(found).batches(0, 1))
    assert list(eval_batches(data.reader, data.splits.indices["val"], batch_size=3, device=CPU)) == []
    with pytest.raises(ValueError, match="none of 4 files can be read any more"):
        predict_logits(torch.nn.Identity(), data.reader, data.splits.indices["val"], device=CPU)


def test_images_larger_than_the_input_are_read_from_files(files):
    assert load(files, AugmentConfig(), memory=False, side=16)[0].reader.stored is None
    data, config = load(files, AugmentConfig(), memory=True)
    smaller = replace(config, model=replace(config.model, image_size=16))
    assert build_train_data(load_data(config.data, Console(quiet=True)), smaller).reader.stored is None
    assert data.reader.stored is not None
    assert data.reader.stored.shape == (23, 3, 24, 24)


def test_a_prepared_image_is_not_prepared_twice(files):
    data, _ = load(files, AugmentConfig(), memory=True)
    assert data.reader.is_ready
    for index in range(3):
        wanted = data.reader.preprocess.apply(data.dataset.read(index, "RGB"))
        np.testing.assert_array_equal(data.reader.read_whole(index), wanted)


def test_prepared_images_stay_on_disk_when_they_do_not_fit(files):
    _, config = load(files, AugmentConfig(), memory=True)
    stored = 23 * 3 * 20 * 16
    for limit, fits in ((23 * 3 * 24 * 24, True), (stored, False)):
        tight = replace(config, data=replace(config.data, memory_bytes=limit))
        checked = load_data(tight.data, Console(quiet=True))
        images = build_train_data(checked, tight).reader
        assert images.is_ready == (images.stored is not None) == fits


@pytest.mark.parametrize(
    ("resize", "fraction", "size", "identity"),
    [
        ("squash", 0.5, (24, 24), True),
        ("squash", 1.0, (24, 20), False),
        ("crop", 1.0, (24, 24), True),
        ("crop", 0.97, (24, 24), True),  # 24.7 is cut to 24, as torchvision does
        ("crop", 0.9, (24, 24), False),
        ("crop", 1.0, (32, 24), False),
    ],
)
def test_preprocessing_that_changes_nothing_is_known(resize, fraction, size, identity):
    preprocess = Preprocess(image_size=24, resize=resize, crop_fraction=fraction)
    assert is_identity(preprocess, size) == identity
    image = photo(0, size[1], size[0])
    pixels = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(preprocess.apply(image), pixels) == identity


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.875])
@settings(max_examples=8, deadline=None)
@given(width=st.integers(1, 120), height=st.integers(1, 120))
def test_preprocessing_is_torchvisions_resize_and_centre_crop(interpolation, mode, fraction, width, height):
    values = (0.5,) * len(mode)
    preprocess = Preprocess(
        image_size=28,
        channels=len(mode),
        resize="crop",
        crop_fraction=fraction,
        interpolation=interpolation,
        mean=values,
        std=values,
    )
    image = photo(width, width, height).convert(mode)
    ours = preprocess.apply(image)
    resize = v2.Resize(int(28 / fraction), InterpolationMode[interpolation.upper()], antialias=True)
    theirs = np.asarray(v2.Compose([resize, v2.CenterCrop(28)])(image))
    np.testing.assert_array_equal(ours, theirs[None] if mode == "L" else theirs.transpose(2, 0, 1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(40, 30), (30, 77), (28, 28), (3, 5)])
def test_squashing_is_a_resize_of_both_sides(interpolation, size):
    preprocess = Preprocess(image_size=28, resize="squash", crop_fraction=0.5, interpolation=interpolation)
    image = photo(1, *size)
    theirs = v2.Resize((28, 28), InterpolationMode[interpolation.upper()], antialias=True)(image)
    np.testing.assert_array_equal(preprocess.apply(image), np.asarray(theirs).transpose(2, 0, 1))


def test_normalising_is_torchvisions():
    preprocess = Preprocess(image_size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    pixels = torch.arange(2 * 3 * 64).remainder(256).to(torch.uint8).view(2, 3, 8, 8)
    wanted = v2.functional.normalize(pixels.float() / 255, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    torch.testing.assert_close(preprocess.normalise(pixels), wanted)
    torch.testing.assert_close(preprocess.normalise(pixels.float() / 255), wanted)
    assert pixels.flatten()[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 0}, "image_size 0"),
        ({"channels": 1}, "needs 1 values"),
        ({"resize": "stretch"}, "unknown preprocess.resize 'stretch'"),
        ({"interpolation": "bicubc"}, "did you mean 'bicubic'"),
        ({"crop_fraction": 1.5}, "crop_fraction is 1.5"),
        ({"std": (0.5, 0.5, 0.0)}, "every std above 0"),
    ],
)
def test_preprocessing_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**change)


def test_digits_train_from_memory_in_grey():
    source = open_dataset("digits")
    assert isinstance(source, ArrayDataset)
    preprocess = Preprocess(image_size=8, channels=1, mean=(0.5,), std=(0.5,), resize="squash")
    images = ImageReader(source, source.targets, preprocess, source.arrays[0][:, None], is_ready=True, workers=1)
    part = np.arange(50)
    train = TrainLoader(images, part, batch_size=10, seed=0, augment=AugmentConfig(), device=CPU)
    batch = next(train.batches(3, 4))
    wanted = torch.from_numpy(source.arrays[0][batch.indices][:, None]).float() / 127.5 - 1
    torch.testing.assert_close(batch.images, wanted, rtol=0, atol=1e-6)
