"""Parts of a model that do not learn, and batch norm's statistics."""

from __future__ import annotations

import torch
from torch import nn

from vitrail.lookup import unknown


def freeze(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Make parts of a model stay as they are: no gradients, and evaluation mode.

    In evaluation mode a frozen batch norm uses its statistics as they are and does not move them.

    Args:
        parts: names of modules or parameters, such as `patch_embed.backbone`, `blocks.0` or `pos_embed`.

    Raises:
        ValueError: a name is not in the model, or nothing would be left to train.
    """
    for part in parts:
        found = [name for name, _ in model.named_parameters() if within(name, part)]
        if not found:
            modules = [
                name for name, module in model.named_modules() if name and any(True for _ in module.parameters())
            ]
            names = [name for name, _ in model.named_parameters() if "." not in name] + modules
            raise ValueError(unknown("part in optim.freeze", part, [name for name in names if name.count(".") < 2]))
    for name, parameter in model.named_parameters():
        if any(within(name, part) for part in parts):
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if any(within(name, part) for part in parts):
            module.eval()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"optim.freeze {' '.join(parts)} leaves nothing to train")


def within(name: str, part: str) -> bool:
    """Whether a parameter's or a module's name is `part` or lies in it."""
    return name == part or name.startswith(part + ".")


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms of a model that move their statistics."""
    kind = nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kind) and module.training]


def scale_bn_momentum(model: nn.Module, num_micro_batches: int) -> None:
    """Rescale the momentum of batch norms so that several micro-batches move their statistics as one batch would.

    Each normalises with its own mean and deviation, so it should not be tiny: that is what accumulation of a
    net with batch norm means.
    """
    for norm in batch_norms(model):
        if norm.momentum is not None:
            norm.momentum = 1 - (1 - norm.momentum) ** (1 / num_micro_batches)


def running_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Return the running means and variances that training moves."""
    found = [[norm.running_mean, norm.running_var] for norm in batch_norms(model)]
    return [values for pair in found for values in pair if values is not None]
