"""`cifar10`: 60,000 small colour images in ten classes, from scratch on a CPU in minutes.

    vitrail train cifar10/ --recipe cifar10 --data.val-fraction 0.1

The folder has `train/<class>/` and `test/<class>/`; a tenth of `train/` becomes the validation split.

Hardware: a CPU of 2 cores with bfloat16 instructions; others compute in fp32, which is slower. Measured on 2 cores of an AMD EPYC
with AVX512-BF16, torch 2.14.1, shared with other work.
Time: 21 min 32 s in all, of it 20 min 49 s training (n = 1); at the 400 images/s of its quiet stretches training takes about 10 min.
Expect: 60.1 % of the 10,000 test images of CIFAR-10, JPEG (6,009, n = 1, seed 0), 60.5 % of 5,000 validation images. Nothing was
tuned, and accuracy still rose with every epoch: 39.4, 50.0, 55.0, 58.4, 60.5 % of the validation images. Published for a wider ViT
(192, 9 blocks) in 100 epochs on a GPU: 93.6 % (Lee et al. 2021, arXiv 2112.13492).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrail.recipes.choices import Choice, Given, decoder, horizontal_flip, input_channels, refuse_weights, speed
from vitrail.recipes.facts import DatasetFacts

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader

VALUES = (
    Choice("variant", "micro4", "width 128 and 6 blocks: what 2 cores can feed"),
    Choice("model.image_size", 32, "CIFAR-10's own size"),
    Choice("model.patch_size", 4, "64 patches: fine enough for 32 px, and cheap enough"),
    Choice("model.encoder", "conv", "two small convolutions see edges across the borders of patches"),
    Choice("model.positions", "sincos2d", "tells positions apart from the first step; a table learns them late"),
    Choice("model.drop_path", 0.0, "few epochs: there is nothing yet to keep from learning by heart"),
    Choice("preprocess.crop_fraction", 1.0, "all images have this size: nothing is cut off"),
    Choice("batch_size", 128, "keeps 2 cores busy, and leaves 352 steps an epoch"),
    Choice("epochs", 5.0, "ten minutes at the 400 images/s of 2 undisturbed cores"),
    Choice("optim.lr", 2e-3, "for width 128 and batch 128, a short run"),
    Choice("optim.ema_decay", 0.97, "the average of about the last 2 % of 1,760 steps is evaluated"),
    Choice("optim.label_smoothing", 0.1, "keeps a small network from being too sure"),
    Choice("schedule.decay", "linear", "to zero: the usual of short runs"),
    Choice("schedule.final_fraction", 0.0, "to zero: the usual of short runs"),
    Choice("augment.crop_scale", 0.5, "random resized crops, mild: small images lose detail soon"),
)


def cifar10(facts: DatasetFacts, given: Given, pretrained: ModelHeader | None) -> list[Choice]:
    """Choose the fixed values above; other images are brought to 32×32 pixels and keep their channels.

    Raises:
        ValueError: the run starts from trained weights.
    """
    refuse_weights("cifar10", pretrained)
    return [
        *VALUES,
        *decoder(given, "attention", "a learned query weighs the patches"),
        *input_channels(facts, given, (0.5,) * 3, (0.5,) * 3, "from 0 to 1 into -1 to 1"),
        horizontal_flip(facts, "cars and cats look alike in a mirror"),
        *speed(facts),
    ]
