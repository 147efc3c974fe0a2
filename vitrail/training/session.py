"""Configuration, data, run folder, ranks and console of a training, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from vitrail.config import RunConfig
from vitrail.console import Console
from vitrail.data.setup import TrainData
from vitrail.device import pick_device
from vitrail.distributed import World
from vitrail.training.run_folder import Run


@dataclass(frozen=True)
class Session:
    """One run under way: how it is configured, on which data, in which folder, on which ranks, and who prints."""

    config: RunConfig
    data: TrainData
    run: Run
    world: World
    console: Console

    @cached_property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return pick_device(self.config.device)
