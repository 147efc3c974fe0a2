"""What `vitrail probe` costs beyond the forward pass that it needs anyway, and scikit-learn on the same features.

    python benchmarks/probe.py ti16 path/to/photos [--rounds 5]

In each round, one after the other: the forward pass over all images it uses, decoded and in memory; ridge and logistic regression on its
features; a whole probe with nothing cached (`--fresh`); the same probe again as a new process, start included. Then
scikit-learn's LogisticRegression with the same penalty, and with its own defaults, on the same standardised features.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from vitrail.config import DataConfig
from vitrail.console import Console
from vitrail.data.loading.reader import ImageReader
from vitrail.evaluation.linear import fit_logistic, fit_ridge
from vitrail.evaluation.pca import principal_axes
from vitrail.evaluation.predict_logits import predict_logits
from vitrail.evaluation.probe import linear_classes, load_frozen, probe, scan_cached, share_correct, split_for_probe
from vitrail.machine import processor_name


def main() -> None:
    """Time forward pass, linear probes and whole probes in turn, round by round, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["VITRAIL_CACHE"] = tempfile.mkdtemp()
    device, quiet = torch.device("cpu"), Console(quiet=True)
    classifier = load_frozen(args.model, quiet)
    classifier = classifier.tuned(measuring=True)
    dataset, scan, data, _ = scan_cached(classifier, DataConfig(source=args.data), quiet, fresh=True)
    splits, _ = split_for_probe(args.model, classifier, dataset, scan, data)
    train, evaluated = splits.indices["train"], splits.indices["test" if "test" in splits.indices else "val"]
    wanted = np.concatenate([train, evaluated])
    from_files = ImageReader(dataset, dataset.targets, classifier.preprocess, None)
    ready = np.stack([from_files.read_whole(int(index)) for index in wanted])
    in_memory = ImageReader(dataset, dataset.targets[wanted], classifier.preprocess, ready, is_ready=True)
    out = predict_logits(classifier.model, in_memory, np.arange(len(wanted)), device=device)
    features, targets = torch.from_numpy(out.logits), torch.from_numpy(out.targets)
    train_features, test_features = features[: len(train)], features[len(train) :]
    train_targets, test_targets = targets[: len(train)], targets[len(train) :]
    fitted: dict[str, Any] = {}

    def linear_probes() -> None:
        axes = principal_axes(train_features, train_targets, len(dataset.labels))
        ridge = fit_ridge(train_features, train_targets, axes)
        logistic = fit_logistic(train_features, train_targets, axes, ridge)
        weight, bias = axes.to_linear_layer(logistic.weight, logistic.bias)
        fitted.update(
            axes=axes, logistic=logistic, top1=share_correct(linear_classes(test_features, weight, bias), test_targets)
        )

    ways: dict[str, Callable[[], Any]] = {
        "forward pass": lambda: predict_logits(classifier.model, in_memory, np.arange(len(wanted)), device=device),
        "ridge + logistic": linear_probes,
        "whole probe, nothing cached": lambda: probe(args.model, args.data, device=device, console=quiet, fresh=True),
        "whole probe again, new process": lambda: subprocess.run(
            [sys.executable, "-m", "vitrail", "probe", args.model, args.data], check=True, capture_output=True
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            taken[name].append(seconds(way))
    print(
        f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.model}, {dataset.name}"
    )
    print(
        f"{len(train):,} images to fit, {len(evaluated):,} to evaluate, {features.shape[1]} features, {len(dataset.labels)} classes"
    )
    for name, values_s in taken.items():
        shares = [100 * ours / forward for ours, forward in zip(values_s, taken["forward pass"], strict=True)]
        print(
            f"{name:<31}{spread(values_s, '.2f')} s, {spread(shares, '.2f')} % of the forward pass, n = {args.rounds}"
        )
    axes, logistic = fitted["axes"], fitted["logistic"]
    train_inputs, test_inputs = axes.standardise(train_features).numpy(), axes.standardise(test_features).numpy()
    print(f"ours, α = {logistic.penalty:.2e}: {fitted['top1']:.4f}, {logistic.steps} steps")
    same = 1 / (logistic.penalty * len(train))
    with get_context("spawn").Pool(1) as pool:  # a process in which PyTorch's threads never ran, to take no core
        for title, strength, steps in (("same penalty", same, 2000), ("its defaults", 1.0, 100)):
            rows = (train_inputs, train_targets.numpy(), test_inputs, test_targets.numpy())
            print(f"scikit-learn, {title}: {pool.apply(peer, (strength, steps, *rows, args.rounds))}", flush=True)


def peer(strength: float, steps: int, train_inputs, train_targets, test_inputs, test_targets, rounds: int) -> str:
    """Time scikit-learn on the same features; returns its accuracy, steps and seconds."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged: its number of steps says so
        taken = [seconds(lambda: model.fit(train_inputs, train_targets)) for _ in range(rounds)]
    accuracy = float((model.predict(test_inputs) == test_targets).mean())
    return f"{accuracy:.4f}, {model.n_iter_.max()} steps, {spread(taken, '.2f')} s, n = {rounds}"


def seconds(way: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def spread(values: list[float], form: str) -> str:
    """Return median (minimum to maximum)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
