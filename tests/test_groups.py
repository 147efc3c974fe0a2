"""Groups of a table: never split, joined by near duplicates, recorded with the splits."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tables import opened, write

from vitrail.config import DataConfig
from vitrail.data.check.scan import ScanSettings, scan_dataset
from vitrail.data.datasets.base import FileDataset
from vitrail.data.datasets.string_array import StringArray
from vitrail.data.splits.splits import load_splits, save_splits, split_dataset


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_groups_are_never_split_and_fractions_are_nearly_met(tmp_path_factory, data):
    """Patients with several images of several classes: whole on one side, sizes and classes near the fractions."""
    random = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    classes, patients = data.draw(st.integers(2, 4)), data.draw(st.integers(15, 40))
    largest = data.draw(st.integers(1, 8))
    groups = np.repeat(np.arange(patients), random.integers(1, largest + 1, patients))
    groups = random.permutation(np.where(random.random(len(groups)) < 0.1, -1, groups))
    targets = random.integers(0, classes, len(groups))
    val, test = data.draw(st.sampled_from([(0.2, 0.0), (0.25, 0.25), (0.1, 0.0), (0.5, 0.0)]))
    dataset = FileDataset(
        name="t",
        labels=tuple("abcd"[:classes]),
        paths=StringArray(f"{number}.png" for number in range(len(groups))),
        targets=targets,
        groups=groups,
        split_origin="the column split:",
        root=tmp_path_factory.getbasetemp(),
        limit_pixels=1,
        damaged="refuse",
    )
    from vitrail.data.check.duplicates import group_numbers as connected
    from vitrail.data.check.duplicates import group_pairs

    linked = connected(len(groups), group_pairs(groups))
    config = DataConfig(val_fraction=val, test_fraction=test, split_seed=data.draw(st.integers(0, 5)))
    splits = split_dataset(dataset, config, np.ones(len(groups), bool), linked).indices
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(len(groups)))
    sides = [set(groups[indices].tolist()) - {-1} for indices in splits.values()]
    assert sum(map(len, sides)) == len(set(groups.tolist()) - {-1})
    for name, fraction in (("val", val), ("test", test)):
        size = len(splits.get(name, ()))
        assert abs(size - fraction * len(groups)) <= largest + classes
        if fraction and largest <= 3:
            counts = np.bincount(targets[splits[name]], minlength=classes)
            assert (np.abs(counts - fraction * np.bincount(targets, minlength=classes)) <= largest + 1).all()


def test_near_duplicates_join_groups_and_the_split_is_recorded(tmp_path):
    random = np.random.default_rng(0)
    lines = ["path,label,group"]
    for number in range(40):
        pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02d}.png")
        lines.append(f"{number:02d}.png,{'ab'[number % 2]},g{number // 4}")
    # The first image once more, a level brighter, in another group: both groups must stay together.
    twin = np.clip(np.asarray(Image.open(tmp_path / "00.png")).astype(int) + 1, 0, 255).astype(np.uint8)
    Image.fromarray(twin).save(tmp_path / "twin.png")
    lines.append("twin.png,b,g9")
    dataset = opened(write(tmp_path / "t.csv", "\n".join(lines)))
    scan = scan_dataset(dataset, ScanSettings("stop", near_duplicates=True, limit_pixels=10**8, memory_bytes=10**8))
    assert dataset.groups is not None
    for seed in range(6):
        splits = split_dataset(dataset, DataConfig(split_seed=seed), scan.good, scan.groups)
        sides = {name: set(dataset.groups[indices].tolist()) for name, indices in splits.indices.items()}
        assert not sides["train"] & sides["val"]
        assert any({0, 9} <= side for side in sides.values())
        assert splits.rule == "a stratified split of all images; 10 groups kept whole"
    save_splits(dataset, splits, tmp_path / "split.json")
    written = json.loads((tmp_path / "split.json").read_text())
    assert written["rule"].endswith("10 groups kept whole")
    again = load_splits(dataset, tmp_path / "split.json", scan.good)
    assert again.fingerprint == written["fingerprint"] == splits.fingerprint
    assert {name: indices.tolist() for name, indices in again.indices.items()} == {
        name: indices.tolist() for name, indices in splits.indices.items()
    }
