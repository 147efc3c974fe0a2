"""The settings that trained weights bring along, whatever the recipe: their architecture and their preprocessing."""

from __future__ import annotations

import dataclasses
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vitrail.config import PreprocessConfig
from vitrail.config_schema import leaves
from vitrail.recipes.choices import Choice, Given
from vitrail.recipes.facts import DatasetFacts

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader

# Fields of the architecture that do not depend on the weights: a recipe may choose them.
FREE = ("model.dropout", "model.attention_dropout", "model.drop_path", "model.patch_dropout")


def keep_pretrained(
    choices: list[Choice], facts: DatasetFacts, given: Given, pretrained: ModelHeader
) -> tuple[dict[str, Any], list[Choice]]:
    """Return the architecture of trained weights as settings, and a recipe's choices, replaced where the weights decide."""
    others = [choice for choice in choices if not is_of_weights(choice.setting)]
    architecture = {f"model.{name}": value for name, value in leaves(pretrained.architecture)}
    return {**architecture, "variant": ""}, [*pretrained_choices(facts, given, pretrained), *others]


def is_of_weights(setting: str) -> bool:
    """Whether trained weights decide a setting: those of the architecture and of the preprocessing."""
    if setting.startswith("model."):
        return setting not in FREE
    return setting.startswith("preprocess.") or setting in ("variant", "encoder_weights")


def pretrained_choices(facts: DatasetFacts, given: Given, pretrained: ModelHeader) -> list[Choice]:
    """Return the choices that trained weights decide: image size, preprocessing, channels, positions.

    Raises:
        ValueError: the user fixed one of mean and std, which would mix two normalisations.
    """
    if ("preprocess.mean" in given) != ("preprocess.std" in given):
        raise ValueError("preprocess.mean and preprocess.std belong together; give both, or none for the weights' own")
    model, why = pretrained.architecture, "as the weights were trained"
    size = int(given.get("model.image_size", model.image_size))
    patch = int(given.get("model.patch_size", model.patch_size))
    channels = int(given.get("model.in_channels", max(model.in_channels, facts.channels)))
    choices = [Choice("model.image_size", size, f"{why}; --model.image_size changes it, and positions follow")]
    choices += preprocessing_choices(pretrained, channels, why)
    if channels != model.in_channels:
        seen = "colour images" if channels == 3 else "grey images"
        choices.append(Choice("model.in_channels", channels, f"{seen}; the weights saw {model.in_channels}"))
    if model.positions == "sincos2d" and size // patch != model.grid[0]:
        choices.append(
            Choice("model.positions", "learned", "another grid: the fixed table, stretched to it, may adapt")
        )
    return choices


def preprocessing_choices(pretrained: ModelHeader, channels: int, reason: str) -> list[Choice]:
    """Return the preprocessing of trained weights; mean and std are averaged for another number of channels."""
    choices = []
    for field in dataclasses.fields(PreprocessConfig):
        value = getattr(pretrained.preprocess, field.name)
        if isinstance(value, tuple) and len(value) != channels:  # mean and std
            value = (fmean(value),) * channels
        choices.append(Choice(f"preprocess.{field.name}", value, reason))
    return choices
