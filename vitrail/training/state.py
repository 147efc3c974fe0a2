"""The exact state of a run: `last/state.safetensors`, replaced as one file.

A step's randomness comes from (seed, step) and its images from the step's number, so the objective's state, the optimizer's
moments and a few numbers are all of it: there is no generator state to keep.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vitrail.config import RunConfig
from vitrail.distributed import whole_tensors
from vitrail.objectives.base import Objective
from vitrail.optim.groups import parameter_groups
from vitrail.optim.optimizers import build_optimizer
from vitrail.tensor_files import load_tensors, save_tensors
from vitrail.training.session import Session
from vitrail.training.start import run_kernels
from vitrail.weights.adapt import Start

FORMAT = "3"  # 3: the objective's own names; 2: a classifier's model and its average


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: updates done.
        best: metrics of the best evaluation so far, with its step and epoch.
        elapsed_s: seconds of training so far, those before a resume included.
        window: figures of the steps since the last line of metrics.
    """

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0
    window: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class State:
    """What training changes: the objective with all it learns, the optimizer's moments, and where the run is."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    progress: Progress


# From the configuration, what the run starts from, and whether its weights count (they do not where saved ones follow).
BuildObjective = Callable[[RunConfig, Start, bool], Objective]


def open_state(session: Session, start: Start, build: BuildObjective) -> State:
    """Return the state that training begins with: what the run has saved, else that of the first step; collective."""
    config, run = session.config, session.run
    resumed = session.world.broadcast(run.has_state)
    objective = build(config, start, not resumed).to(session.device)
    kernels = run_kernels(session)
    for vit in objective.vits():
        vit.kernels = kernels
    layer_decay = config.optim.layer_decay
    groups = parameter_groups(objective, objective.vits(), layer_decay=layer_decay, full_rate=start.random)
    state = State(objective, build_optimizer(groups, config.optim), Progress())
    if resumed:
        load_state(run.last, state)
    elif config.pretrained:
        save_state(session, state)  # from here on the run depends on no other file
    run.forget_after(state.progress.step)
    return state


def save_state(session: Session, state: State) -> None:
    """Write everything that resuming needs, atomically; collective, and the main rank writes.

    Raises:
        OSError: it could not be written; the earlier state stays.
    """
    tensors = whole_tensors(state_tensors(state))
    if session.run.is_main:
        session.run.last.mkdir(exist_ok=True)
        metadata = {"progress": json.dumps(vars(state.progress)), "format": FORMAT}
        save_tensors(session.run.last / "state.safetensors", tensors, metadata)


def state_tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state by name: the objective's, and each parameter's moments."""
    tensors = {f"objective.{name}": tensor for name, tensor in state.objective.state_dict().items()}
    for name, parameter in state.objective.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def load_state(folder: Path, state: State) -> None:
    """Restore what `save_state` wrote.

    Raises:
        ValueError: the file is broken or is of another model.
    """
    path = folder / "state.safetensors"
    tensors, metadata = load_tensors(path)
    progress = json.loads(metadata.get("progress", "{}"))
    if metadata.get("format") == "2":
        tensors, progress = from_format_2(tensors, progress)
    elif metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: was written by another Vitrail, whose steps compute other numbers, so that the run could not go on "
            "exactly; start a new run with --recipe and its config.json"
        )
    split: dict[str, dict[str, Tensor]] = {"objective": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        split[kind][rest] = tensor
    try:
        state.objective.load_state_dict(split["objective"])
        state.progress = Progress(**progress)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not the state of this run's model: {error}") from None
    parameters = dict(state.objective.named_parameters())
    for name, tensor in split["optimizer"].items():
        key, parameter = name.split(".", 1)
        state.optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)


def from_format_2(tensors: dict[str, Tensor], progress: dict) -> tuple[dict[str, Tensor], dict]:
    """Return the state that a Vitrail wrote whose only objective was classification, under the names of today."""
    renamed = {}
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "optimizer":
            key, parameter = rest.split(".", 1)
            renamed[f"optimizer.{key}.model.{parameter}"] = tensor
        else:
            renamed[f"objective.model.{rest}" if kind == "model" else f"objective.average.model.{rest}"] = tensor
    window = {"top1" if name == "correct" else name: values for name, values in progress.get("window", {}).items()}
    return renamed, {**progress, "window": window}
