"""Which split of a dataset a model is evaluated on, and the scan of it; as little as possible is decoded to know it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.check.scan import Scan
from vitrail.data.datasets.base import Dataset
from vitrail.data.setup import scan_or_stop
from vitrail.data.splits.splits import Splits, fingerprint, load_splits, split_dataset
from vitrail.evaluation.classifier import Classifier
from vitrail.lookup import unknown

SPLIT_ORDER = ("test", "val", "train", "all")
_REMEDY = "restore the files, or evaluate all images, those of the training included, by --split all"


@dataclass(frozen=True)
class ScannedSplit:
    """A split, and what a scan of its images found.

    Attributes:
        name: test, val, train or all.
        splits: all splits of the dataset.
        scan: of the split's images at least.
        num_new: images that can be used and are in no split.
        num_broken: images that cannot be used: of the split, or of all where all were scanned.
    """

    name: str
    splits: Splits
    scan: Scan
    num_new: int
    num_broken: int

    @property
    def indices(self) -> np.ndarray:
        """The split's images that can be used."""
        return self.splits.indices[self.name]


def find_split(
    model: str, classifier: Classifier, dataset: Dataset, data: DataConfig, wanted: str | None, console: Console
) -> ScannedSplit:
    """Return the split to evaluate, scanned.

    Only its own images are scanned where the split is known from the listing: recorded with the run, or made by folders
    or a column. A stratified split of a model file without its run is made anew, for which all images are scanned.

    Args:
        wanted: the split that the user named; None takes the first there is.

    Raises:
        ValueError: there is no such split, or the data has changed since the model was trained on it.
    """
    channels = classifier.preprocess.channels
    splits = splits_of_listing(model, classifier, dataset, data, wanted)
    if splits is not None:
        name = choose_split(wanted, splits, data.source)
        chosen = splits.indices[name]
        # Images in no split came later, or were broken at the time: which of the two, only a scan of them tells.
        others = np.setdiff1d(np.arange(len(dataset.paths)), np.concatenate(list(splits.indices.values())))
        scan = scan_or_stop(dataset, data, console, indices=np.union1d(chosen, others), channels=channels)
        usable = np.ones(len(dataset.paths), dtype=bool)
        usable[chosen] = scan.good[chosen]
        splits = without_broken(model, classifier, dataset, splits, usable)
        return ScannedSplit(name, splits, scan, int(scan.good[others].sum()), int((~usable).sum()))
    scan = scan_or_stop(dataset, data, console, channels=channels)
    splits = training_or_own_splits(model, classifier, dataset, data, scan)
    name = choose_split(wanted, splits, data.source)
    in_splits = sum(len(indices) for indices in splits.indices.values())
    return ScannedSplit(name, splits, scan, int(scan.good.sum()) - in_splits, int((~scan.good).sum()))


def splits_of_listing(
    model: str, classifier: Classifier, dataset: Dataset, data: DataConfig, wanted: str | None
) -> Splits | None:
    """Return the splits as far as the listing alone tells them; None where images must be scanned to know them."""
    if wanted == "all":
        return all_images(dataset, np.ones(len(dataset.paths), dtype=bool))
    if (recorded := split_file_of(model, classifier, dataset)) is not None:
        return load_recorded(dataset, recorded, None, _REMEDY)
    if dataset.split is None:
        return None
    own, rule, trained = set(dataset.split.tolist()), split_rule(classifier), classifier.header.split
    # What is drawn from the training images depends on which of them are whole, and on near duplicates.
    drawn = "val" not in own or ("test" not in own and rule.get("test_fraction", 0.0) > 0)
    if drawn and "fingerprint" in trained:
        return None
    nothing = np.zeros(len(dataset.paths), dtype=np.int64)
    settings = dataclasses.replace(data, val_fraction=0.0, test_fraction=0.0)
    splits = split_dataset(dataset, settings, np.ones(len(nothing), dtype=bool), nothing)
    if trained.get("source") == dataset.name and trained.get("fingerprint") != splits.fingerprint:
        return None  # trained on without the files that were broken: only a scan of all gives the same fingerprint
    return splits


