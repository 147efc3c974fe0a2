"""The exact state of a run: `last/state.safetensors`, replaced as one file.

A step's randomness comes from (seed, step) and its images from the step's number, so weights, optimizer moments and a
few numbers are all of it: there is no generator state to keep.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vitrail.models.vit import ViT
from vitrail.tensor_files import load_tensors, save_tensors
from vitrail.weights.model_file import FORMAT


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: updates done.
        best: figures of the best evaluation so far, with its step and epoch.
        elapsed_s: seconds of training so far, over all sittings.
        window: losses and counts since the last line of metrics.
    """

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0
    window: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class State:
    """What training changes: weights, their average, the optimizer's moments, and where the run is."""

    model: ViT
    average: ViT | None
    optimizer: torch.optim.Optimizer
    progress: Progress

    @property
    def evaluated_model(self) -> ViT:
        """The weights that are evaluated and kept: the average where there is one."""
        return self.model if self.average is None else self.average


def save_state(folder: Path, state: State) -> None:
    """Write everything that resuming needs, atomically.

    Raises:
        OSError: it could not be written; the earlier state stays.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in state.model.state_dict().items()}
    if state.average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in state.average.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    folder.mkdir(exist_ok=True)
    metadata = {"progress": json.dumps(vars(state.progress)), "format": str(FORMAT)}
    save_tensors(folder / "state.safetensors", tensors, metadata)


def load_state(folder: Path, state: State) -> None:
    """Restore what `save_state` wrote.

    Raises:
        ValueError: the file is broken or is of another model.
    """
    path = folder / "state.safetensors"
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != str(FORMAT):
        raise ValueError(
            f"{path}: was written by another Vitrail, whose steps compute other numbers, so that the run could not go on "
            "exactly; start a new run with --recipe and its config.json"
        )
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = tensor
    try:
        state.model.load_state_dict(parts["model"])
        if state.average is not None:
            state.average.load_state_dict(parts["average"])
        state.progress = Progress(**json.loads(metadata["progress"]))
    except (RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is not the state of this run's model: {error}") from None
    parameters = dict(state.model.named_parameters())
    for name, tensor in parts["optimizer"].items():
        key, parameter = name.split(".", 1)
        state.optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)
