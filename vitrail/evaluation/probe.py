"""`vitrail probe`: what a model's frozen features are worth on some images, before anything is trained."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.cache.rows import RowCache
from vitrail.data.check.scan import Scan
from vitrail.data.datasets.base import Dataset
from vitrail.data.datasets.keys import image_keys
from vitrail.data.loading.reader import ImageReader
from vitrail.data.problems import stop_on_errors
from vitrail.data.setup import build_eval_reader, list_dataset, scan_or_stop
from vitrail.data.splits.splits import Splits, check_trainable, split_dataset
from vitrail.evaluation.classifier import Classifier, load
from vitrail.evaluation.evaluate import report_weights
from vitrail.evaluation.features import Features, features_of, open_cache
from vitrail.evaluation.knn import knn_predict, neighbours
from vitrail.evaluation.linear import TOLERANCE, fit_logistic, fit_ridge
from vitrail.evaluation.pca import principal_axes
from vitrail.evaluation.split_choice import split_rule, training_splits
from vitrail.models.variants import is_variant
from vitrail.weights.model_file import ModelHeader, save_model, versions
from vitrail.weights.resolve import model_file_of


@dataclass(frozen=True)
class ProbeData:
    """What a probe fits to and evaluates on.

    Attributes:
        config: how the dataset is read and split, as it can be made again.
        keys: [N] what each image is known by in the caches.
        evaluated: the split that the classifiers are evaluated on; they are fitted to `train`.
    """

    dataset: Dataset
    scan: Scan
    splits: Splits
    config: DataConfig
    keys: np.ndarray
    evaluated: str


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
        data: how to read and to split the dataset.
        image_size: side of the square that images are brought to, unless the model's own.
        save: write a model file here whose head is the logistic regression.
        fresh: compute the features also where they are in the cache.

    Returns:
        The metrics as `vitrail probe --out` writes them.

    Raises:
        ValueError: the model or the dataset cannot be read, or it cannot be split into images to fit and to evaluate.
    """
    stopwatch = Stopwatch()
    classifier = load_frozen(model, console).to(device).at(image_size=image_size)
    if save is not None:
        check_save(save, model)
    classifier = classifier.tuned(measuring=True)
    stopwatch.lap("model")
    config = dataclasses.replace(data or DataConfig(), source=source)
    probed = open_probe_data(model, classifier, config, console, fresh=fresh)
    stopwatch.lap("data")
    cache = open_cache(classifier, probed.dataset, device)
    features, reader = compute_features(classifier, probed, device, cache, console, fresh=fresh)
    stopwatch.lap("features")
    train, rest = (
        torch.from_numpy(np.isin(features.indices, probed.splits.indices[split]))
        for split in ("train", probed.evaluated)
    )
    values, targets = torch.from_numpy(features.values), torch.from_numpy(probed.dataset.targets[features.indices])
    metrics, weight, bias = fit_classifiers(
        values[train], targets[train], values[rest], targets[rest], len(probed.dataset.labels), stopwatch
    )
    if save is not None:
        write_model(save, classifier, probed, weight, bias, {"top1": metrics["logistic"]})
    counts = {"num_train": int(train.sum()), "num_images": int(rest.sum())}
    left_out = {"num_left_out": int((~probed.scan.good).sum()) + len(reader.dropped)}
    return {
        **metrics,
        "seconds": stopwatch.total,
        "seconds_each": stopwatch.laps,
        **counts,
        **left_out,
        **describe_features(features, cache),
        **describe_data(probed),
        "source": source,
        "model": model,
        "image_size": classifier.preprocess.image_size,
    }


def open_probe_data(
    model: str, classifier: Classifier, config: DataConfig, console: Console, *, fresh: bool
) -> ProbeData:
    """List, scan and split a dataset for a probe.

    The split is that of the model's training where the dataset is that one; else the dataset's own; else a stratified one.

    Args:
        fresh: decode also the images that an earlier scan has found whole and that have not changed since.

    Raises:
        ValueError: a class has no images, a file is broken and was to be reported, or the split leaves nothing to evaluate.
    """
    dataset = list_dataset(config, console)
    stop_on_errors(dataset.problems)
    if classifier.header.split.get("source") == dataset.name:
        near_duplicates = bool(classifier.header.split.get("near_duplicates", True))
        config = dataclasses.replace(config, near_duplicates=near_duplicates)
    scan = scan_or_stop(dataset, config, console, channels=classifier.preprocess.channels, fresh=fresh)
    remedy = "restore the files, or probe with the run as it was then"
    splits = training_splits(model, classifier, dataset, config, scan.good, scan.groups, remedy=remedy)
    if splits is not None:
        config = dataclasses.replace(config, **split_rule(classifier))
    else:
        if dataset.split is not None and set(dataset.split) & {"val", "test"}:
            # The images that would be held out for choices are not needed: nothing here chooses by them.
            config = dataclasses.replace(config, val_fraction=0.0, test_fraction=0.0)
        splits = split_dataset(dataset, config, scan.good, scan.groups)
    evaluated = "test" if "test" in splits.indices else "val"
    for problem in check_trainable(dataset, splits, evaluated=evaluated):
        console.warn(problem.message)
    keys = scan.keys
    if keys is None:
        keys = image_keys(dataset, np.arange(len(dataset.paths)), classifier.preprocess.mode, config.workers)
    return ProbeData(dataset, scan, splits, config, keys, evaluated)


