"""The article's claim on CIFAR-10: encoders × decoders, the same minutes of training for each, several seeds.

python benchmarks/encoders.py path/to/cifar10 --seconds 120 --seeds 3

Every run has one core and the same seconds of training; as many run at a time as there are cores. First the training
speed of each architecture is measured alone, all in turn and several times, and its number of epochs follows from the
fastest round. The trainings themselves then do not depend on the clock. Everything else is what `vitrail train` chooses.
The test split is evaluated once per run, with the last weights (averaged, as by default); no split chooses an epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vitrail.config import DataConfig, RunConfig
from vitrail.console import Console
from vitrail.data.loading.train_loader import Batch
from vitrail.data.setup import CheckedData, build_train_data, load_data
from vitrail.distributed import World
from vitrail.evaluation.metrics import headline_metrics
from vitrail.evaluation.predict_logits import predict_logits
from vitrail.machine import processor_name
from vitrail.models.cost import num_macs, num_parameters
from vitrail.objectives.classification import Classification
from vitrail.recipes import build_config
from vitrail.recipes.facts import facts_of
from vitrail.training.loop import start_state, update
from vitrail.training.loop import train_steps as train_loop
from vitrail.training.run_folder import create_run, open_run
from vitrail.weights.adapt import Start
from vitrail.weights.model_file import load_model, versions

CHECKED: CheckedData  # of a worker process, from `prepare`


def main() -> None:
    """Measure speeds, train all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--size", default="micro4")
    parser.add_argument("--encoders", nargs="+", default=["patch", "conv", "resnet18", "efficientnet_b0"])
    parser.add_argument("--decoders", nargs="+", default=["token", "mean", "concat"])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--set", action="append", default=[], metavar="SETTING=VALUE", help="VALUE in JSON, or plain text"
    )
    args = parser.parse_args()
    settings = dict(read_setting(text) for text in args.set)
    print(f"{processor_name()}; {versions()}", flush=True)
    checked = open_data(args.data)
    names = [f"{args.size}-{encoder}-{decoder}" for encoder in args.encoders for decoder in args.decoders]
    speeds = measure(checked, names, settings)
    top1s: dict[str, list[float]] = {name: [] for name in names}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context, initializer=prepare, initargs=(args.data,)) as pool:
        jobs = []
        for seed in range(args.seeds):
            for name in names:
                epochs = round(speeds[name] * args.seconds / len(checked.splits.indices["train"]), 3)
                given = {**settings, "epochs": epochs, "seed": seed, "log.eval_every": "100 %"}
                jobs.append((seed, name, epochs, pool.submit(train_and_test, name, given)))
        for seed, name, epochs, job in jobs:
            top1, seconds = job.result()
            top1s[name].append(top1)
            print(f"seed {seed} {name}: {epochs} epochs, test top-1 {top1:.4f}, {seconds:.0f} s", flush=True)
    print("| encoder | decoder | parameters | MMACs | images/s | top-1, mean (min to max) |\n|---|---|---|---|---|---|")
    for name, values in top1s.items():
        model = config_of(checked, name, {}).model
        size = f"{num_parameters(model) / 1e6:.2f} M | {num_macs(model) / 1e6:.0f}"
        spread = f"{statistics.mean(values):.2%} ({min(values):.2%} to {max(values):.2%})"
        print(f"| {model.encoder} | {model.decoder} | {size} | {speeds[name]:.0f} | {spread} |")


def read_setting(text: str) -> tuple[str, Any]:
    """Return the setting and the value of `name=value`; the value is JSON, or plain text."""
    name, value = text.split("=", 1)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def open_data(source: str) -> CheckedData:
    """Return the dataset with a small validation split: the loop evaluates on it once, and nothing is chosen by it."""
    torch.set_num_threads(1)
    checked = load_data(DataConfig(source=source), Console(quiet=True))
    splits = {split: indices[:500] if split == "val" else indices for split, indices in checked.splits.indices.items()}
    return dataclasses.replace(checked, splits=dataclasses.replace(checked.splits, indices=splits))


def prepare(source: str) -> None:
    """Open the dataset, once per worker process."""
    global CHECKED
    CHECKED = open_data(source)


def config_of(checked: CheckedData, name: str, settings: dict[str, Any]) -> RunConfig:
    """Return what `vitrail train --model NAME` would train."""
    given = {**settings, "variant": name, "data.source": checked.dataset.name}
    return build_config("auto", facts_of(checked, "cpu"), given)[0]


def measure(checked: CheckedData, names: list[str], settings: dict[str, Any], rounds: int = 5) -> dict[str, float]:
    """Return images/s of the training step of each architecture, the fastest of rounds in which all take turns."""
    measured: dict[str, list[float]] = {name: [] for name in names}
    device = torch.device("cpu")
    for _ in range(rounds):
        for name in names:
            config = config_of(checked, name, settings)
            state, size, model = start_state(config, device, fresh=True), config.batch_size, config.model
            objective = Classification(state.model, label_smoothing=config.optim.label_smoothing)
            images = torch.randn(size, model.in_channels, model.image_size, model.image_size)
            batch = Batch(images, torch.randint(model.num_classes, (size,)), torch.arange(size).numpy())
            update(objective, state, batch, config, device)
            started = time.perf_counter()
            for _ in range(steps := 3):
                update(objective, state, batch, config, device)
            measured[name].append(steps * size / (time.perf_counter() - started))
    for name, values in measured.items():
        print(f"{name}: {max(values):.0f} images/s (median {statistics.median(values):.0f})", flush=True)
    return {name: max(values) for name, values in measured.items()}


def train_and_test(name: str, settings: dict[str, Any]) -> tuple[float, float]:
    """Train one architecture in a worker process; returns its top-1 on the test split and the seconds of training."""
    checked = CHECKED
    config = config_of(checked, name, settings)
    data, console, world = build_train_data(checked, config), Console(quiet=True), World()
    with tempfile.TemporaryDirectory() as folder:
        create_run(Path(folder) / "run", config, lambda path: None, labels=list(checked.dataset.labels))
        run, _ = open_run(Path(folder) / "run")
        progress = train_loop(config, data, run, world, console, Start())
        model, _ = load_model(run.model)
    return headline_metrics(
        predict_logits(model, data.reader, checked.splits.indices["test"], device=torch.device("cpu"))
    )["top1"], progress.elapsed_s


if __name__ == "__main__":
    main()
