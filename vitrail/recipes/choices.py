"""The `Choice` of a setting with its reason, and the choices that several recipes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vitrail.config import UNEVEN
from vitrail.config_schema import at_least
from vitrail.models.variants import suffix_fields
from vitrail.recipes.facts import DatasetFacts

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader

FEW = 5_000  # training images: below this a dataset counts as small


@dataclass(frozen=True)
class Choice:
    """The value that a recipe gives to one setting, and why."""

    setting: str
    value: Any
    reason: str


# The settings that the user fixed, by dotted name, `variant` and `pretrained` included.
Given = Mapping[str, Any]
# (facts, given, header of the trained weights that the run starts from, or None) → choices.
Recipe = Callable[[DatasetFacts, Given, "ModelHeader | None"], list[Choice]]


def refuse_weights(recipe: str, pretrained: ModelHeader | None) -> None:
    """Raise a ValueError when there are trained weights to start from: this recipe trains from scratch."""
    if pretrained is not None:
        raise ValueError(
            f"recipe {recipe!r} trains from scratch, but --model names trained weights; use --recipe fine_tune with "
            "them, or a variant's name as --model, or none"
        )


def by_scale(facts: DatasetFacts, *, few: int, cpu: int, gpu: int) -> int:
    """Return `few` for a small dataset, else the number for the device."""
    return few if facts.num_train < FEW else cpu if facts.device == "cpu" else gpu


def batch_and_epochs(
    facts: DatasetFacts, known: Given, *, seen: int, least: int, most: int
) -> tuple[list[Choice], int, float]:
    """Return the choices of batch size and epochs, and the two values that the run will have, the user's if given.

    Args:
        seen: number of training images to show in all, repeats included.
        least: smallest number of epochs.
        most: largest number of epochs.
    """
    usual = by_scale(facts, few=64, cpu=128, gpu=512)
    batch = int(known.get("batch_size", min(usual, facts.num_train)))  # a larger one would hold images twice
    at_least("batch_size", batch, 1)
    epochs = float(min(most, max(least, round(seen / facts.num_train))))
    choices = [
        Choice("batch_size", batch, "small datasets want more steps" if batch <= 64 else "keeps the device busy"),
        Choice("epochs", epochs, f"{facts.num_train:,} images, about {epochs * facts.num_train:,.0f} seen in all"),
    ]
    return choices, batch, float(known.get("epochs", epochs))


def regularisation(steps: float, epochs: float) -> list[Choice]:
    """Choose what keeps a small network from learning its images by heart, and how often it is evaluated."""
    choices = [
        Choice(
            "optim.ema_decay",
            ema_decay(steps),
            "the average of about the last 2 % of steps is evaluated: it generalises better",
        ),
        Choice("optim.label_smoothing", 0.1, "keeps a network that can learn its images by heart from being too sure"),
        Choice("model.drop_path", 0.1, "stochastic depth, against learning by heart"),
    ]
    if epochs > 100:
        choices.append(Choice("log.eval_every", "1 %", "a hundred evaluations are enough"))
    return choices


def ema_decay(steps: float) -> float:
    """Return the decay of a moving average over about the last 2 % of a run's steps."""
    return round(min(0.9998, max(0.5, 1 - 50 / steps)), 4)


def sampling(facts: DatasetFacts, given: Given, *, from_scratch: bool) -> list[Choice]:
    """Choose to show rare classes more often where classes are uneven, unless the user corrects that in the loss.

    From trained weights sampling stays natural, since nothing was measured there, and the reason says so.
    """
    smallest, largest = facts.class_sizes
    if largest < UNEVEN * smallest or given.get("optim.class_weights", "none") != "none":
        return []
    uneven = f"classes have {smallest:,} to {largest:,} images"
    if not from_scratch:
        why = "left as they are, since nothing was measured from trained weights; sqrt shows rare ones more often"
        return [Choice("data.sampling", "natural", f"{uneven}, {why}")]
    why = "rare ones come more often; where it was measured, more of them were found, at about the same accuracy"
    return [Choice("data.sampling", "sqrt", f"{uneven}: {why}")]


def speed(facts: DatasetFacts) -> list[Choice]:
    """Choose number format and compilation by what pays on this machine."""
    if facts.device == "cuda":
        choices = [Choice("compile", True, "compiled training is faster on a GPU; the first steps take a minute")]
        if facts.bf16:
            choices.append(Choice("precision", "bf16", "this GPU computes bfloat16 several times faster"))
        return choices
    if facts.bf16 and facts.side > 16:
        return [Choice("precision", "bf16", "this CPU has bfloat16 instructions: nearly twice as fast as fp32")]
    reason = "too little work an image for bfloat16 to pay" if facts.bf16 else "this CPU has no bfloat16 instructions"
    return [Choice("precision", "fp32", reason)]


def decoder(given: Given, name: str, reason: str) -> list[Choice]:
    """Choose the decoder, unless the user did, and whether there is a class token, as that decoder needs."""
    named = suffix_fields(str(given.get("variant", "")))
    name = str(given.get("model.decoder", named.get("decoder", name)))
    has_token = name in ("token", "token_mean", "token_pair")
    return [
        Choice("model.decoder", name, reason),
        Choice("model.class_token", has_token, f"as the decoder {name!r} needs"),
    ]


def input_channels(
    facts: DatasetFacts, given: Given, mean: tuple[float, ...], std: tuple[float, ...], reason: str
) -> list[Choice]:
    """Choose the number of channels of the images, unless the user did, and a mean and a std for each channel."""
    channels = int(given.get("model.in_channels", facts.channels))
    if channels == 1:
        mean, std = (fmean(mean),), (fmean(std),)
    return [
        Choice("model.in_channels", channels, "grey images" if channels == 1 else "colour images"),
        Choice("preprocess.mean", mean, reason),
        Choice("preprocess.std", std, reason),
    ]


def colour_jitter(facts: DatasetFacts, given: Given, strength: float, reason: str) -> list[Choice]:
    """Choose changes of brightness and contrast, and of saturation where there is colour."""
    channels = int(given.get("model.in_channels", facts.channels))
    names = ("brightness", "contrast", "saturation")[: 3 if channels == 3 else 2]
    return [Choice(f"augment.{name}", strength, reason) for name in names]


def horizontal_flip(facts: DatasetFacts, reason: str) -> Choice:
    """Choose to mirror half of the images, unless that would change what an image means."""
    return Choice("augment.flip", 0.0 if facts.flip_reason else 0.5, facts.flip_reason or reason)


def augmentation_of_signs(flip_reason: str) -> list[Choice]:
    """Choose small moves and rotations for images that must not be mirrored, such as digits and letters."""
    return [
        Choice("augment.flip", 0.0, flip_reason),
        Choice("augment.rotation", 12.0, "hand-made signs lean"),
        Choice("augment.shift", 0.08, "signs are not centred to the pixel"),
        Choice("augment.crop_scale", 0.8, "signs come in different sizes"),
        Choice("augment.fill", "edge", "the background goes on outside"),
    ]
