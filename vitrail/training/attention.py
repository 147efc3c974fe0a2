"""Which attention kernels a run uses: measured at its start, written down, and kept to when it goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vitrail.config import RunConfig
from vitrail.evaluation.classifier import Classifier
from vitrail.kernels.choose import cache_file, choose
from vitrail.kernels.table import Case, Kernels
from vitrail.kernels.window import covers
from vitrail.models.blocks import num_kept
from vitrail.models.config import ViTConfig
from vitrail.training.parallel import World
from vitrail.training.run import Run


def run_kernels(config: RunConfig, device: torch.device, run: Run, world: World) -> Kernels:
    """Return the kernels of a run: those it began with, else measured now and noted in `run.json`.

    All processes use what the main one found.

    Raises:
        ValueError: a kernel that the configuration or the run names cannot compute this model here.
    """
    kernels = Kernels()
    if run.is_main:
        known = run.info().get("kernels")
        kernels = choose_kernels(config, device, known=known)
        if dict(kernels.chosen) != known:
            run.note(kernels=dict(kernels.chosen))
    return world.from_main(kernels)


def choose_kernels(config: RunConfig, device: torch.device, *, known: Any = None, measuring: bool = True) -> Kernels:
    """Return the kernels for a configuration on a device, those in `known` as they are.

    Raises:
        ValueError: a kernel that the configuration names cannot compute this model here.
    """
    return choose(
        cases_of_run(config, device.type),
        cache=cache_file(),
        known=known,
        global_attention=config.kernels.global_attention,
        local_attention=config.kernels.local_attention,
        measuring=measuring,
    )


def cases_of_run(config: RunConfig, device: str) -> list[Case]:
    """Return what a training computes: its steps in its precision, its judgement in fp32."""
    model, side = config.model, config.model.image_size
    patches = model.patch_sizes or (model.patch_size,)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.precision]
    training = [case for patch in patches for case in cases_of(model, (side, patch), device, dtype, training=True)]
    return [*training, *cases_of(model, (side, model.patch_size), device, "float32", training=False)]


def cases_of(model: ViTConfig, sides: tuple[int, int], device: str, dtype: str, *, training: bool) -> Iterable[Case]:
    """Return the attention that a model computes on square pictures.

    Args:
        sides: of the picture and of a patch, pixels.
    """
    side = -(-sides[0] // sides[1])
    grid, patches = (side, side), side * side
    if training:
        patches = num_kept(patches, model.patch_dropout)
    tokens, width = model.num_prefix + patches, model.head_width
    for name in sorted(set(model.attentions)):
        case = Case(device, dtype, training, training and model.attention_dropout > 0, tokens, width)
        if name == "local" and not covers(grid, model.window):
            case = case._replace(grid=grid, window=model.window)
        yield case


def remark_on_window(model: ViTConfig) -> str:
    """Return what a user should know of a window that is too large to be one; empty: nothing."""
    if "local" not in model.attentions or not covers(model.grid, model.window):
        return ""
    return (
        f"window {model.window} covers the whole grid of {model.grid[0]}×{model.grid[1]} patches: local attention is global "
        f"attention at {model.image_size} px"
    )


def tune(classifier: Classifier, *, measuring: bool) -> None:
    """Give a classifier's model the kernels that are fastest for its picture size on its device.

    Args:
        measuring: measure what is not known of this machine yet; if not, only what is known counts.
    """
    own = classifier.model.config
    sides = (classifier.preprocess.image_size, classifier.patch_size or own.patch_size)
    device = next(classifier.model.parameters()).device.type
    cases = cases_of(own, sides, device, "float32", training=False)
    classifier.model.kernels = choose(cases, cache=cache_file(), measuring=measuring)
