"""Cross-validation: every image evaluated once, groups whole, runs that stand alone, metrics that add up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_splits import listing, per_class, split_listing

from vitrail import api
from vitrail.api import Result, train
from vitrail.cli import run as vitrail
from vitrail.config import DataConfig, load_config
from vitrail.console import Console
from vitrail.data.datasets.open import open_dataset
from vitrail.data.splits.kfold import fold_numbers
from vitrail.data.splits.splits import split_dataset
from vitrail.evaluation.evaluate import evaluate
from vitrail.weights.model_file import load_model

QUIET = Console(quiet=True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_single_images_are_spread_to_one_image(data):
    sizes = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=6))
    folds, seed = data.draw(st.integers(2, 7)), data.draw(st.integers(0, 9))
    targets = np.repeat(np.arange(len(sizes)), sizes)
    pool = np.flatnonzero(np.random.default_rng(seed).random(len(targets)) < 0.9)
    pool = pool[np.bincount(targets[pool], minlength=len(sizes))[targets[pool]] > 1]
    numbers = fold_numbers(pool, targets, np.arange(len(targets)), folds, seed)
    assert len(numbers) == len(pool)
    table = np.stack([np.bincount(targets[pool[numbers == fold]], minlength=len(sizes)) for fold in range(folds)])
    assert (table.max(axis=0) - table.min(axis=0)).max() <= 1
    assert table.sum(axis=1).max() - table.sum(axis=1).min() <= 1
    assert table.sum() == len(pool)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_groups_stay_whole_and_every_fold_can_learn_every_class(data):
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    folds, seed = data.draw(st.integers(2, 5)), data.draw(st.integers(0, 9))
    targets = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.random.default_rng(seed).integers(0, data.draw(st.integers(1, 60)), len(targets))
    numbers = fold_numbers(np.arange(len(targets)), targets, groups, folds, seed)
    assert numbers.min() >= -1
    assert numbers.max() < folds
    for group in np.unique(groups):
        assert len(set(numbers[groups == group])) == 1
    for fold in range(folds):
        assert set(targets[numbers != fold]) == set(targets)
    again = fold_numbers(np.arange(len(targets)), targets, groups, folds, seed)
    assert numbers.tolist() == again.tolist()


def test_large_groups_are_spread_by_their_classes():
    # Two classes of 6 groups of 10 each, and 3 folds: each fold has to get 2 groups of each class.
    targets, groups = np.repeat([0, 1], 60), np.repeat(np.arange(12), 10)
    for seed in range(10):
        numbers = fold_numbers(np.arange(120), targets, groups, 3, seed)
        assert [np.bincount(targets[numbers == fold]).tolist() for fold in range(3)] == [[20, 20]] * 3


def test_each_fold_has_splits_of_its_own_and_together_they_hold_all_images():
    dataset = listing(50, 23, 7)
    folds = [split_listing(dataset, folds=5, fold=fold, test_fraction=0.1) for fold in range(5)]
    table = np.asarray([per_class(dataset, each.indices["val"]) for each in folds])
    assert table.sum(axis=0).tolist() == [45, 21, 6]
    assert (table.max(axis=0) - table.min(axis=0)).tolist() == [0, 1, 1]
    tests = {tuple(each.indices["test"]) for each in folds}
    assert len(tests) == 1
    assert per_class(dataset, folds[0].indices["test"]) == [5, 2, 1]
    evaluated = np.concatenate([each.indices["val"] for each in folds])
    assert len(evaluated) == len(set(evaluated)) == 72
    assert not set(evaluated) & set(folds[0].indices["test"])
    for each in folds:
        assert len(each.indices["train"]) + len(each.indices["val"]) == 72
        assert each.problems == ()
    assert len({each.fingerprint for each in folds}) == 5
    assert folds[3].rule == "a stratified split of all images; val: fold 3 of 5 (from 0), stratified"
    other = split_listing(dataset, folds=5, fold=0, test_fraction=0.1, split_seed=1)
    assert other.indices["val"].tolist() != folds[0].indices["val"].tolist()


def test_classes_that_not_every_fold_can_evaluate_are_named():
    dataset = listing(20, 3, 1)
    found = split_listing(dataset, folds=4, fold=0)
    assert [(each.kind, each.severity, each.paths) for each in found.problems] == [
        ("small-class", "warning", ("c1", "c2")),
        ("small-class", "warning", ("c2",)),
    ]
    assert "2 classes have fewer images than there are folds (4)" in found.problems[0].message
    assert "1 images are evaluated in no fold" in found.problems[1].message
    assert all(23 in split_listing(dataset, folds=4, fold=fold).indices["train"] for fold in range(4))


def test_a_validation_split_in_the_dataset_is_refused_and_its_test_split_kept_apart():
    dataset = listing(8, 8, split=(["train"] * 6 + ["val"] * 2) * 2)
    with pytest.raises(ValueError, match=r"folders name one already \(val/\); move its images into train/"):
        split_listing(dataset, folds=2, fold=0)
    dataset = listing(8, 8, split=(["train"] * 6 + ["test"] * 2) * 2)
    splits = [split_listing(dataset, folds=3, fold=fold) for fold in range(3)]
    assert all(each.indices["test"].tolist() == [6, 7, 14, 15] for each in splits)
    assert sorted(np.concatenate([each.indices["val"] for each in splits])) == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"folds": 1}, "data.folds is 1; expected 2 or more, or 0"),
        ({"folds": -2}, "data.folds is -2"),
        ({"folds": 3, "fold": 3}, "data.fold is 3; expected 0 to 2, or -1 for all"),
        ({"fold": 0}, "data.fold is 0; expected data.folds with it"),
    ],
)
def test_impossible_folds_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


@pytest.fixture(scope="module")
def crossed(tmp_path_factory, make_folder, tiny) -> tuple[Result, Path]:
    """A cross-validation of three folds, and its data."""
    folder = tmp_path_factory.mktemp("folds")
    data = make_folder(folder / "shapes", count=10)
    return train(data, out=folder / "out", console=QUIET, **tiny, **{"data.folds": 3}), data


def test_metrics_are_those_of_the_folds_together(crossed):
    result, _ = crossed
    found = json.loads((result.folder / "folds.json").read_text())
    assert found == result.folds
    each = [json.loads((result.folder / f"fold-{k}" / "evaluation.json").read_text())["val"] for k in range(3)]
    for name in ("top1", "top5", "loss", "ece", "balanced_accuracy"):
        values = [one[name] for one in each]
        assert found["parts"]["val"]["mean"][name] == pytest.approx(fmean(values))
        assert found["parts"]["val"]["deviation"][name] == pytest.approx(stdev(values))
    assert list(found["parts"]) == ["val"]
    pooled = found["pooled"]
    assert pooled["num_images"] == sum(one["num_images"] for one in each) == 30
    assert pooled["confusion"] == np.sum([one["confusion"] for one in each], axis=0).tolist()
    assert np.sum(pooled["confusion"], axis=1).tolist() == [10, 10, 10]
    assert result.top1 == pooled["top1"] == pytest.approx(np.trace(pooled["confusion"]) / 30)


def test_every_image_is_evaluated_once_and_every_fold_is_a_run(crossed):
    result, data = crossed
    evaluated = []
    for fold in range(3):
        run = result.folder / f"fold-{fold}"
        split = json.loads((run / "split.json").read_text())["splits"]
        evaluated += split["val"]
        assert len(split["train"]) == 20
        header = load_model(run / "model.safetensors")[1]
        assert (header.split["folds"], header.split["fold"]) == (3, fold)
        (run.parent.parent / "alone.safetensors").write_bytes((run / "model.safetensors").read_bytes())
        for model in (run, run.parent.parent / "alone.safetensors"):  # without split.json, the header makes it again
            again = evaluate(str(model), str(data), split="val", device=torch.device("cpu"), console=QUIET)
            assert again["fingerprint"] == json.loads((run / "split.json").read_text())["fingerprint"]
            assert again["top1"] == result.folds["parts"]["val"]["each"][fold]["top1"]
    assert len(evaluated) == len(set(evaluated)) == 30


def test_one_fold_alone_is_the_same_run(crossed, tmp_path, tiny):
    result, data = crossed
    alone = train(data, out=tmp_path / "one", console=QUIET, **tiny, **{"data.folds": 3, "data.fold": 1})
    assert not alone.folds
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "one", result.folder / "fold-1"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_trains_only_unfinished_folds(crossed, tmp_path, monkeypatch):
    result, data = crossed
    cut = tmp_path / "cut"
    shutil.copytree(result.folder, cut)
    shutil.rmtree(cut / "fold-2")
    (cut / "folds.json").unlink()
    begun = []
    real = api.start_run
    monkeypatch.setattr(
        api, "start_run", lambda request, **more: begun.append(request.folder.name) or real(request, **more)
    )
    again = train(data, out=cut, console=QUIET, resume=True, **{"data.folds": 3})
    assert begun == ["fold-2"]
    assert again.folds["parts"] == result.folds["parts"]
    assert json.loads((cut / "folds.json").read_text()) == result.folds
    ours, theirs = (load_file(folder / "fold-2" / "model.safetensors") for folder in (cut, result.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_config(cut / "fold-2" / "config.json").data.fold == 2


def test_impossible_starts_and_resumes_are_refused(crossed, tiny):
    result, data = crossed
    with pytest.raises(ValueError, match="exactly as configured, with epochs 2.0, not 9.0"):
        train(data, out=result.folder, console=QUIET, resume=True, epochs=9.0)
    with pytest.raises(ValueError, match=r"go on with this one alone by --out .*fold-1"):
        train(data, out=result.folder, console=QUIET, resume=True, **{"data.fold": 1})
    with pytest.raises(ValueError, match="is not empty; choose another --out"):
        train(data, out=result.folder, console=QUIET, **tiny, **{"data.folds": 3})
    with pytest.raises(ValueError, match="data.val_fraction 0.3 has no effect with data.folds 3"):
        train(
            data, out=result.folder.parent / "new", console=QUIET, **tiny, **{"data.folds": 3, "data.val_fraction": 0.3}
        )
    assert not (result.folder.parent / "new").exists()


def test_a_folds_model_evaluates_other_data_by_its_own_splits(crossed, make_folder, tmp_path):
    for split in ("train", "val"):
        make_folder(tmp_path / "other" / split, count=4)
    model = str(crossed[0].folder / "fold-1")
    found = evaluate(model, str(tmp_path / "other"), device=torch.device("cpu"), console=QUIET)
    assert (found["split"], found["num_images"]) == ("val", 12)


def test_the_folder_of_all_folds_is_no_model_spec(crossed, capsys):
    result, data = crossed
    assert vitrail(["eval", str(result.folder), str(data)]) == 1
    assert "fold-0" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_all_folds(crossed, tmp_path):
    result, data = crossed
    words = ["-m", "vitrail", "train", str(data), "--out", str(tmp_path / "two"), "--recipe"]
    words += [str(result.folder / "fold-0" / "config.json"), "--data.fold", "-1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    done = subprocess.run(launcher, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "two" / "folds.json").read_text())
    assert found["pooled"]["num_images"] == 30
    assert found["parts"]["val"]["mean"]["loss"] == pytest.approx(
        result.folds["parts"]["val"]["mean"]["loss"], abs=0.02
    )


def test_folds_have_not_changed():
    # A model file makes its splits again by (folds, fold, seed).
    dataset = listing(60, 25, 12, 3)
    groups = np.random.Generator(np.random.Philox(key=7)).integers(0, 80, 100)
    fingerprints = [split_listing(dataset, groups, folds=4, fold=fold, split_seed=7).fingerprint for fold in range(4)]
    assert fingerprints == [
        "8527fdde4fc0c2690f9a10ba30655306",
        "f8c0a48a25706f4bef93279ab609d1d0",
        "1f2e3687a87eacb3445c4db4a5aa131f",
        "9faf9bbfe39a8cd01764dc91d5831c8b",
    ]


def test_a_group_removed_for_one_class_is_removed_for_the_others():
    """Three groups, of which two share three rare classes: none of their images can be evaluated in every fold."""
    common = [(group, label, count) for group, count in ((0, 4), (1, 2), (2, 2)) for label in range(20)]
    rare = [(group, label, 1) for group in (1, 2) for label in (20, 21, 22)]
    groups, targets = (
        np.repeat([row[column] for row in common + rare], [row[2] for row in common + rare]) for column in (0, 1)
    )
    for seed in range(3):
        numbers = fold_numbers(np.arange(len(targets)), targets, groups, 2, seed)
        folds = {group: set(numbers[groups == group].tolist()) for group in range(3)}
        assert all(len(each) == 1 for each in folds.values())
        evaluated = set().union(*folds.values()) - {-1}
        for fold in evaluated:  # what is trained on beside each fold has every class
            assert set(targets[numbers != fold]) == set(range(23))


def test_more_folds_than_can_be_filled_are_refused_before_one_is_trained(make_folder, tmp_path):
    root = make_folder(tmp_path / "shapes", count=3)
    dataset = open_dataset(str(root))
    good, alone = np.ones(9, dtype=bool), np.arange(9)
    with pytest.raises(
        ValueError, match=r"data\.folds is 10, but \d+ of them .* 9 images in 9 groups .*; lower data\.folds"
    ):
        split_dataset(dataset, DataConfig(source=str(root), folds=10), good, alone)
