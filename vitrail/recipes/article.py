"""`article`: the settings of the article that the project grew from (docs/article.md).

    vitrail train photos/ --recipe article

ViT-B/16 at 224 px, AdamW at 3e-5, linear warm-up over 500 of 10,000 steps, dropout 0.1. Its other schedule is
`--schedule.decay step --schedule.step-every "1 epochs" --schedule.warmup "0 steps"`.

Hardware: one GPU; on a CPU, ViT-B/16 at 224 px takes long.
Time: not measured here.
Expect: not measured here, and no figure is published for these settings. From random weights a learning rate of 3e-5 teaches
little in 10,000 steps; trained weights (`--model timm:vit_base_patch16_224`) may be given, and keep their own architecture and
preprocessing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitrail.recipes.choices import Choice, Given, horizontal_flip
from vitrail.recipes.facts import DatasetFacts

if TYPE_CHECKING:  # the command line reads recipes, and needs no torch
    from vitrail.weights.model_file import ModelHeader


def article(facts: DatasetFacts, given: Given, pretrained: ModelHeader | None) -> list[Choice]:
    """Choose the article's settings, the same from scratch and from trained weights."""
    why = "as in the article"
    seen = 10_000 * int(given.get("batch_size", 128))
    channels = int(given.get("model.in_channels", 3))
    return [
        Choice("model.in_channels", channels, why),
        Choice("variant", "b16", why),
        Choice("batch_size", 128, why),
        Choice("epochs", round(seen / facts.num_train, 4), "10,000 steps, as in the article"),
        Choice("optim.lr", 3e-5, why),
        Choice("schedule.warmup", "500 steps", why),
        Choice("schedule.decay", "linear", why),
        Choice("log.every", "5 steps", why),
        Choice("model.dropout", 0.1, why),
        Choice("model.attention_dropout", 0.1, why),
        Choice("preprocess.mean", (0.485, 0.456, 0.406)[:channels], why),
        Choice("preprocess.std", (0.229, 0.224, 0.225)[:channels], why),
        Choice("preprocess.crop_fraction", 224 / 256, why),
        Choice("augment.crop_scale", 0.25, why),
        horizontal_flip(facts, why),
        Choice("augment.rotation", 15.0, why),
    ]
