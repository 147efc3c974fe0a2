"""Build the configuration of a run from a recipe, facts about the dataset, and the settings that the user gave."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vitrail.config import RunConfig, load_config
from vitrail.config_schema import at_least, leaves, override, positive
from vitrail.lookup import pick
from vitrail.models.variants import suffix_fields, variant_config
from vitrail.recipes.article import article
from vitrail.recipes.auto import auto
from vitrail.recipes.choices import Choice, Given, Recipe
from vitrail.recipes.cifar10 import cifar10
from vitrail.recipes.deit3_s16 import deit3_s16
from vitrail.recipes.digits import digits
from vitrail.recipes.facts import DatasetFacts
from vitrail.recipes.fine_tune import fine_tune
from vitrail.recipes.idle_settings import refuse_idle
from vitrail.recipes.pretrained import keep_pretrained
from vitrail.recipes.s16_in1k import s16_in1k

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader

RECIPES: dict[str, Recipe] = {
    "auto": auto,
    "fine_tune": fine_tune,
    "article": article,
    "digits": digits,
    "cifar10": cifar10,
    "s16_in1k": s16_in1k,
    "deit3_s16": deit3_s16,
}


def build_config(
    recipe: str, facts: DatasetFacts, given: Given, pretrained: ModelHeader | None = None
) -> tuple[RunConfig, list[Choice]]:
    """Return the resolved configuration of a run and the recipe's choices.

    Args:
        recipe: a recipe's name, or the path of an earlier run's config.json.
        given: the settings that the user fixed, by dotted name, `variant` and `pretrained` included.
        pretrained: header of the trained weights that the run starts from, if any.

    Raises:
        ValueError: the recipe is unknown or does not fit the weights to start from, or a setting is unknown or refused.
    """
    check_given(given)
    earlier = recipe_file(recipe)
    if earlier is None:
        base, choices = RunConfig(), recipe_choices(recipe, facts, given, pretrained)
    else:
        base, choices = override(earlier, reset_for_new_model(given)), choices_of_file(recipe, earlier, given)
    if pretrained is None:
        architecture = variant_settings(base, choices, given)
    elif earlier is None or "pretrained" in given:
        architecture, choices = keep_pretrained(choices, facts, given, pretrained)
    else:
        architecture = {}  # the file says all of it
    choices = without_given(choices, given)
    made = {choice.setting: choice.value for choice in choices}
    known = {"recipe": recipe, "model.num_classes": facts.num_classes}
    config = override(base, {**architecture, **made, **given, **known})
    if config.encoder_weights and (earlier is None or changes_encoder(given)):
        config, choices = with_encoder_normalisation(config, choices, given)
    refuse_idle(config, given)
    return config, choices


def check_given(given: Given) -> None:
    """Raise a ValueError when a number that recipes compute with is out of range, before they do."""
    for name in ("batch_size", "model.patch_size", "model.image_size"):
        at_least(name, given.get(name, 1), 1)
    for size in given.get("model.patch_sizes", ()):
        at_least("model.patch_sizes", size, 1)
    positive("epochs", given.get("epochs", 1))


def recipe_file(recipe: str) -> RunConfig | None:
    """Return the configuration of an earlier run when `recipe` is the path of one, or None when it is a recipe's name.

    Raises:
        ValueError: the file is missing or cannot be read.
    """
    if not recipe.endswith(".json") and "/" not in recipe:
        return None
    if not Path(recipe).is_file():
        raise ValueError(f"recipe {recipe}: no such file; expected a config.json of an earlier run, or a recipe's name")
    return load_config(Path(recipe))


def recipe_choices(recipe: str, facts: DatasetFacts, given: Given, pretrained: ModelHeader | None) -> list[Choice]:
    """Return the choices of a named recipe.

    Raises:
        ValueError: there is no such recipe, or it does not fit the weights that the run starts from.
    """
    return pick(RECIPES, recipe, "recipe")(facts, given, pretrained)


def choices_of_file(recipe: str, earlier: RunConfig, given: Given) -> list[Choice]:
    """Return the settings of an earlier run as choices, without those of its dataset and of a model that is replaced."""
    new_model = "variant" in given or "pretrained" in given  # then only the channels, which the images decide, stay
    replaced = {"recipe", "data.source", "model.num_classes", *reset_for_new_model(given)}
    return [
        Choice(name, value, f"from {recipe}")
        for name, value in leaves(earlier)
        if name not in replaced and not (new_model and name.startswith("model.") and name != "model.in_channels")
    ]


def reset_for_new_model(given: Given) -> dict[str, Any]:
    """Return the settings of an earlier run that belong to a model that is replaced, each switched off."""
    reset: dict[str, Any] = {}
    if "variant" in given or "pretrained" in given or "model.encoder" in given:
        reset |= {"encoder_weights": "", "optim.freeze": ()}
    if "variant" in given:
        reset |= {"pretrained": "", "optim.head_warmup": "0 steps", "lora.rank": 0}
    return reset


def variant_settings(base: RunConfig, choices: list[Choice], given: Given) -> dict[str, Any]:
    """Return the architecture of the variant: the user's, else the recipe's, as settings.

    Raises:
        ValueError: there is no such variant.
    """
    chosen = {choice.setting: choice.value for choice in choices}
    variant = given.get("variant", chosen.get("variant", base.variant))
    return {f"model.{name}": value for name, value in leaves(variant_config(str(variant)))}


def without_given(choices: list[Choice], given: Given) -> list[Choice]:
    """Return the choices that the user left open; what a variant's suffixes fix counts as given."""
    named = {f"model.{field}" for field in suffix_fields(str(given.get("variant", "")))}
    return [choice for choice in choices if choice.setting not in {*given, *named}]


def changes_encoder(given: Given) -> bool:
    """Whether the user gave another encoder, or other encoder weights, than an earlier run had."""
    return "variant" in given or "model.encoder" in given or "encoder_weights" in given


def with_encoder_normalisation(
    config: RunConfig, choices: list[Choice], given: Given
) -> tuple[RunConfig, list[Choice]]:
    """Return the configuration and choices with the mean and std that a trained encoder was trained with.

    Raises:
        ValueError: the user fixed one of mean and std, which would mix two normalisations.
    """
    from vitrail.models.cnns import normalisation

    names = ("preprocess.mean", "preprocess.std")
    if sum(name in given for name in names) == 1:
        raise ValueError("preprocess.mean and preprocess.std belong together; give both, or none for the encoder's own")
    if names[0] in given:
        return config, choices
    channels, why = config.model.in_channels, f"as {config.model.encoder}'s weights expect"
    values = [value if channels == 3 else (fmean(value),) for value in normalisation(config.model.encoder)]
    made: dict[str, Any] = dict(zip(names, values, strict=True))
    others = [choice for choice in choices if choice.setting not in made]
    return override(config, made), [*others, *(Choice(name, value, why) for name, value in made.items())]
