"""What is minimised. A method of training is an `Objective`: a module whose forward returns named scalars."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.loading.train_loader import Batch
from vitrail.models.vit import ViT


class Classification(nn.Module):
    """Cross-entropy of the right label; of a mixed image's two labels, each by its share; each times its weight.

    The sum is divided by the number of images, not by their weights', so that parts of a batch and processes add up.

    Forward returns `loss` (minimised) and `correct`, the number of predictions of the batch that name the right label, of
    two the one with the greater share.
    """

    def __init__(self, model: ViT, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.model(batch.images, batch.patch_size).float()
        targets, mix = batch.targets, batch.mix
        if mix is None and batch.weights is None:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        else:
            each = self.weighted(logits, targets, batch.weights)
            if mix is not None:
                # Cross-entropy is linear in the target, smoothing included: this is that of the soft label.
                each = torch.lerp(self.weighted(logits, mix.labels_b, mix.weights_b), each, mix.lam)
                targets = torch.where(mix.lam < 0.5, mix.labels_b, targets)
            loss = each.mean()
        return {"loss": loss, "correct": (logits.argmax(dim=1) == targets).sum()}

    def weighted(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss of every image of a batch [B]."""
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        return each if weights is None else each * weights
