"""The sampler: exact counts by class and image, the same for any number of processes, from any step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.config import AugmentConfig, RunConfig
from vitrail.config_schema import override
from vitrail.data.augment.random_changes import draw_changes
from vitrail.data.datasets.open import digits_dataset
from vitrail.data.images.preprocess import Preprocess
from vitrail.data.loading.reader import ImageReader
from vitrail.data.loading.sampler import Sampler, largest_remainder
from vitrail.data.loading.train_loader import TrainLoader

SIZES = (60, 25, 12, 3)
TARGETS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))


def samples(sampler: Sampler, start: int, stop: int, ranks: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return visit and index of all samples of some steps."""
    rows = [sampler.samples(step, rank, ranks) for step in range(start, stop) for rank in range(ranks)]
    visits, indices = (np.concatenate(column) for column in zip(*rows, strict=True))
    return visits, indices


def test_the_default_order_and_its_draws_have_not_changed():
    # Made on commit 9595d9e, before there was a choice: a recorded run must go on with the same images.
    sampler = Sampler(np.zeros(13, int), batch_size=6, seed=5)
    golden = {
        0: ([0, 0, 0], [7, 11, 5], [0.48645471453765865, 0.28887341550144663, 0.6156207928900951]),
        2: ([1, 1, 1], [12, 2, 9], [0.027544920427691966, 0.14965745877670533, 0.23182310659728378]),
        4: ([2, 2, 2], [5, 3, 7], [0.5633253514531115, 0.8149752158001062, 0.04315393185917593]),
        7: ([3, 3, 3], [5, 2, 12], [0.30586106422313397, 0.34610720904917436, 0.9465167044983835]),
    }
    for step, (visits, indices, areas) in golden.items():
        found = sampler.samples(step, 1, 2)
        assert [each.tolist() for each in found] == [visits, indices]
        assert draw_changes(5, *found)["area"].tolist() == areas


@pytest.mark.parametrize(
    ("total", "proportions", "wanted"),
    [
        (100, [1, 1, 1, 1], [25, 25, 25, 25]),
        (10, [1, 1, 1], [4, 3, 3]),
        (11, [1, 1, 1], [4, 4, 3]),
        (10, [0.52, 0.26, 0.22], [5, 3, 2]),
        (7, [2, 1], [5, 2]),
    ],
)
def test_shares_are_whole_and_by_the_largest_remainder(total, proportions, wanted):
    found = largest_remainder(total, np.asarray(proportions, float))
    assert found.sum() == total
    assert found.tolist() == wanted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_no_class_is_without_a_share(sizes):
    for proportions in (np.ones(len(sizes)), np.sqrt(sizes)):
        found = largest_remainder(sum(sizes), proportions)
        assert found.sum() == sum(sizes)
        assert found.min() >= 1
        assert (np.abs(found - sum(sizes) * proportions / proportions.sum()) < 1).all()


@pytest.mark.parametrize(("sampling", "wanted"), [("balanced", [25, 25, 25, 25]), ("sqrt", [43, 28, 19, 10])])
def test_every_epoch_has_each_classs_share_and_images_of_a_class_are_sampled_equally_often(sampling, wanted):
    sampler = Sampler(TARGETS, batch_size=20, seed=3, sampling=sampling)
    total = np.zeros(100, int)
    for epoch in range(13):
        _, indices = samples(sampler, 5 * epoch, 5 * epoch + 5)
        assert np.bincount(TARGETS[indices], minlength=4).tolist() == wanted
        total += np.bincount(indices, minlength=100)
        for label in range(4):
            own = total[np.equal(TARGETS, label)]
            assert own.max() - own.min() <= 1, "an image was sampled more often than another of its class"
    assert total.min() >= 1, "an image was left out"
    other = samples(Sampler(TARGETS, batch_size=20, seed=4, sampling=sampling), 0, 5)
    assert other[1].tolist() != samples(sampler, 0, 5)[1].tolist()


@pytest.mark.parametrize("sampling", ["natural", "balanced", "sqrt"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_no_image_is_sampled_twice_in_one_visit(sampling, repeats):
    sampler = Sampler(TARGETS, batch_size=12, seed=3, sampling=sampling, repeats=repeats)
    visits, indices = samples(sampler, 0, 80)
    pairs = set(zip(visits.tolist(), indices.tolist(), strict=True))
    assert len(pairs) == len(indices)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_order_does_not_depend_on_processes_or_on_where_it_starts(data):
    sampling = data.draw(st.sampled_from(["natural", "balanced", "sqrt"]))
    repeats = data.draw(st.sampled_from([1, 2, 3]))
    batch = 12 * data.draw(st.integers(1, 12))  # up to more than an epoch in a step
    start, ranks = data.draw(st.integers(0, 40)), data.draw(st.sampled_from([2, 3, 4, 6]))
    make = {"batch_size": batch, "seed": data.draw(st.integers(0, 5)), "sampling": sampling, "repeats": repeats}
    whole = samples(Sampler(TARGETS, **make), 0, start + 2)
    later = samples(Sampler(TARGETS, **make), start, start + 2, ranks)
    for all_samples, end in zip(whole, later, strict=True):
        assert all_samples[start * batch :].tolist() == end.tolist()


def test_repeated_images_are_spread_over_their_batch():
    sampler, single = (Sampler(TARGETS, batch_size=b, seed=3, repeats=r) for b, r in ((12, 3), (4, 1)))
    for step in range(60):
        visits, indices = sampler.samples(step)
        once, distinct = single.samples(step)
        assert indices.tolist() == distinct.tolist() * 3
        assert visits.tolist() == [3 * epoch + repeat for repeat in range(3) for epoch in once]


def test_repeats_are_augmented_differently():
    dataset = digits_dataset()
    preprocess = Preprocess(image_size=8, channels=1, mean=(0.5,), std=(0.5,), resize="squash")
    reader = ImageReader(dataset, dataset.targets, preprocess, dataset.arrays[0][:, None], is_ready=True, workers=1)
    augment = AugmentConfig(rotation=20.0, repeats=4)
    loader = TrainLoader(
        reader, np.arange(50), batch_size=8, seed=0, augment=augment, device=torch.device("cpu"), sampling="balanced"
    )
    for batch in loader.batches(0, 3):
        assert batch.indices.tolist() == batch.indices[:2].tolist() * 4
        assert batch.targets.tolist() == dataset.targets[batch.indices].tolist()
        for one in range(8):
            for other in range(one):
                assert not torch.equal(batch.images[one], batch.images[other])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 10, "augment.repeats": 3}, "batch_size 10 is not a multiple of augment.repeats 3"),
        ({"augment.repeats": 0}, "augment.repeats is 0; expected 1 or more"),
        ({"data.sampling": "balance"}, "did you mean 'balanced'"),
        ({"data.sampling": "sqrt", "optim.class_weights": "inverse"}, "corrected twice"),
    ],
)
def test_impossible_sampling_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        override(RunConfig(), change)
