"""`vitrail eval`: all metrics of a model on a split of a dataset."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.datasets.base import Dataset
from vitrail.data.loading.reader import ImageReader
from vitrail.data.setup import build_eval_reader, list_dataset
from vitrail.evaluation.classifier import Classifier, load
from vitrail.evaluation.metrics import all_metrics
from vitrail.evaluation.predict_logits import Outputs, predict_logits
from vitrail.evaluation.split_choice import ScannedSplit, find_split
from vitrail.lookup import unknown


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
    """Evaluate a model on a split of a dataset; no image of another split is decoded where the split is known without.

    Args:
        split: test, val, train or all; unless given, the first there is of test and val, or all images of a folder
            that has no splits and is not what the model was trained on.
        image_size, patch_size, resize: evaluate at another image size, patch size or way of resizing than the model was
            trained with; see `Classifier.at`.
        data: how to read the dataset; `source` and the split's settings are taken from the arguments and the model.

    Returns:
        The evaluation as `vitrail eval --out` writes it.

    Raises:
        ValueError: the model or the dataset cannot be read, or their classes disagree.
    """
    classifier = load(model).to(device).at(image_size=image_size, patch_size=patch_size, resize=resize)
    classifier.check_classifies()
    classifier = classifier.tuned(measuring=True)
    report_weights(classifier, console)
    warn_of_patches(classifier, console)
    near_duplicates = bool(classifier.header.split.get("near_duplicates", True))
    data = dataclasses.replace(data or DataConfig(), source=source, near_duplicates=near_duplicates)
    # A class without images is an error of the listing to a training; here it is told after the evaluation.
    dataset = list_dataset(data, console)
    targets = to_model_labels(dataset, classifier.labels)
    chosen = find_split(model, classifier, dataset, data, split, console)
    warn_of_training_images(chosen, classifier, dataset, console)
    reader = build_eval_reader(dataset, targets, chosen.scan, chosen.indices, classifier.preprocess, data)
    with console.bar(f"evaluating {len(chosen.indices):,} images") as advance:
        outputs: Outputs = predict_logits(
            classifier.model, reader, chosen.indices, device=device, patch_size=classifier.patch_size, advance=advance
        )
    result = all_metrics(outputs, classifier.labels, classifier.header.temperature)
    warn_of_absent(result, reader, console)
    return {
        **result,
        "split": chosen.name,
        "fingerprint": chosen.splits.fingerprint,
        "source": source,
        "model": model,
        "image_size": classifier.preprocess.image_size,
        "patch_size": classifier.patch_size or classifier.model.config.patch_size,
        "resize": classifier.preprocess.resize,
        "num_left_out": chosen.num_broken + len(reader.dropped),
    }


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


def warn_of_absent(result: dict[str, Any], reader: ImageReader, console: Console) -> None:
    """Warn of classes without images, and of files that failed."""
    absent = [label for label, row in result["per_class"].items() if row["count"] == 0]
    if absent:
        console.warn(f"{len(absent)} classes of the model have no image here: {', '.join(absent[:10])}")
    if reader.dropped:
        console.warn(f"{len(reader.dropped)} files failed and are not counted: {', '.join(list(reader.dropped)[:5])}")


def warn_of_training_images(chosen: ScannedSplit, classifier: Classifier, dataset: Dataset, console: Console) -> None:
    """Warn where a figure would flatter: images that were trained on, or images that are in no split."""
    if classifier.header.split.get("source") != dataset.name:
        return
    if chosen.name in ("train", "all"):
        what = "images of the split train" if chosen.name == "train" else "some of these images"
        console.warn(f"the model was trained on {what}: this figure says how well it remembers them")
    if chosen.num_new > 0 and chosen.name != "all":
        console.warn(
            f"not evaluated, since they came after the split that the model was trained with: {chosen.num_new:,} images"
        )


def to_model_labels(dataset: Dataset, labels: tuple[str, ...]) -> np.ndarray:
    """Return a dataset's targets as the model numbers its classes.

    Raises:
        ValueError: the dataset has a class that the model does not know.
    """
    position = {label: index for index, label in enumerate(labels)}
    if twice := [label for label in dataset.labels if labels.count(label) > 1]:
        raise ValueError(
            f"{dataset.name}: class {twice[0]!r} is the label of several of the model's classes; which is not known"
        )
    foreign = [label for label in dataset.labels if label not in position]
    if foreign:
        raise ValueError(
            f"{dataset.name}: {unknown('class', foreign[0], labels[:50])} ({len(foreign)} classes are not among the model's "
            f"{len(labels)}); evaluate it on folders named like its classes"
        )
    return np.asarray([position[label] for label in dataset.labels])[dataset.targets]
