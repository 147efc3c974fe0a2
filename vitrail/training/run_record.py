"""What a run says of itself: in `run.json` how it was asked for and what was chosen, in its model file what its weights are."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vitrail.config import RunConfig
from vitrail.data.images.preprocess import preprocess_from_config
from vitrail.data.loading.class_weights import loss_weights, mean_weights
from vitrail.data.setup import CheckedData, TrainData
from vitrail.machine import processor_name
from vitrail.models.config import ViTConfig
from vitrail.models.cost import num_parameters
from vitrail.recipes import Choice
from vitrail.training.session import Session
from vitrail.weights.model_file import ModelHeader, versions


def describe_run(session: Session, checked: CheckedData, choices: Iterable[Choice]) -> dict[str, Any]:
    """Return what `run.json` says of a run from its start on."""
    config, data = session.config, session.data
    train = data.splits.indices["train"]
    weights = loss_weights(data.dataset, train, config.optim)
    return {
        "command": command(),
        "counts": {split: len(indices) for split, indices in checked.splits.indices.items()},
        "labels": list(checked.dataset.labels),
        "choices": [
            {"setting": each.setting, "value": json_value(each.value), "reason": each.reason} for each in choices
        ],
        "problems": [problem.to_dict() for problem in checked.problems],
        "versions": versions(),
        "machine": describe_machine(str(session.device), config.precision),
        "num_parameters": num_parameters(config.model),
        **({} if weights is None else {"loss_weights": mean_weights(data.dataset, train, weights)}),
        "processes": session.world.size,
        "in_memory": data.reader.stored is not None,
    }


def command() -> str:
    """Return the command line that started this process, as it can be typed again."""
    name = Path(sys.argv[0]).name
    words = ["vitrail", *sys.argv[1:]] if name in ("vitrail", "__main__.py") else ["python", *sys.argv]
    return shlex.join(words)


def json_value(value: Any) -> Any:
    """Return a setting's value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def describe_machine(device: str, precision: str) -> dict[str, Any]:
    """Describe the machine, for the record."""
    return {
        "cpu": processor_name(),
        "cores": os.cpu_count() or 1,
        "device": device,
        "precision": precision,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def model_header(
    config: RunConfig,
    data: TrainData,
    metrics: Mapping[str, float],
    temperature: float = 1.0,
    *,
    architecture: ViTConfig | None = None,
) -> ModelHeader:
    """Return what the run's model file says of its weights.

    Args:
        architecture: of the saved model, where it is not the configuration's: one without a head has no labels.
    """
    architecture = architecture or config.model
    return ModelHeader(
        architecture=architecture,
        labels=data.dataset.labels if architecture.num_classes else (),
        preprocess=preprocess_from_config(config),
        temperature=temperature,
        split=data.split_header(config.data),
        metrics=metrics,
        versions=versions(),
    )
