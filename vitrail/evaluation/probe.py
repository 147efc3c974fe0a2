"""`vitrail probe`: what a model's frozen features are worth on some images, before anything is trained."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.cache.rows import RowCache
from vitrail.data.cache.scans import ScanCache
from vitrail.data.check.scan import Scan
from vitrail.data.datasets.base import Dataset
from vitrail.data.datasets.keys import image_keys
from vitrail.data.datasets.open import open_dataset
from vitrail.data.loading.reader import ImageReader
from vitrail.data.problems import stop_on_errors
from vitrail.data.setup import scan_or_stop
from vitrail.data.splits.splits import Splits, check_trainable, split_dataset
from vitrail.evaluation.classifier import Classifier, load
from vitrail.evaluation.evaluate import ready, report_weights, split_rule, training_splits
from vitrail.evaluation.features import Features, features_of, open_cache
from vitrail.evaluation.knn import knn_predict, neighbours
from vitrail.evaluation.linear import TOLERANCE, fit_logistic, fit_ridge
from vitrail.evaluation.pca import principal_axes
from vitrail.models.variants import is_variant
from vitrail.weights.model_file import ModelHeader, save_model, versions
from vitrail.weights.resolve import model_file_of


def probe(
    model: str,
    source: str,
    *,
    device: torch.device,
    console: Console,
    data: DataConfig | None = None,
    image_size: int | None = None,
    save: Path | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Fit three simple classifiers to a model's pooled vectors and evaluate them on images they were not fitted to.

    Args:
        data: how to read and to divide the source.
        image_size: side of the square that images are brought to, unless the model's own.
        save: write a model file here whose head is the logistic regression.
        fresh: compute the features also where they are in the cache.

    Returns:
        The figures as `vitrail probe --out` writes them.

    Raises:
        ValueError: the model or the source cannot be read, or the source cannot be divided into images to fit and to evaluate.
    """
    watch = Stopwatch()
    classifier = load_frozen(model, console).to(device).at(image_size=image_size)
    if save is not None:
        check_save(save, model)
    classifier = classifier.tuned(measuring=True)
    watch.lap("model")
    data = dataclasses.replace(data or DataConfig(), source=source)
    opened, scan, data, keys = scan_cached(classifier, data, console, fresh=fresh)
    parts, data = split_for_probe(model, classifier, opened, scan, data)
    judged = "test" if "test" in parts.indices else "val"
    for problem in check_trainable(opened, parts, evaluated=judged):
        console.warn(problem.message)
    watch.lap("data")
    reader = ImageReader(opened, opened.targets, classifier.preprocess, scan.pixels, workers=data.workers)
    reader.is_ready = ready(classifier.preprocess, scan.pixels)
    cache = open_cache(classifier, opened, device)
    wanted = np.concatenate([parts.indices["train"], parts.indices[judged]])
    with console.bar(f"features of {len(wanted):,} images") as advance:
        found = features_of(
            classifier,
            reader,
            wanted,
            device=device,
            cache=cache,
            keys=keys[wanted],
            fresh=fresh,
            advance=advance,
        )
    report_features(found, reader, console)
    watch.lap("features")
    train, rest = (torch.from_numpy(np.isin(found.indices, parts.indices[part])) for part in ("train", judged))
    values, targets = torch.from_numpy(found.values), torch.from_numpy(opened.targets[found.indices])
    figures, weight, bias = fit_classifiers(
        values[train], targets[train], values[rest], targets[rest], len(opened.labels), watch
    )
    if save is not None:
        write_model(save, classifier, opened, parts, data, weight, bias, {"top1": figures["logistic"]})
    return {
        **figures,
        "seconds": watch.total,
        "seconds_each": watch.laps,
        "num_train": int(train.sum()),
        "num_images": int(rest.sum()),
        "num_left_out": int((~scan.good).sum()) + len(reader.dropped),
        "num_features": found.values.shape[1],
        "labels": list(opened.labels),
        "split": judged,
        "fingerprint": parts.fingerprint,
        "rule": parts.rule,
        "from_cache": found.from_cache,
        "computed": len(found.indices) - found.from_cache,
        **describe_cache(cache),
        "source": source,
        "model": model,
        "image_size": classifier.preprocess.image_size,
    }


class Stopwatch:
    """Seconds since it was made, in laps."""

    def __init__(self) -> None:
        self.started = self.at = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a lap."""
        now = time.perf_counter()
        self.laps[name], self.at = now - self.at, now

    @property
    def total(self) -> float:
        """All seconds so far."""
        return time.perf_counter() - self.started


def load_frozen(model: str, console: Console) -> Classifier:
    """Load a model and take its head off, so that it returns the pooled vector.

    A variant's random weights are always the same ones, so that figures can be repeated and features kept.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = load(model)
    report_weights(classifier, console)
    if not Path(model).exists() and is_variant(model):
        console.warn(f"{model}: random weights; the figures say what features are worth before any training")
    classifier.model.head = nn.Identity()
    return classifier


def check_save(save: Path, model: str) -> None:
    """Raise a ValueError unless a model file can be written under this name."""
    if save.suffix != ".safetensors":
        raise ValueError(f"--save {save}: expected a name that ends in .safetensors")
    if not save.parent.is_dir():
        raise ValueError(f"--save {save}: there is no folder {save.parent}")
    if save.is_dir():
        raise ValueError(f"--save {save}: is a folder; expected the name of a file")
    if Path(model).exists() and save.exists() and save.samefile(model_file_of(model)):
        raise ValueError(f"--save {save}: is the file of the probed model itself; choose another name")


