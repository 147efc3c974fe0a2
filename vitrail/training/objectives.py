"""What is minimised. A method of training is an `Objective`: a module whose forward returns named scalars."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.loader import Batch
from vitrail.models.vit import ViT


class Classification(nn.Module):
    """Cross-entropy of the right label, each picture's times its weight where the batch has weights.

    The sum is divided by the number of pictures, not by their weights', so that parts of a batch and processes add up.

    Forward returns `loss` (minimised) and `correct`, the number of right predictions of the batch.
    """

    def __init__(self, model: ViT, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.model(batch.images, batch.patch_size).float()
        if batch.weights is None:
            loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
        else:
            each = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing, reduction="none")
            loss = (each * batch.weights).mean()
        return {"loss": loss, "correct": (logits.argmax(dim=1) == batch.targets).sum()}