def compute_features(
    classifier: Classifier, probed: ProbeData, device: torch.device, cache: RowCache, console: Console, *, fresh: bool
) -> tuple[Features, ImageReader]:
    """Return the features of the images to fit to and to evaluate on, and the reader, which knows the files that failed."""
    wanted = np.concatenate([probed.splits.indices["train"], probed.splits.indices[probed.evaluated]])
    dataset = probed.dataset
    reader = build_eval_reader(dataset, dataset.targets, probed.scan, wanted, classifier.preprocess, probed.config)
    with console.bar(f"features of {len(wanted):,} images") as advance:
        features = features_of(
            classifier,
            reader,
            wanted,
            device=device,
            cache=cache,
            keys=probed.keys[wanted],
            fresh=fresh,
            advance=advance,
        )
    report_features(features, reader, console)
    return features, reader


def describe_features(features: Features, cache: RowCache) -> dict[str, Any]:
    """Return how many features there are, where they are cached and how much they take."""
    return {
        "num_features": features.values.shape[1],
        "from_cache": features.from_cache,
        "computed": len(features.indices) - features.from_cache,
        "cache": str(cache.folder),
        "cache_bytes": cache.num_bytes,
    }


def describe_data(probed: ProbeData) -> dict[str, Any]:
    """Return what was evaluated on."""
    return {
        "labels": list(probed.dataset.labels),
        "split": probed.evaluated,
        "fingerprint": probed.splits.fingerprint,
        "rule": probed.splits.rule,
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

    A variant's random weights are always the same ones, so that figures can be repeated and features cached.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = load(model)
    report_weights(classifier, console)
    if not Path(model).exists() and is_variant(model):
        console.warn(f"{model}: random weights; the figures say what features are worth before any training")
    model_without_head = copy.copy(classifier.model)  # the same weights; a classifier does not change
    model_without_head._modules = {**model_without_head._modules, "head": nn.Identity()}
    return dataclasses.replace(classifier, model=model_without_head)


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


def report_features(found: Features, reader: ImageReader, console: Console) -> None:
    """Warn of files that failed and of a cache that could not be written."""
    if reader.dropped:
        console.warn(f"{len(reader.dropped)} files failed and are not counted: {', '.join(list(reader.dropped)[:5])}")
    if found.problem:
        console.warn(f"the features could not be cached, and will be computed again next time: {found.problem}")


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
    weight, bias = spectrum.to_linear_layer(ridge.weight, ridge.bias)
    figures["ridge"] = share_correct(linear_classes(asked, weight, bias), answers)
    stopwatch.lap("ridge")
    logistic = fit_logistic(known, truth, spectrum, ridge)
    weight, bias = spectrum.to_linear_layer(logistic.weight, logistic.bias)
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


def write_model(
    path: Path,
    classifier: Classifier,
    probed: ProbeData,
    weight: Tensor,
    bias: Tensor,
    metrics: dict[str, float],
) -> None:
    """Write a model file: the frozen weights, a linear head, the labels of the data, and how it was split."""
    weights = {**classifier.model.state_dict(), "head.weight": weight, "head.bias": bias}
    labels = probed.dataset.labels
    architecture = dataclasses.replace(classifier.model.config, num_classes=len(labels))
    rule = ("val_fraction", "test_fraction", "split_seed", "folds", "fold", "near_duplicates")
    split = {name: getattr(probed.config, name) for name in rule}
    split |= {"fingerprint": probed.splits.fingerprint, "source": probed.dataset.name}
    header = ModelHeader(architecture, labels, classifier.preprocess, split=split, metrics=metrics, versions=versions())
    save_model(path, weights, header)
