"""`fine_tune`: trained weights learn new images, the head first, and earlier layers at lower learning rates.

    vitrail train photos/ --model runs/photos --recipe fine_tune

`auto` chooses the same wherever `--model` names trained weights; this recipe refuses to start without them. Architecture, image
size and preprocessing are the weights' own (`pretrained.py`).

Hardware: a CPU of 2 cores for small models; a GPU for ViT-S and larger.
Time: 24 s for 500 images of 32 px and micro4 on 2 cores of an AMD EPYC shared with other work.
Expect: 64.2 % (deviation 0.7, n = 3) where training from scratch reaches 52.2 %: five classes of CIFAR-10 (JPEG), 100 images
each, 12 epochs, from a micro4 that learned the other five (`benchmarks/finetune.py`). On large published weights: not measured
here. Figures behind the choices: docs/finetuning.md.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from vitrail.recipes.choices import (
    Choice,
    Given,
    augmentation_of_signs,
    batch_and_epochs,
    by_scale,
    regularisation,
    sampling,
    speed,
)
from vitrail.recipes.facts import DatasetFacts

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader


def fine_tune(facts: DatasetFacts, given: Given, pretrained: ModelHeader | None) -> list[Choice]:
    """Choose the settings with which trained weights learn a new dataset.

    Raises:
        ValueError: there are no trained weights to start from.
    """
    if pretrained is None:
        raise ValueError(
            "recipe 'fine_tune' starts from trained weights; give --model a run, a weights file, hf:… or timm:…, or take "
            "--recipe auto, which also trains from scratch"
        )
    size = int(given.get("model.image_size", pretrained.architecture.image_size))
    adapters = int(given.get("lora.rank", 0)) > 0
    return [
        *length_of_fine_tuning(facts, given, pretrained.architecture.embed_dim, adapters=adapters),
        *gentle_augmentation(facts),
        *sampling(facts, given, from_scratch=False),
        *speed(dataclasses.replace(facts, side=size)),
    ]


def length_of_fine_tuning(facts: DatasetFacts, given: Given, width: int, *, adapters: bool) -> list[Choice]:
    """Choose batch size, epochs, the learning rates of layers and head, and regularisation."""
    seen = by_scale(facts, few=20_000, cpu=200_000, gpu=1_000_000)  # a sixth to a quarter of `auto` from scratch
    choices, batch, epochs = batch_and_epochs(facts, given, seen=seen, least=3, most=60)
    lr = 2e-3 * math.sqrt(batch / 128) * (128 / width) * (3 if adapters else 1)
    return [
        *choices,
        Choice("optim.lr", float(f"{lr:.1e}"), f"for width {width} and batch {batch}"),
        Choice("optim.layer_decay", 1.0, "adapters start at nothing in every layer")
        if adapters
        else Choice("optim.layer_decay", 0.75, "first layers see what all images have, and change the least"),
        Choice("optim.head_warmup", "5 %", "a new head's first gradients would disturb what the weights know"),
        Choice("schedule.warmup", "10 %", "the learning rate is still rising when all begin to learn"),
        Choice("optim.weight_decay", 0.05, "the usual for ViTs"),
        *regularisation(epochs * facts.num_train / batch, epochs),
    ]


def gentle_augmentation(facts: DatasetFacts) -> list[Choice]:
    """Choose milder random changes than for training from scratch: the weights have seen how images vary."""
    if facts.flip_reason:
        return augmentation_of_signs(facts.flip_reason)
    return [
        Choice("augment.flip", 0.5, "things look alike in a mirror; no class name speaks against it"),
        Choice("augment.crop_scale", 0.5, "random resized crops, milder than from scratch"),
    ]
