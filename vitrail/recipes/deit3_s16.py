"""`deit3_s16`: ViT-S/16 on ImageNet-1k from scratch in 800 epochs (Touvron et al. 2022, "DeiT III: Revenge of the ViT").

    torchrun --nproc-per-node 8 -m vitrail train imagenet/ --recipe deit3_s16

The folder has `train/<class>/` and `val/<class>/`.

Hardware: 8 GPUs, as in the publication; `--optim.accumulate` where the memory is too small.
Time: not measured here; nine times the images of `s16_in1k`.
Expect: 81.4 % of the validation images at 224 px (published); not measured here.
Source: facebookresearch/deit, README_revenge.md (the training command of deit_small_patch16_LS) and models_v2.py; arXiv
2204.07118.

What differs from theirs:
- Optimizer: LAMB at 4e-3 in theirs; here AdamW, at DeiT's learning rate of 5e-4 · batch / 512 (Touvron et al. 2021).
- Loss: binary cross-entropy of every class in theirs; here cross-entropy with both labels by share.
- Batch: 2,048 in theirs, which is no multiple of three repeats of each image; here 2,016.
- Stochastic depth: 0.05 in every block in theirs; here it grows linearly to 0.1, on average the same.
- The class token has a row in the table of positions; theirs has none.
- Vitrail keeps the best weights of the validation split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrail.recipes.choices import (
    Choice,
    Given,
    colour_jitter,
    decoder,
    horizontal_flip,
    input_channels,
    refuse_weights,
    speed,
)
from vitrail.recipes.facts import DatasetFacts

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader

VALUES = (
    Choice("variant", "s16", "as published: width 384, 12 blocks, 6 heads"),
    Choice("model.image_size", 224, "as published"),
    Choice("model.positions", "learned", "as published"),
    Choice("model.layer_scale", 1e-4, "as published"),
    Choice("model.drop_path", 0.1, "grows linearly, on average the published 0.05 of every block"),
    Choice("batch_size", 2016, "published as 2,048; a multiple of three repeats, even on 8 GPUs"),
    Choice("epochs", 800.0, "as published: 81.4 %"),
    Choice("optim.lr", 2e-3, "for AdamW: DeiT's 5e-4 · batch / 512; published is 4e-3 for LAMB"),
    Choice("optim.weight_decay", 0.05, "as published"),
    Choice("optim.label_smoothing", 0.0, "as published"),
    Choice("schedule.warmup", "5 epochs", "as published"),
    Choice("schedule.decay", "cosine", "as published"),
    Choice("schedule.final_fraction", 0.005, "to 1e-5, the published code's default"),
    Choice("preprocess.crop_fraction", 1.0, "as published: nothing is cut off but what makes a square"),
    Choice("augment.crop_scale", 0.08, "as published: random resized crops"),
    Choice("augment.policy", "three_augment", "as published: grey, solarised or blurred"),
    Choice("augment.repeats", 3, "as published: repeated augmentation"),
    Choice("augment.mixup", 0.8, "as published"),
    Choice("augment.cutmix", 1.0, "as published; each takes half of the pairs"),
)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def deit3_s16(facts: DatasetFacts, given: Given, pretrained: ModelHeader | None) -> list[Choice]:
    """Choose the published values above, and replacements for those that Vitrail does not have.

    Raises:
        ValueError: the run starts from trained weights.
    """
    refuse_weights("deit3_s16", pretrained)
    return [
        *VALUES,
        *decoder(given, "token", "as published: the class token"),
        *input_channels(facts, given, IMAGENET_MEAN, IMAGENET_STD, "as published: ImageNet's"),
        horizontal_flip(facts, "as published"),
        *colour_jitter(facts, given, 0.3, "as published"),
        *speed(facts),
    ]
