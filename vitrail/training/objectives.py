"""What is minimised. A method of training is an `Objective`: a module whose forward returns named scalars."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.data.loader import Batch
from vitrail.models.vit import ViT


class Classification(nn.Module):
    """Cross-entropy of the right label.

    Forward returns `loss` (minimised) and `correct`, the number of right predictions of the batch.
    """

    def __init__(self, model: ViT, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.model(batch.images, batch.patch_size).float()
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
        return {"loss": loss, "correct": (logits.argmax(dim=1) == batch.targets).sum()}
