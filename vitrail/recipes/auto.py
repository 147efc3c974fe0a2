"""`auto`, the default: chosen from the data and the machine.

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


def auto(facts: DatasetFacts, given: Given, source: ModelHeader | None) -> list[Choice]:
    """Choose for any dataset: from scratch a ViT that fits it and this machine, else how trained weights learn it."""
    if source is not None:
        return fine_tune(facts, given, source)
    model = architecture(facts, given)
    known = {choice.setting: choice.value for choice in model} | dict(given)
    return [
        *model,
        *training_length(facts, known),
        *augmentation(facts),
        *sampling(facts, given, from_scratch=True),
        *decoding(facts, known),
        *speed(facts),
    ]


def architecture(facts: DatasetFacts, given: Given) -> list[Choice]:
    """Choose image size, patch size, width and depth, and what follows from them."""
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
    """Return the image size for a variant that the user chose, and why: its own, or the images' where they are small."""
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
    """Return the smallest side that all patch sizes divide.

    Raises:
        ValueError: it is much larger than the images.
    """
    unit = math.lcm(patch, *patch_sizes)
    if unit > 2 * max(side, patch):
        raise ValueError(
            f"model.patch_sizes {' '.join(map(str, patch_sizes))}: the smallest image that patches of {patch} and these all "
            f"divide has {unit} px, but the images have about {side}; choose sizes that are multiples of each other"
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
    """Return the first part of a variant's name, such as `micro`: as large as the data and the device can feed."""
    if facts.device == "cpu":
        return "nano" if facts.num_train < 10_000 and facts.side <= 48 else "micro"
    return "ti" if facts.num_train < 100_000 else "s"


def preprocessing(facts: DatasetFacts, size: int, given: Given) -> list[Choice]:
    """Choose channels, decoder, positions, and how images are brought to the model's size and range."""
    channels = int(given.get("model.in_channels", facts.channels))
    colour = "no colour in a sample of the images" if channels == 1 else "colour images"
    named = suffix_fields(str(given.get("variant", "")))
    mean, std, reason = normalisation_for(str(given.get("model.encoder", named.get("encoder", "patch"))), channels)
    choices = [
        Choice("model.in_channels", channels, colour),
        *decoder(given, "mean", "small sets learn it faster than a class token"),
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

    mean, std = (each if channels == 3 else (fmean(each),) for each in normalisation(encoder))
    return mean, std, f"as {encoder}'s published weights expect"


def positions(facts: DatasetFacts) -> Choice:
    """Choose how the model knows where a patch is."""
    if facts.num_train < 200_000:
        why = "a fixed table tells positions apart from the first step; learning one takes long"
        return Choice("model.positions", "sincos2d", why)
    return Choice("model.positions", "learned", "enough images to learn a table of positions")


def training_length(facts: DatasetFacts, known: Given) -> list[Choice]:
    """Choose batch, epochs and learning rate."""
    # About so many images are seen in all: what a small ViT needs to converge from scratch, less where a CPU would need
    # hours.
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


def augmentation(facts: DatasetFacts) -> list[Choice]:
    """Choose random changes that leave the label right."""
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
    """Choose to leave out of large JPEGs what the model's input has no room for."""
    size = int(known["model.image_size"])
    if facts.side < 2 * size or known.get("augment.crop_scale") == 1:
        return []
    why = f"a short side of {facts.side} px for a model of {size}: large JPEGs are decoded smaller; evaluation stays exact"
    return [Choice("data.decode", "fast", why)]
