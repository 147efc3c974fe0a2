"""What `vitrail probe` costs beside the forward pass that it cannot do without, and scikit-learn on the same features.

    python benchmarks/probe.py ti16 path/to/photos [--rounds 5]

In each round, one after the other: the forward pass over all images it uses, decoded and in memory; ridge and logistic regression on its
features; a whole probe with nothing kept (`--fresh`); the same probe again as a new process, start included. Then
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
    """Let forward pass, linear probes and whole probes take turns, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["VITRAIL_CACHE"] = tempfile.mkdtemp()
    device, quiet = torch.device("cpu"), Console(quiet=True)
    classifier = load_frozen(args.model, quiet)
    classifier = classifier.tuned(measuring=True)
    source, scan, data, _ = scan_cached(classifier, DataConfig(source=args.data), quiet, fresh=True)
    parts, _ = split_for_probe(args.model, classifier, source, scan, data)
    train, judged = parts.indices["train"], parts.indices["test" if "test" in parts.indices else "val"]
    wanted = np.concatenate([train, judged])
    images = ImageReader(source, source.targets, classifier.preprocess, None)
    ready = np.stack([images.read_whole(int(index)) for index in wanted])
    memory = ImageReader(source, source.targets[wanted], classifier.preprocess, ready, is_ready=True)
    out = predict_logits(classifier.model, memory, np.arange(len(wanted)), device=device)
    values, targets = torch.from_numpy(out.logits), torch.from_numpy(out.targets)
    known, truth, asked, answers = (
        values[: len(train)],
        targets[: len(train)],
        values[len(train) :],
        targets[len(train) :],
    )
    fitted: dict[str, Any] = {}

    def linear_probes() -> None:
        spectrum = principal_axes(known, truth, len(source.labels))
        ridge = fit_ridge(known, truth, spectrum)
        logistic = fit_logistic(known, truth, spectrum, ridge)
        weight, bias = spectrum.fold(logistic.weight, logistic.bias)
        fitted.update(
            spectrum=spectrum, logistic=logistic, top1=share_correct(linear_classes(asked, weight, bias), answers)
        )

    ways: dict[str, Callable[[], Any]] = {
        "forward pass": lambda: predict_logits(classifier.model, memory, np.arange(len(wanted)), device=device),
        "ridge + logistic": linear_probes,
        "whole probe, nothing kept": lambda: probe(args.model, args.data, device=device, console=quiet, fresh=True),
        "whole probe again, new process": lambda: subprocess.run(
            [sys.executable, "-m", "vitrail", "probe", args.model, args.data], check=True, capture_output=True
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            taken[name].append(seconds(way))
    print(
        f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {args.model}, {source.name}"
    )
    print(
        f"{len(train):,} images to fit, {len(judged):,} to evaluate, {values.shape[1]} features, {len(source.labels)} classes"
    )
    for name, values_s in taken.items():
        shares = [100 * ours / forward for ours, forward in zip(values_s, taken["forward pass"], strict=True)]
        print(
            f"{name:<31}{spread(values_s, '.2f')} s, {spread(shares, '.2f')} % of the forward pass, n = {args.rounds}"
        )
    spectrum, logistic = fitted["spectrum"], fitted["logistic"]
    inputs, others = spectrum.standardise(known).numpy(), spectrum.standardise(asked).numpy()
    print(f"ours, α = {logistic.penalty:.2e}: {fitted['top1']:.4f}, {logistic.steps} steps")
    same = 1 / (logistic.penalty * len(train))
    with get_context("spawn").Pool(1) as alone:  # where PyTorch's threads have never run, and take no core from it
        for title, strength, steps in (("same penalty", same, 2000), ("its defaults", 1.0, 100)):
            rows = (inputs, truth.numpy(), others, answers.numpy())
            print(f"scikit-learn, {title}: {alone.apply(peer, (strength, steps, *rows, args.rounds))}", flush=True)


def peer(strength: float, steps: int, inputs, truth, others, answers, rounds: int) -> str:
    """Time scikit-learn on the same features; returns its accuracy, steps and seconds."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged: its number of steps says so
        taken = [seconds(lambda: model.fit(inputs, truth)) for _ in range(rounds)]
    accuracy = float((model.predict(others) == answers).mean())
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
