"""The optimizer: which parameters decay, and one update."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from vitrail.config import OptimConfig

# Added to every image alike, or a scale: pulling them to zero has no regularising meaning (Google's and DeiT's recipes).
_NO_DECAY = ("cls_token", "reg_token", "pos_embed", "latent")


def build_optimizer(model: nn.Module, config: OptimConfig, random: Collection[str] = ()) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019) in which matrices decay, and biases, norms, tokens and positions do not.

    With `layer_decay` every layer has groups of its own, whose `scale` multiplies the rate.

    Args:
        random: parameters that start at random beside trained ones; they learn at the full rate.
    """
    top = num_layers(model)
    layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = top if config.layer_decay == 1 or name in random else layer_of(name, top)
        decayed, exempt = layers.setdefault(layer, ([], []))
        no_decay = parameter.ndim < 2 or name.split(".")[-1] in _NO_DECAY
        (exempt if no_decay else decayed).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": weight_decay, "scale": config.layer_decay ** (top - layer)}
        for layer, pair in layers.items()
        for parameters, weight_decay in zip(pair, (config.weight_decay, 0.0), strict=True)
        if parameters
    ]
    # fused: one pass over memory a tensor instead of a dozen operations; also on CPUs.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def num_layers(model: nn.Module) -> int:
    """Return the number that `layer_of` gives a model's head: one more than it has blocks."""
    return 1 + len({name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("blocks.")})


def layer_of(name: str, top: int) -> int:
    """Return a parameter's layer: 0 what embeds the image, i + 1 block i, `top` norm, decoder and head (Bao et al. 2022,
    BEiT, appendix; MAE's `util/lr_decay.py`)."""
    part = name.split(".")
    if part[0] in ("patch_embed", "cls_token", "reg_token", "pos_embed"):
        return 0
    return int(part[1]) + 1 if part[0] == "blocks" else top


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


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the model's; early steps forget faster, so that the start does not linger.

    The ramp (1 + step) / (10 + step) is TensorFlow's `ExponentialMovingAverage(num_updates=…)`.
    """
    decay = min(decay, (1 + step) / (10 + step))
    means, weights = list[Tensor](average.parameters()), list[Tensor](model.parameters())
    torch._foreach_lerp_(means, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    # Batch norm's running statistics belong to the weights, and are averaged with them; its counters are copied.
    for (name, mean), value in zip(average.named_buffers(), model.buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            mean.lerp_(value, 1 - decay)
        elif name.endswith("num_batches_tracked"):
            mean.copy_(value)
