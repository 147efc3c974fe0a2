"""The optimizers by name, and what one update needs besides them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrail.config import OptimConfig
from vitrail.lookup import pick
from vitrail.optim.groups import Group


class OptimizerKind(NamedTuple):
    """An optimizer that `optim.name` can name.

    What the loop needs of it: its state stands in `state[parameter]`, as tensors only, since nothing else is saved (not what
    changes in `param_groups`); its groups keep `scale`, which `set_lr` multiplies the learning rate by; and its `step` does
    nothing while its attribute `found_inf` is 1, as PyTorch's fused optimizers do, so that a gradient that is not finite never
    reaches the weights.

    Attributes:
        build: makes it from parameter groups.
        to_eval, to_train: bring the weights to the point that is evaluated and saved, and back to the one that is trained;
            for optimizers that train at another point than they evaluate at (schedule-free ones).
    """

    build: Callable[[list[Group], OptimConfig], torch.optim.Optimizer]
    to_eval: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None
    to_train: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None


def build_adamw(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019)."""
    # fused: one pass over memory a tensor instead of a dozen operations; also on CPUs.
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
    return torch.optim.AdamW([as_param_group(group, config) for group in groups], **settings)


OPTIMIZERS: dict[str, OptimizerKind] = {"adamw": OptimizerKind(build_adamw)}


def build_optimizer(groups: list[Group], config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `optim.name` names.

    Raises:
        ValueError: there is none of this name.
    """
    return pick(OPTIMIZERS, config.name, "optim.name").build(groups, config)


@contextlib.contextmanager
def at_evaluation_point(optimizer: torch.optim.Optimizer, config: OptimConfig) -> Iterator[None]:
    """Switch an optimizer that trains at another point (schedule-free) to its evaluation weights, for the length of the context."""
    kind = pick(OPTIMIZERS, config.name, "optim.name")
    kind.to_eval(optimizer)
    try:
        yield
    finally:
        kind.to_train(optimizer)


def as_param_group(group: Group, config: OptimConfig) -> dict[str, object]:
    """Return a group as PyTorch's optimizers take it."""
    weight_decay = config.weight_decay if group.decay else 0.0
    return {"params": group.params, "weight_decay": weight_decay, "scale": group.scale, "name": group.name}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def clip_gradient(model: nn.Module, limit: float) -> Tensor:
    """Scale the whole gradient down to `limit` (0: leave it); returns its norm before, without a device sync."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if limit:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm
