"""Where numbers stopped being finite: the step, the files, the first layer."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.data.loading.reader import ImageReader
from vitrail.data.loading.train_loader import Batch, TrainLoader
from vitrail.evaluation.metrics import Outputs
from vitrail.evaluation.predict_logits import evaluating
from vitrail.models.vit import ViT


class NotFinite(ValueError):
    """The loss or the gradient is not a finite number; no checkpoint of this state is written."""


def check_finite(
    first_step: int,
    losses: list[float],
    norms: list[float],
    model: ViT,
    loader: TrainLoader,
    precision: contextlib.AbstractContextManager,
) -> None:
    """Raise `NotFinite` with a diagnosis when a step's loss or gradient norm is NaN or infinite.

    Args:
        first_step: the step (from 1) of the first value.
        precision: the mixed precision of the run, in which the step is looked at again.
    """
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), first_step):
        if math.isfinite(loss) and math.isfinite(norm):
            continue
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        batch = next(iter(loader.batches(step - 1, step)))
        with precision:
            found = first_broken(model, batch)
        files = [loader.reader.dataset.location(int(index)) for index in batch.indices[:5]]
        raise NotFinite(
            f"step {step}: {what}. {found}. The batch's files begin with {', '.join(files)}. "
            "The saved state is from before; try a lower --optim.lr, a longer --schedule.warmup or --precision fp32"
        )


def check_outputs(step: int, outputs: Outputs, model: ViT, reader: ImageReader) -> None:
    """Raise `NotFinite` with a diagnosis when an evaluation met numbers that are NaN or infinite."""
    broken = np.flatnonzero(~np.isfinite(outputs.logits).all(axis=1))
    if not len(broken):
        return
    index = int(outputs.indices[broken[0]])
    pixels = torch.from_numpy(reader.read_whole(index))[None].to(next(model.parameters()).device)
    batch = Batch(reader.preprocess.normalise(pixels), torch.zeros(1), np.asarray([index]))
    with evaluating(model):
        found = first_broken(model, batch)
    raise NotFinite(
        f"step {step}: for {len(broken)} validation images, first {reader.dataset.location(index)}, the model's output "
        f"is not finite. {found}. The saved state is from before; try a lower --optim.lr or a longer --schedule.warmup"
    )


@torch.no_grad()
def first_broken(model: ViT, batch: Batch) -> str:
    """Name the first thing that is not finite, in the order of computing."""
    if not finite(batch.images):
        return "The input images themselves hold such numbers"
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            return f"The weights {name} are broken already"
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if not any(module.children()):
            hooks.append(module.register_forward_hook(_recorder(name, found)))
    try:
        model(batch.images, batch.patch_size)
    finally:
        for hook in hooks:
            hook.remove()
    return (
        f"The first layer with such an output is {found[0]}"
        if found
        else "Every layer's output is finite on that batch now"
    )


def _recorder(name: str, found: list[str]):
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if not all(finite(each) for each in outputs if isinstance(each, Tensor)):
            found.append(name)

    return record


def finite(values: Tensor) -> bool:
    """Whether every value is a finite number."""
    return bool(torch.isfinite(values).all())
