"""The first steps of a fine-tuning, in which only the head learns, and what starts at random."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vitrail.config import RunConfig
from vitrail.objectives.base import Objective
from vitrail.training.frozen import within
from vitrail.weights.adapt import Start


class HeadWarmup:
    """Lets the head learn alone at first, then all that learns in the run.

    Args:
        last_step: the last step in which the head learns alone; 0: all learn from the start.
    """

    def __init__(self, objective: Objective, config: RunConfig, start: Start, last_step: int) -> None:
        self.model, self.last_step = next(objective.vits()), last_step
        self.all = trainable_parameters(self.model)
        self.first = head_warmup_parameters(self.model, config, start) if last_step else {}
        self.entered = False

    def enter(self, step: int) -> bool:
        """Let the right parameters learn in a step; returns whether others learn now than in the step before."""
        if self.entered and step != self.last_step + 1:
            return False
        set_trainable(self.model, self.all, self.first if step <= self.last_step else self.all)
        self.entered = True
        return True


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def head_warmup_parameters(model: nn.Module, config: RunConfig, start: Start) -> dict[str, nn.Parameter]:
    """Return what learns during `optim.head_warmup`: of what learns at all, the head and what started at random.

    Raises:
        ValueError: none of it may learn.
    """
    own_encoder = bool(config.encoder_weights)
    first = {
        name: parameter
        for name, parameter in trainable_parameters(model).items()
        if within(name, "head") or name in start.random or (own_encoder and not within(name, "patch_embed.backbone"))
    }
    if not first:
        raise ValueError(
            f"optim.head_warmup {config.optim.head_warmup!r} lets only the head learn, but optim.freeze "
            f"{' '.join(config.optim.freeze)} holds it; leave one of them out"
        )
    return first


def set_trainable(model: nn.Module, all_trainable: Mapping[str, nn.Parameter], now: Mapping[str, nn.Parameter]) -> None:
    """Let only some of the parameters that learn in a run do so now; batch norms that do not keep their statistics.

    What comes before the first of them in the model is then computed without keeping anything for a backward pass.
    """
    for name, parameter in all_trainable.items():
        parameter.requires_grad_(name in now)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in all_trainable:
            module.train(f"{name}.weight" in now)
