"""`auto`, the default: values chosen for the dataset and the machine.

    vitrail train photos/

From scratch: a ViT that fits the images, their number and this machine. From trained weights (`--model RUN`): what `fine_tune`
says.

Hardware: any; on a CPU of 2 cores small models at 128 px at most, on a GPU ViT-Ti and ViT-S at 224 px.
Time: 51 s for the digits (40 to 75), 392 s for 3 epochs of CIFAR-10, on 2 cores of an AMD EPYC with AVX512-BF16, shared.
Expect: digits 99.16 % of 359 validation images (deviation 0.39, n = 5); CIFAR-10 (JPEG) after `--epochs 3` 54.1 % of the test
images (n = 1; `benchmarks/accuracy.py`). On a GPU: not measured here.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

from vitrail.models.config import ENCODER_NAMES
from vitrail.models.variants import SIZES, suffix_fields, variant_config
from vitrail.recipes.choices import (
    Choice,
    Given,
    augmentation_of_signs,
    batch_and_epochs,
    by_scale,
    decoder,
    regularisation,
    sampling,
    speed,
)
from vitrail.recipes.facts import DatasetFacts
from vitrail.recipes.fine_tune import fine_tune

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader


def auto(facts: DatasetFacts, given: Given, pretrained: ModelHeader | None) -> list[Choice]:
    """Choose settings for any dataset: a ViT that fits it and this machine, or what `fine_tune` chooses for trained weights."""
    if pretrained is not None:
        return fine_tune(facts, given, pretrained)
    model = size_choices(facts, given)
    known = {choice.setting: choice.value for choice in model} | dict(given)
    return [
        *model,
        *length_from_scratch(facts, known),
        *augmentation_from_scratch(facts),
        *sampling(facts, given, from_scratch=True),
        *decoding(facts, known),
        *speed(facts),
    ]


def size_choices(facts: DatasetFacts, given: Given) -> list[Choice]:
    """Choose image size, patch size and variant, and the preprocessing that follows from them."""
    if "variant" in given:
        size, reason = size_for_variant(facts, given)
        return [Choice("model.image_size", size, reason), *preprocessing(facts, size, given)]
    usual, patch, side = image_and_patch(facts)
    patch_sizes = tuple(given.get("model.patch_sizes", ()))
    if given.get("model.encoder") == "r50":
        patch = 16  # its finest stride
    if patch_sizes:
        patch = min(patch_sizes, key=lambda trained: abs(trained - patch))
    patch = int(given.get("model.patch_size", patch))
    unit = patch if "model.image_size" in given else common_multiple(patch, patch_sizes, usual)
    size = int(given.get("model.image_size", max(1, round(usual / unit)) * unit))
    variant = f"{model_size(facts)}{patch}"
    return [
        Choice("variant", variant, f"{facts.num_train:,} training images on a {facts.device.upper()}"),
        Choice("model.image_size", size, side),
        Choice("model.patch_size", patch, f"{(size // patch) ** 2} patches an image: fine enough, and cheap enough"),
        *preprocessing(facts, size, given),
    ]


def size_for_variant(facts: DatasetFacts, given: Given) -> tuple[int, str]:
    """Return the image size for the variant that the user chose, and why: its own, or the images' where they are smaller."""
    variant = variant_config(str(given["variant"]))
    patch = int(given.get("model.patch_size", variant.patch_size))
    size, reason = variant.image_size, f"the size of model {given['variant']}"
    patch_sizes = tuple(given.get("model.patch_sizes", ()))
    unit = patch if "model.image_size" in given else common_multiple(patch, patch_sizes, facts.side)
    if facts.side < size or patch <= 8 or size % unit:
        wanted = min(facts.side, size) if patch > 8 else facts.side
        size = max(1, round(max(wanted, unit) / unit)) * unit
        reason = f"the images' own {facts.side} px as a multiple of {unit}-px patches"
    return int(given.get("model.image_size", size)), reason


def common_multiple(patch: int, patch_sizes: tuple[int, ...], side: int) -> int:
    """Return the smallest side in pixels that is a multiple of all patch sizes.

    Raises:
        ValueError: it is much larger than the images.
    """
    unit = math.lcm(patch, *patch_sizes)
    if unit > 2 * max(side, patch):
        raise ValueError(
            f"model.patch_sizes {' '.join(map(str, patch_sizes))}: the smallest side that is a multiple of {patch} and of all "
            f"these is {unit} px, but the images have about {side}; choose sizes that are multiples of each other"
        )
    return unit


