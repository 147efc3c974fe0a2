"""`vitrail eval`: all figures of a model on a source of labelled images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.datasets.base import Dataset
from vitrail.data.datasets.open import open_dataset
from vitrail.data.images.preprocess import Preprocess
from vitrail.data.loading.reader import ImageReader
from vitrail.data.setup import is_identity, scan_or_stop
from vitrail.data.splits.splits import Splits, fingerprint, load_splits, split_dataset
from vitrail.evaluation.classifier import Classifier, load
from vitrail.evaluation.metrics import Outputs, all_metrics
from vitrail.evaluation.predict_logits import predict_logits
from vitrail.lookup import unknown

PARTS = ("test", "val", "train", "all")


def evaluate(
    model: str,
    source: str,
    *,
    split: str | None = None,
    device: torch.device,
    console: Console,
    data: DataConfig | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    resize: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a part of a source.

    Args:
        split: test, val, train or all; unless given, the first there is of test and val, or all images of a folder
            that has no parts and is not what the model was trained on.
        image_size, patch_size, resize: evaluate at another image size, patch size or way of resizing than the model was
            trained with; see `Classifier.at`.
        data: how to read the source; `source` and the split's settings are taken from the arguments and the model.

    Returns:
        The evaluation as `vitrail eval --out` writes it.

    Raises:
        ValueError: the model or the source cannot be read, or their classes disagree.
    """
    classifier = load(model).to(device).at(image_size=image_size, patch_size=patch_size, resize=resize)
    classifier.check_classifies()
    classifier = classifier.tuned(measuring=True)
    report_weights(classifier, console)
    warn_of_patches(classifier, console)
    data = dataclasses.replace(data or DataConfig(), source=source)
    dataset = open_dataset(source, limit_pixels=data.limit_pixels, keep_damaged=data.damaged == "keep", bar=console.bar)
    data = dataclasses.replace(data, near_duplicates=bool(classifier.header.split.get("near_duplicates", True)))
    # A class without images is an error of the listing to a training; here it is told after the evaluation.
    scan = scan_or_stop(dataset, data, console, channels=classifier.preprocess.channels)
    targets = to_model_labels(dataset, classifier.labels)
    if split == "all":
        everything = {"all": np.flatnonzero(scan.good)}
        splits = Splits(everything, fingerprint(dataset, everything), "all images")
    else:
        splits = splits_for(model, classifier, dataset, data, scan.good, scan.groups)
    part = choose_split(split, splits, source)
    indices = splits.indices[part]
    warn_of_training_images(part, splits, classifier, dataset, int(scan.good.sum()), console)
    reader = ImageReader(dataset, targets, classifier.preprocess, scan.pixels, workers=data.workers)
    reader.is_ready = ready(classifier.preprocess, scan.pixels)
    with console.bar(f"evaluating {len(indices):,} images") as advance:
        outputs: Outputs = predict_logits(
            classifier.model, reader, indices, device=device, patch_size=classifier.patch_size, advance=advance
        )
    result = all_metrics(outputs, classifier.labels, classifier.header.temperature)
    absent = [label for label, row in result["per_class"].items() if row["count"] == 0]
    if absent:
        console.warn(f"{len(absent)} classes of the model have no image here: {', '.join(absent[:10])}")
    if reader.dropped:
        console.warn(f"{len(reader.dropped)} files failed and are not counted: {', '.join(list(reader.dropped)[:5])}")
    left_out = int((~scan.good).sum()) + len(reader.dropped)
    place: dict[str, Any] = {"split": part, "fingerprint": splits.fingerprint, "source": source, "model": model}
    place["image_size"] = classifier.preprocess.image_size
    place["patch_size"] = classifier.patch_size or classifier.model.config.patch_size
    place["resize"] = classifier.preprocess.resize
    return {**result, **place, "num_left_out": left_out}


def report_weights(classifier: Classifier, console: Console) -> None:
    """Say what became of a foreign model's weights, where they were not simply taken."""
    if classifier.report.differs:
        console.info("\n".join(classifier.report.lines()))


