"""`s16_in1k`: ViT-S/16 on ImageNet-1k from scratch in 90 epochs (Beyer et al. 2022, "Better plain ViT baselines").

    vitrail train imagenet/ --recipe s16_in1k

The folder has `train/<class>/` and `val/<class>/`. On eight GPUs: `torchrun --nproc-per-node 8 -m vitrail train …`, the same.

Hardware: a TPUv3-8 in the publication; here one GPU or several. `--optim.accumulate 4` where the memory is too small.
Time: 6 to 7 h on the TPUv3-8 (published); not measured here.
Expect: 76.5 % of the validation images (published); not measured here. `--epochs 300` published: 80.0 %.
Source: google-research/big_vision, `big_vision/configs/vit_s16_i1k.py`; arXiv 2205.01580.

What differs from theirs:
- Weight decay: theirs is 1e-4 a step at the peak, independent of the learning rate; AdamW here multiplies the two, so 0.1.
- RandAugment: level 10 of their scale is the strongest, as 30 of torchvision's is. Theirs has Invert, Cutout and SolarizeAdd
  besides and no Identity; their colour operations only strengthen; they fill with grey, torchvision's with black.
- MixUp: the same Beta(0.2, 0.2), drawn for each pair; theirs has one share a batch.
- Head: one linear layer; theirs has a hidden layer with tanh before it.
- Adam's first moment: fp32; theirs is bfloat16.
- Training images are resized with antialiasing; theirs are not.
- They keep 1 % of train/ to choose by and report the last weights; Vitrail keeps the best of the validation split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrail.recipes.choices import Choice, Given, decoder, horizontal_flip, input_channels, refuse_weights, speed
from vitrail.recipes.facts import DatasetFacts

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader

VALUES = (
    Choice("variant", "s16", "as published: width 384, 12 blocks, 6 heads"),
    Choice("model.image_size", 224, "as published"),
    Choice("model.positions", "sincos2d", "as published: a fixed table"),
    Choice("batch_size", 1024, "as published"),
    Choice("epochs", 90.0, "as published: 76.5 %; 300 epochs: 80.0 %"),
    Choice("optim.lr", 1e-3, "as published"),
    Choice("optim.weight_decay", 0.1, "published as 1e-4 a step; times the learning rate of 1e-3 that is the same"),
    Choice("optim.clip_norm", 1.0, "as published"),
    Choice("schedule.warmup", "10000 steps", "as published: 9 % of ImageNet's 112,600 steps"),
    Choice("schedule.decay", "cosine", "as published"),
    Choice("schedule.final_fraction", 0.0, "as published: to zero"),
    Choice("preprocess.crop_fraction", 224 / 256, "as published: short side 256, then the centre 224"),
    Choice("preprocess.interpolation", "bilinear", "as published for training"),
    Choice("augment.crop_scale", 0.05, "as published: Inception crops, 5 to 100 % of the area"),
    Choice("augment.policy", "randaugment", "as published"),
    Choice("augment.policy_ops", 2, "as published"),
    Choice("augment.policy_magnitude", 30, "published as level 10 of 10, which is 30 of torchvision's 30"),
    Choice("augment.mixup", 0.2, "as published: the share from Beta(0.2, 0.2)"),
)


def s16_in1k(facts: DatasetFacts, given: Given, pretrained: ModelHeader | None) -> list[Choice]:
    """Choose the published values above.

    Raises:
        ValueError: the run starts from trained weights.
    """
    refuse_weights("s16_in1k", pretrained)
    pooling = decoder(given, "mean", "as published: global average pooling, no class token")
    if pooling[0].value == "mean":  # another decoder has no such norm
        pooling.append(Choice("model.fc_norm", False, "as published: the layer norm comes before pooling"))
    return [
        *VALUES,
        *pooling,
        *input_channels(facts, given, (0.5,) * 3, (0.5,) * 3, "as published: from -1 to 1"),
        horizontal_flip(facts, "as published"),
        *speed(facts),
    ]
