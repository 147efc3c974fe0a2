"""What is minimised. A method of training is an `Objective`: a module whose forward returns named scalars."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.loader import Batch
from vitrail.models.vit import ViT


class Classification(nn.Module):
    """Cross-entropy of the right label; of a mixed picture's two labels, each by its share.

    Forward returns `loss` (minimised) and `correct`, the number of predictions of the batch that name the right label, of
    two the one with the greater share.
    """

    def __init__(self, model: ViT, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.model(batch.images, batch.patch_size).float()
        targets, mix = batch.targets, batch.mix
        if mix is None:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        else:
            # Cross-entropy is linear in the target, smoothing included: this is that of the soft label.
            own, other = (
                F.cross_entropy(logits, each, reduction="none", label_smoothing=self.label_smoothing)
                for each in (targets, mix.partners)
            )
            loss = torch.lerp(other, own, mix.shares).mean()
            targets = torch.where(mix.shares < 0.5, mix.partners, targets)
        return {"loss": loss, "correct": (logits.argmax(dim=1) == targets).sum()}
