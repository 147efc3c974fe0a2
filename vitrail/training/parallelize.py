"""An objective compiled and spread over ranks, from outside: neither the model nor the step knows of it."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.config import RunConfig
from vitrail.data.loading.train_loader import Batch
from vitrail.distributed import World
from vitrail.objectives.base import Objective
from vitrail.training.frozen import running_statistics

# Buffers are not sent before every forward pass: PyTorch has renamed the argument, and warns of the old name.
_ARGUMENTS = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_NO_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}


class ParallelObjective:
    """What a step calls in the objective's place: compiled, and with its gradients averaged over ranks."""

    def __init__(self, objective: Objective, config: RunConfig, world: World) -> None:
        self.objective, self.world = objective, world
        self.statistics = running_statistics(objective)
        self.wrapped: nn.Module = objective
        if config.compile:
            allow_graphs((1 + config.warms_head) * len(config.model.patch_sizes))
            objective.compile()

    def wrap(self) -> None:
        """Wrap the objective (again): the wrapping holds for the parameters that learn now."""
        if self.world.size > 1:
            self.wrapped = self.objective  # ends an earlier wrapping, which counts on other gradients
            self.wrapped = nn.parallel.DistributedDataParallel(self.objective, **_NO_BUFFERS)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the objective's figures of a batch."""
        return self.wrapped(batch)

    def gradients(self, *, shared: bool) -> contextlib.AbstractContextManager:
        """Return the context of a backward pass; only `shared` ones send gradients to the other ranks."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel) and not shared:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def average_statistics(self) -> None:
        """Bring batch norm's running statistics, which each rank has moved by its own share, together; collective."""
        self.world.mean_(self.statistics)


def allow_graphs(number: int) -> None:
    """Let torch.compile make so many graphs more, one a patch size: beyond its limit it goes on uncompiled."""
    config = torch._dynamo.config  # pyright: ignore[reportAttributeAccessIssue]
    config.recompile_limit += number
