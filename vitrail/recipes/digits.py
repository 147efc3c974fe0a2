"""`digits`: 1,797 handwritten digits of 8×8 pixels, inside scikit-learn; the demo, in a minute.

    vitrail train digits --recipe digits

Hardware: a CPU of 2 cores.
Time: 54 s, with reading, evaluation and report (52 to 56, n = 3), one thread of an AMD EPYC with AVX512-BF16, torch 2.14.1, shared
with other work.
Expect: 99.16 % of 359 validation images (356 of them with each of 3 seeds; `benchmarks/accuracy.py digits --set recipe=digits`).
They also chose the best epoch, so that is slightly optimistic; `auto`, which chooses these values on that machine, had 98.6 to
99.7 % with 5 seeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrail.recipes.choices import Choice, Given, augmentation_of_signs, decoder, input_channels, refuse_weights
from vitrail.recipes.facts import DatasetFacts

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader

VALUES = (
    Choice("variant", "nano4", "width 96 and 6 blocks are enough for 1,438 images"),
    Choice("model.image_size", 8, "the digits' own size"),
    Choice(
        "model.patch_size", 4, "four patches: 98.1 % in 20 epochs, where 16 patches of 2 px reach 89.9 % (docs/log.md)"
    ),
    Choice("model.positions", "sincos2d", "tells four positions apart from the first step; a table learns them late"),
    Choice("preprocess.crop_fraction", 1.0, "all images have this size: nothing is cut off"),
    Choice("batch_size", 64, "23 steps an epoch; larger ones would leave few"),
    Choice("epochs", 83.0, "about 120,000 images seen in all"),
    Choice("optim.lr", 1e-3, "for width 96 and batch 64"),
    Choice("optim.ema_decay", 0.9732, "the average of about the last 2 % of 1,865 steps is evaluated"),
    Choice("optim.label_smoothing", 0.1, "keeps a network that can learn its images by heart from being too sure"),
    Choice("model.drop_path", 0.1, "stochastic depth, against learning by heart"),
    Choice("precision", "fp32", "too little work an image for bfloat16 to pay"),
)


def digits(facts: DatasetFacts, given: Given, pretrained: ModelHeader | None) -> list[Choice]:
    """Choose the fixed values above; other images are brought to 8×8 pixels and keep their channels.

    Raises:
        ValueError: the run starts from trained weights.
    """
    refuse_weights("digits", pretrained)
    return [
        *VALUES,
        *decoder(given, "mean", "small datasets learn it faster than a class token"),
        *input_channels(facts, given, (0.5,) * 3, (0.5,) * 3, "from 0 to 1 into -1 to 1"),
        *augmentation_of_signs("a mirrored digit is another sign"),
    ]