def scan_cached(
    classifier: Classifier, data: DataConfig, console: Console, *, fresh: bool
) -> tuple[Dataset, Scan, DataConfig, np.ndarray]:
    """Open a source and look at every image.

    Args:
        fresh: decode also the images that an earlier look has found whole and that have not changed since.

    Returns:
        The source, what the look found, the settings with the model's way to find duplicates, and each image's key.

    Raises:
        ValueError: a class has no images, or a file is broken and was to be reported.
    """
    dataset = open_dataset(
        data.source, limit_pixels=data.limit_pixels, keep_damaged=data.damaged == "keep", bar=console.bar
    )
    stop_on_errors(dataset.problems)
    if classifier.header.split.get("source") == dataset.name:
        data = dataclasses.replace(data, near_duplicates=bool(classifier.header.split.get("near_duplicates", True)))
    mode = classifier.preprocess.mode
    keys = image_keys(dataset, np.arange(len(dataset.paths)), mode, data.workers)
    kept = ScanCache(dataset.name, keys, mode, limit_pixels=data.limit_pixels)
    if fresh:
        kept.rows.clear()
    scan = scan_or_stop(dataset, data, console, channels=classifier.preprocess.channels, cache=kept)
    return dataset, scan, data, kept.keys


def split_for_probe(
    model: str, classifier: Classifier, dataset: Dataset, scan: Scan, data: DataConfig
) -> tuple[Splits, DataConfig]:
    """Return the division, and the settings that make it again.

    It is that of the model's training where the source is that data; else the source's own parts; else a stratified split.
    """
    remedy = "restore the files, or probe with the run as it was then"
    trained = training_splits(model, classifier, dataset, data, scan.good, scan.groups, remedy=remedy)
    if trained is not None:
        return trained, dataclasses.replace(data, **split_rule(classifier))
    if dataset.split is not None and set(dataset.split) & {"val", "test"}:
        # The images that would be kept back for choices are not needed: nothing here chooses by them.
        data = dataclasses.replace(data, val_fraction=0.0, test_fraction=0.0)
    return split_dataset(dataset, data, scan.good, scan.groups), data


def report_features(found: Features, reader: ImageReader, console: Console) -> None:
    """Warn of files that failed and of a cache that could not be written."""
    if reader.dropped:
        console.warn(f"{len(reader.dropped)} files failed and are not counted: {', '.join(list(reader.dropped)[:5])}")
    if found.problem:
        console.warn(f"the features could not be kept, and will be computed again next time: {found.problem}")


def fit_classifiers(
    known: Tensor, truth: Tensor, asked: Tensor, answers: Tensor, num_classes: int, stopwatch: Stopwatch
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Fit the three classifiers to known features and their classes, and evaluate them on others.

    Returns:
        The figures, and weight and bias of the logistic regression on raw features, float32.
    """
    k = neighbours(truth)
    figures = {"knn": share_correct(knn_predict(known, truth, asked, k=k, num_classes=num_classes), answers)}
    stopwatch.lap("knn")
    spectrum = principal_axes(known, truth, num_classes)
    ridge = fit_ridge(known, truth, spectrum)
    weight, bias = spectrum.fold(ridge.weight, ridge.bias)
    figures["ridge"] = share_correct(linear_classes(asked, weight, bias), answers)
    stopwatch.lap("ridge")
    logistic = fit_logistic(known, truth, spectrum, ridge)
    weight, bias = spectrum.fold(logistic.weight, logistic.bias)
    figures["logistic"] = share_correct(linear_classes(asked, weight, bias), answers)
    stopwatch.lap("logistic")
    chosen = {"k": k, "lambda": ridge.penalty, "alpha": logistic.penalty, "steps": logistic.steps}
    return {**figures, **chosen, "converged": logistic.gradient <= TOLERANCE}, weight.float(), bias.float()


def linear_classes(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the classes that a linear head chooses, in fp32 as the model with that head computes it."""
    return nn.functional.linear(features, weight.float(), bias.float()).argmax(dim=1)


def share_correct(predicted: Tensor, targets: Tensor) -> float:
    """Return the share of right answers."""
    return float((predicted == targets).double().mean())


def describe_cache(cache: RowCache) -> dict[str, Any]:
    """Return where the features are kept and how much they take."""
    return {"cache": str(cache.folder), "cache_bytes": cache.num_bytes}


def write_model(
    path: Path,
    classifier: Classifier,
    dataset: Dataset,
    splits: Splits,
    data: DataConfig,
    weight: Tensor,
    bias: Tensor,
    metrics: dict[str, float],
) -> None:
    """Write a model file: the frozen weights, a linear head, the labels of the data, and how it was divided."""
    weights = {**classifier.model.state_dict(), "head.weight": weight, "head.bias": bias}
    architecture = dataclasses.replace(classifier.model.config, num_classes=len(dataset.labels))
    rule = ("val_fraction", "test_fraction", "split_seed", "folds", "fold", "near_duplicates")
    split = {"fingerprint": splits.fingerprint, "source": dataset.name, **{name: getattr(data, name) for name in rule}}
    header = ModelHeader(
        architecture, dataset.labels, classifier.preprocess, split=split, metrics=metrics, versions=versions()
    )
    save_model(path, weights, header)
