"""What recipes do when a run starts from trained weights: keep what these bring with them, and `auto`'s own rates.

Figures behind the choices: docs/finetuning.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vitrail.config import PreprocessConfig
from vitrail.config_schema import at_least, leaves
from vitrail.recipes import Choice, Facts, augmentation, averaging, sampling, speed

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader

# Fields of the architecture that weights say nothing of: a recipe may choose them.
FREE = ("model.dropout", "model.attention_dropout", "model.drop_path", "model.patch_dropout")


def keep_source(
    choices: list[Choice], facts: Facts, given: Mapping[str, Any], source: ModelHeader
) -> tuple[dict[str, Any], list[Choice]]:
    """Return the architecture of trained weights as settings, and a recipe's choices with theirs in place of its own."""
    theirs = {"variant", "encoder_weights"}
    kept = [
        choice
        for choice in choices
        if choice.setting not in theirs
        and not choice.setting.startswith("preprocess.")
        and (not choice.setting.startswith("model.") or choice.setting in FREE)
    ]
    settings = {f"model.{name}": value for name, value in leaves(source.architecture)}
    return {**settings, "variant": ""}, [*brought(facts, given, source), *kept]


def brought(facts: Facts, given: Mapping[str, Any], source: ModelHeader) -> list[Choice]:
    """Return what weights bring with them: image size, channels, positions, preprocessing.

    Raises:
        ValueError: the user fixed one of mean and std, which would mix two normalisations.
    """
    if ("preprocess.mean" in given) != ("preprocess.std" in given):
        raise ValueError("preprocess.mean and preprocess.std belong together; give both, or none for the weights' own")
    model, preprocess = source.architecture, source.preprocess
    size = int(given.get("model.image_size", model.image_size))
    patch = int(given.get("model.patch_size", model.patch_size))
    channels = int(given.get("model.in_channels", max(model.in_channels, facts.channels)))
    why = "as the weights were trained"
    choices = [Choice("model.image_size", size, f"{why}; --model.image_size changes it, and positions follow")]
    for field in dataclasses.fields(PreprocessConfig):
        value = getattr(preprocess, field.name)
        if isinstance(value, tuple) and len(value) != channels:  # mean and std
            value = (fmean(value),) * channels
        choices.append(Choice(f"preprocess.{field.name}", value, why))
    if channels != model.in_channels:
        seen = "colour images" if channels == 3 else "grey images"
        choices.append(Choice("model.in_channels", channels, f"{seen}; the weights saw {model.in_channels}"))
    if model.positions == "sincos2d" and size // patch != model.grid[0]:
        choices.append(
            Choice("model.positions", "learned", "another grid: the fixed table, stretched to it, may adapt")
        )
    return choices


def auto(facts: Facts, given: Mapping[str, Any], source: ModelHeader) -> list[Choice]:
    """Choose how trained weights learn new images: gently, the head first, and the less the deeper a layer lies."""
    size = int(given.get("model.image_size", source.architecture.image_size))
    adapters = int(given.get("lora.rank", 0)) > 0
    return [
        *duration(facts, given, source.architecture.embed_dim, adapters=adapters),
        *augmentation_of_few(facts),
        *sampling(facts, given, from_scratch=False),
        *speed(dataclasses.replace(facts, side=size)),
    ]


def duration(facts: Facts, given: Mapping[str, Any], width: int, *, adapters: bool) -> list[Choice]:
    """Epochs, batch, rates."""
    usual = 64 if facts.num_train < 5_000 else 128 if facts.device == "cpu" else 512
    batch = int(given.get("batch_size", min(usual, facts.num_train)))
    at_least("batch_size", batch, 1)
    seen = 20_000 if facts.num_train < 5_000 else 200_000 if facts.device == "cpu" else 1_000_000
    epochs = float(min(60, max(3, round(seen / facts.num_train))))
    lr = 2e-3 * math.sqrt(batch / 128) * (128 / width) * (3 if adapters else 1)
    steps = float(given.get("epochs", epochs)) * facts.num_train / batch
    choices = [
        Choice("batch_size", batch, "small sets want more steps" if batch <= 64 else "keeps the device busy"),
        Choice("epochs", epochs, f"{facts.num_train:,} images, about {epochs * facts.num_train:,.0f} seen in all"),
        Choice("optim.lr", float(f"{lr:.1e}"), f"for width {width} and batch {batch}"),
        Choice("optim.layer_decay", 1.0, "adapters start at nothing in every layer")
        if adapters
        else Choice("optim.layer_decay", 0.75, "first layers see what all images have, and change the least"),
        Choice("optim.head_warmup", "5 %", "a new head's first gradients would disturb what the weights know"),
        Choice("schedule.warmup", "10 %", "the rate is still rising when all begin to learn"),
        Choice("optim.weight_decay", 0.05, "the usual for ViTs"),
        Choice("optim.ema_decay", averaging(steps), "evaluate the average of about the last 2 % of steps"),
        Choice("optim.label_smoothing", 0.1, "keeps a net that can learn its images by heart from being too sure"),
        Choice("model.drop_path", 0.1, "stochastic depth, against learning by heart"),
    ]
    if float(given.get("epochs", epochs)) > 100:
        choices.append(Choice("log.eval_every", "1 %", "a hundred evaluations are enough"))
    return choices


def augmentation_of_few(facts: Facts) -> list[Choice]:
    """Milder random changes than from scratch: the weights have seen how images vary."""
    if facts.flip_reason:
        return augmentation(facts)
    return [
        Choice("augment.flip", 0.5, "things look alike in a mirror; no class name speaks against it"),
        Choice("augment.crop_scale", 0.5, "random resized crops, milder than from scratch"),
    ]