def image_and_patch(facts: DatasetFacts) -> tuple[int, int, str]:
    """Return the image size and the patch size that suit the images, and why."""
    if facts.side <= 48:
        patch = 4
    elif facts.side <= 160:
        patch = 8
    else:
        size = 224 if facts.device == "cuda" else 128
        why = "the usual size" if facts.device == "cuda" else "a third of the cost of 224 on a CPU"
        return size, 16, f"images have a short side of {facts.side} px (median); {why}"
    size = max(patch * 2, round(facts.side / patch) * patch)
    return size, patch, f"images have a short side of {facts.side} px (median)"


def model_size(facts: DatasetFacts) -> str:
    """Return the size in a variant's name, such as `micro`: as large as the dataset and the device allow."""
    if facts.device == "cpu":
        return "nano" if facts.num_train < 10_000 and facts.side <= 48 else "micro"
    return "ti" if facts.num_train < 100_000 else "s"


def preprocessing(facts: DatasetFacts, size: int, given: Given) -> list[Choice]:
    """Choose channels, decoder, positions, mean and std, and how much of an image is cut off."""
    channels = int(given.get("model.in_channels", facts.channels))
    colour = "no colour in a sample of the images" if channels == 1 else "colour images"
    named = suffix_fields(str(given.get("variant", "")))
    mean, std, reason = normalisation_for(str(given.get("model.encoder", named.get("encoder", "patch"))), channels)
    choices = [
        Choice("model.in_channels", channels, colour),
        *decoder(given, "mean", "small datasets learn it faster than a class token"),
        positions(facts),
        Choice("preprocess.mean", mean, reason),
        Choice("preprocess.std", std, reason),
    ]
    if facts.uniform and facts.side <= 1.15 * size:
        choices.append(Choice("preprocess.crop_fraction", 1.0, "all images have this size: nothing is cut off"))
    return choices


def normalisation_for(encoder: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Return mean and std for an encoder's input, and why."""
    if encoder in ENCODER_NAMES:
        return (0.5,) * channels, (0.5,) * channels, "the usual for ViTs"
    from vitrail.models.cnns import normalisation

    mean, std = (value if channels == 3 else (fmean(value),) for value in normalisation(encoder))
    return mean, std, f"as {encoder}'s published weights expect"


def positions(facts: DatasetFacts) -> Choice:
    """Choose how patches are given their positions."""
    if facts.num_train < 200_000:
        why = "a fixed table tells positions apart from the first step; learning one takes long"
        return Choice("model.positions", "sincos2d", why)
    return Choice("model.positions", "learned", "enough images to learn a table of positions")


def length_from_scratch(facts: DatasetFacts, known: Given) -> list[Choice]:
    """Choose batch size, epochs, learning rate and regularisation."""
    # Images seen in all: about what a small ViT needs to converge from scratch; fewer where a CPU would need hours.
    seen = by_scale(facts, few=120_000, cpu=900_000, gpu=5_000_000)
    choices, batch, epochs = batch_and_epochs(facts, known, seen=seen, least=10, most=400)
    size = str(known.get("variant", "ti16")).split("-")[0].rstrip("0123456789")
    width = SIZES[size]["embed_dim"] if size in SIZES else 192
    lr = 1e-3 * math.sqrt(batch / 128) * math.sqrt(192 / width)
    return [
        *choices,
        Choice("optim.lr", float(f"{lr:.1e}"), f"for width {width} and batch {batch}"),
        *regularisation(epochs * facts.num_train / batch, epochs),
    ]


def augmentation_from_scratch(facts: DatasetFacts) -> list[Choice]:
    """Choose random changes that do not change the label."""
    if facts.flip_reason:
        return augmentation_of_signs(facts.flip_reason)
    crop = (
        Choice("augment.crop_scale", 0.5, "random resized crops; small images lose detail sooner")
        if facts.side <= 48
        else Choice("augment.crop_scale", 0.25, "random resized crops")
    )
    saturation = (
        Choice("augment.saturation", 0.2, "colours vary")
        if facts.channels == 3
        else Choice("augment.saturation", 0.0, "grey images")
    )
    return [
        Choice("augment.flip", 0.5, "things look alike in a mirror; no class name speaks against it"),
        crop,
        Choice("augment.rotation", 10.0, "small tilts do not change what an image shows"),
        Choice("augment.brightness", 0.2, "light varies"),
        Choice("augment.contrast", 0.2, "light varies"),
        saturation,
    ]


def decoding(facts: DatasetFacts, known: Given) -> list[Choice]:
    """Choose to decode large JPEGs smaller, where the images are at least twice as large as the model's input."""
    size = int(known["model.image_size"])
    if facts.side < 2 * size or known.get("augment.crop_scale") == 1:
        return []
    why = f"a short side of {facts.side} px for a model of {size}: large JPEGs are decoded smaller; evaluation stays exact"
    return [Choice("data.decode", "fast", why)]
