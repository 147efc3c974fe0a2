"""Where numbers stopped being finite: the first weights or the first layer whose values are NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.data.loading.reader import ImageReader
from vitrail.evaluation.predict_logits import Outputs, evaluating


class NotFinite(ValueError):
    """A loss, a gradient or an output is NaN or infinite; no checkpoint of such a state is written."""


def require_finite(outputs: Outputs, model: nn.Module, reader: ImageReader) -> None:
    """Raise `NotFinite` with a diagnosis unless every output is finite.

    Collective: every rank has all outputs, and computes the first broken one again.
    """
    broken = np.flatnonzero(~np.isfinite(outputs.logits).all(axis=1))
    if not len(broken):
        return
    index = int(outputs.indices[broken[0]])
    pixels = torch.from_numpy(reader.read_whole(index))[None].to(next(model.parameters()).device)
    images = reader.preprocess.normalise(pixels)
    with evaluating(model):
        cause = first_broken(model, images, lambda: model(images)) or "Every layer's output is finite on that image now"
    raise NotFinite(
        f"for {len(broken)} validation images, first {reader.dataset.location(index)}, the model's output is not finite. "
        f"{cause}. The saved state is from before; try a lower --optim.lr or a longer --schedule.warmup"
    )


@torch.no_grad()
def first_broken(model: nn.Module, images: Tensor, compute: Callable[[], object]) -> str:
    """Name the first thing that is not finite, in the order of computing; empty where all is finite.

    Collective where the model is sharded.

    Args:
        model: whose weights and layers are examined.
        images: its input.
        compute: calls the model.
    """
    # Everything is looked at on every rank, whatever is found first: where weights are sharded, each look is collective.
    weights = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    broken: list[str] = []
    hooks = [
        module.register_forward_hook(_recorder(name, broken))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        compute()
    finally:
        for hook in hooks:
            hook.remove()
    if not is_finite(images):
        return "The input images themselves hold such numbers"
    if weights:
        return f"The weights {weights[0]} are broken already"
    return f"The first layer with such an output is {broken[0]}" if broken else ""


def _recorder(name: str, broken: list[str]):
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if not all(is_finite(each) for each in outputs if isinstance(each, Tensor)):
            broken.append(name)

    return record


def is_finite(values: Tensor) -> bool:
    """Whether every value is a finite number."""
    return bool(torch.isfinite(values).all())