def without_broken(model: str, classifier: Classifier, dataset: Dataset, splits: Splits, usable: np.ndarray) -> Splits:
    """Return splits without the images that a scan has found broken; of a recorded split none may be.

    Raises:
        ValueError: the split is that of the model's training, and an image of it is broken now.
    """
    if (recorded := split_file_of(model, classifier, dataset)) is not None and "all" not in splits.indices:
        return load_recorded(dataset, recorded, usable, _REMEDY)
    if usable.all():
        return splits
    whole = {name: indices[usable[indices]] for name, indices in splits.indices.items()}
    return Splits(whole, fingerprint(dataset, whole), splits.rule, splits.problems)


def training_or_own_splits(
    model: str, classifier: Classifier, dataset: Dataset, data: DataConfig, scan: Scan
) -> Splits:
    """Return the split that the model was trained with where the dataset is that one, else the dataset's own.

    Raises:
        ValueError: the dataset is that one, but has changed, so that training images could be evaluated as unseen.
    """
    trained = training_splits(model, classifier, dataset, data, scan.good, scan.groups, remedy=_REMEDY)
    if trained is not None:
        return trained
    if dataset.split is not None:
        settings = dataclasses.replace(data, val_fraction=0.0, test_fraction=0.0)
        return split_dataset(dataset, settings, scan.good, scan.groups)
    return all_images(dataset, scan.good)  # other data than the model was trained on: a flat folder is one whole


def all_images(dataset: Dataset, good: np.ndarray) -> Splits:
    """Return all good images as one split."""
    everything = {"all": np.flatnonzero(good)}
    return Splits(everything, fingerprint(dataset, everything), "all images")


def split_file_of(model: str, classifier: Classifier, dataset: Dataset) -> Path | None:
    """Return the split.json of the run that a model belongs to, where the dataset is the one it was trained on."""
    path = Path(model)
    if not path.exists() or classifier.header.split.get("source") != dataset.name:
        return None
    recorded = (path if path.is_dir() else path.parent) / "split.json"
    return recorded if recorded.exists() else None


def load_recorded(dataset: Dataset, recorded: Path, good: np.ndarray | None, remedy: str) -> Splits:
    """Return a recorded split.

    Raises:
        ValueError: files of it are gone, broken or of another class now; the message ends with the remedy.
    """
    try:
        return load_splits(dataset, recorded, good)
    except ValueError as error:
        raise ValueError(f"{error}. {remedy.capitalize()}") from None


def training_splits(
    model: str,
    classifier: Classifier,
    dataset: Dataset,
    data: DataConfig,
    good: np.ndarray,
    groups: np.ndarray,
    *,
    remedy: str,
) -> Splits | None:
    """Return the split that the model was trained with, or None where the dataset is another one.

    Args:
        remedy: what to do when the dataset has changed, for the message.

    Raises:
        ValueError: the dataset is that one, but has changed, so that which images were trained on is not known.
    """
    if (recorded := split_file_of(model, classifier, dataset)) is not None:
        return load_recorded(dataset, recorded, good, remedy)
    trained = classifier.header.split
    same_name = trained.get("source") == dataset.name
    rule = split_rule(classifier)
    if rule.get("folds") and dataset.split is not None and "val" in dataset.split:
        return None  # folds are never made of such data
    made = split_dataset(dataset, dataclasses.replace(data, **rule), good, groups)
    if made.fingerprint == trained.get("fingerprint"):
        return made
    if dataset.split is None and same_name:
        raise ValueError(
            f"{dataset.name}: the model was trained on data of this name, but its files have changed, and which of them were "
            f"trained on is not known without the run folder's split.json; {remedy}"
        )
    return None


def split_rule(classifier: Classifier) -> dict[str, Any]:
    """Return the settings of `DataConfig` that split the data the model was trained on."""
    trained = classifier.header.split
    rule = ("val_fraction", "test_fraction", "split_seed", "folds", "fold")
    return {name: trained[name] for name in rule if name in trained}


def choose_split(split: str | None, splits: Splits, source: str) -> str:
    """Return the name of the split to evaluate.

    Raises:
        ValueError: the split asked for is unknown or not there.
    """
    if split is None:
        return next(name for name in SPLIT_ORDER if name in splits.indices)
    if split not in SPLIT_ORDER:
        raise ValueError(unknown("--split", split, SPLIT_ORDER))
    if split not in splits.indices:
        there = ", ".join(name for name in splits.indices if name != "all") or "none of its own"
        raise ValueError(f"{source}: has no split {split!r}; it has {there}, or all images by --split all")
    return split