def warn_of_patches(classifier: Classifier, console: Console) -> None:
    """Say when the weights have never seen patches of this size."""
    if not classifier.is_trained_size:
        own = classifier.model.config
        trained = " ".join(map(str, own.patch_sizes or (own.patch_size,)))
        console.warn(
            f"the model was trained with patches of {trained} px, not {classifier.patch_size}: expect a much lower accuracy"
        )


def warn_of_training_images(
    part: str, splits: Splits, classifier: Classifier, dataset: Dataset, num_good: int, console: Console
) -> None:
    """Warn where a figure would flatter: images that were trained on, or images that no part has."""
    if classifier.header.split.get("source") != dataset.name:
        return
    if part in ("train", "all"):
        console.warn(f"the model was trained on images of split {part!r}: this figure says how well it remembers them")
    left = num_good - sum(len(indices) for indices in splits.indices.values())
    if left > 0 and part != "all":
        console.warn(
            f"not evaluated, since they came after the division that the model was trained with: {left:,} images"
        )


def splits_for(
    model: str, classifier: Classifier, dataset: Dataset, data: DataConfig, good: np.ndarray, groups: np.ndarray
) -> Splits:
    """Return the division that the model was trained with where the source is that data, else the source's own.

    Raises:
        ValueError: the source is that data, but has changed, so that training images could be evaluated as unseen.
    """
    remedy = "restore the files, or evaluate all images, those of the training included, by --split all"
    trained = training_splits(model, classifier, dataset, data, good, groups, remedy=remedy)
    if trained is not None:
        return trained
    if dataset.split is not None:
        return split_dataset(dataset, dataclasses.replace(data, val_fraction=0.0, test_fraction=0.0), good, groups)
    # Other data than the model was trained on: a flat folder is one whole.
    everything = {"all": np.flatnonzero(good)}
    return Splits(everything, fingerprint(dataset, everything), "all images")


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
    """Return the division that the model was trained with, or None where the source is other data.

    Args:
        remedy: what to do when the source has changed, for the message.

    Raises:
        ValueError: the source is that data, but has changed, so that which images were trained on is not known.
    """
    trained = classifier.header.split
    place = Path(model)
    recorded = (place if place.is_dir() else place.parent) / "split.json" if place.exists() else None
    same_name = trained.get("source") == dataset.name
    if recorded is not None and recorded.exists() and same_name:
        try:
            return load_splits(dataset, recorded, good)
        except ValueError as error:
            raise ValueError(f"{error}. {remedy.capitalize()}") from None
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
    """Return the settings of `DataConfig` that divided the data the model was trained on."""
    trained = classifier.header.split
    rule = ("val_fraction", "test_fraction", "split_seed", "folds", "fold")
    return {name: trained[name] for name in rule if name in trained}


def choose_split(split: str | None, splits: Splits, source: str) -> str:
    """Return the part to evaluate.

    Raises:
        ValueError: the part asked for is unknown or not there.
    """
    if split is None:
        return next(part for part in ("test", "val", "train", "all") if part in splits.indices)
    if split not in PARTS:
        raise ValueError(unknown("--split", split, PARTS))
    if split not in splits.indices:
        raise ValueError(f"{source}: has no part {split!r}; it has {', '.join(splits.indices)}, or all by --split all")
    return split


def to_model_labels(dataset: Dataset, labels: tuple[str, ...]) -> np.ndarray:
    """Return the source's targets as the model numbers its classes.

    Raises:
        ValueError: the source has a class that the model does not know.
    """
    place = {label: index for index, label in enumerate(labels)}
    if twice := [label for label in dataset.labels if labels.count(label) > 1]:
        raise ValueError(
            f"{dataset.name}: class {twice[0]!r} is the label of several of the model's classes; which is not known"
        )
    foreign = [label for label in dataset.labels if label not in place]
    if foreign:
        raise ValueError(
            f"{dataset.name}: {unknown('class', foreign[0], labels[:50])} ({len(foreign)} classes are not among the model's "
            f"{len(labels)}); evaluate it on folders named like its classes"
        )
    return np.asarray([place[label] for label in dataset.labels])[dataset.targets]


def ready(preprocess: Preprocess, pixels: np.ndarray | None) -> bool:
    """Whether stored images are the model's input as they are."""
    return pixels is not None and is_identity(preprocess, (pixels.shape[2], pixels.shape[3]))
