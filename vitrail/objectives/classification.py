"""Classification: cross-entropy with the labels, weighted and mixed where the data says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data.loading.reader import ImageReader
from vitrail.data.loading.train_loader import Batch
from vitrail.distributed import World
from vitrail.evaluation.diagnosis import require_finite
from vitrail.evaluation.metrics import headline_metrics
from vitrail.evaluation.predict_logits import predict_logits
from vitrail.models.lora import merged
from vitrail.models.vit import ViT
from vitrail.objectives.base import Objective
from vitrail.optim.average import Average


class Classification(Objective):
    """Cross-entropy of the label; of a mixed image's two labels, each by its share; each times its weight.

    The sum is divided by the number of images, not by their weights', so that parts of a batch and ranks add up.
    `top1` counts the predictions that name the label, of two the one with the greater share.

    Attributes:
        model: the model that learns.
        average: its running average, which is evaluated and saved in its place; None where there is none.
    """

    def __init__(self, model: ViT, *, label_smoothing: float = 0.0, ema_decay: float = 0.0) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self.average = Average(model, ema_decay) if ema_decay else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.model(batch.images, batch.patch_size).float()
        targets, mix = batch.targets, batch.mix
        if mix is None and batch.weights is None:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        else:
            losses = self.weighted(logits, targets, batch.weights)
            if mix is not None:
                # Cross-entropy is linear in the target, smoothing included: this is that of the soft label.
                losses = torch.lerp(self.weighted(logits, mix.labels_b, mix.weights_b), losses, mix.lam)
                targets = torch.where(mix.lam < 0.5, mix.labels_b, targets)
            loss = losses.mean()
        correct = (logits.argmax(dim=1) == targets).sum()
        return {"loss": loss, "top1": correct, "count": torch.full_like(correct, len(targets))}

    def weighted(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss of every image of a batch [B]."""
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        return losses if weights is None else losses * weights

    def after_step(self, step: int) -> None:
        if self.average is not None:
            self.average.update(self.model, step)

    def vits(self) -> Iterator[ViT]:
        yield self.model
        if self.average is not None:
            yield self.averaged

    @property
    def averaged(self) -> ViT:
        """The model of the average."""
        assert self.average is not None
        assert isinstance(self.average.model, ViT)
        return self.average.model

    def model_to_save(self) -> ViT:
        return merged(self.model if self.average is None else self.averaged)

    def evaluate(self, reader: ImageReader, indices: np.ndarray, world: World) -> dict[str, float]:
        model = self.model_to_save()
        device = next(model.parameters()).device
        outputs = predict_logits(model, reader, indices, device=device, world=world)
        require_finite(outputs, model, reader)
        return {**headline_metrics(outputs), "num_images": len(outputs.targets)}

    def better(self, new: Mapping[str, float], best: Mapping[str, float]) -> bool:
        """Whether top-1 is higher, or as high with a lower loss."""
        return (new["top1"], -new["loss"]) > (best["top1"], -best["loss"])
