"""The running average of a model's weights (EMA); a teacher of self-distillation is the same thing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Average(nn.Module):
    """The exponential moving average of a model's weights, as a model of its own that does not learn.

    Attributes:
        model: the averaged model; a copy at first.
        decay: what a step keeps of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the model after update number `step` (from 1); early steps forget faster.

        So the random start does not linger. The ramp (1 + step) / (10 + step) is TensorFlow's
        `ExponentialMovingAverage(num_updates=…)`.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        means, weights = list[Tensor](self.model.parameters()), list[Tensor](model.parameters())
        torch._foreach_lerp_(means, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        # Batch norm's running statistics belong to the weights, and are averaged with them; its counters are copied.
        for (name, mean), value in zip(self.model.named_buffers(), model.buffers(), strict=True):
            if name.endswith(("running_mean", "running_var")):
                mean.lerp_(value, 1 - decay)
            elif name.endswith("num_batches_tracked"):
                mean.copy_(value)
