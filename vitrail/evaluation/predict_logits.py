"""Run a model over a part of a dataset, every image once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from vitrail.data.loading.eval_loader import VariableSizeBatch, eval_batches
from vitrail.data.loading.reader import ImageReader
from vitrail.distributed import World
from vitrail.evaluation.metrics import Outputs
from vitrail.models.vit import ViT

# One batch size everywhere, and fp32: `vitrail eval` computes the very bits that training's evaluation computed.
BATCH = 256


def predict_logits(
    model: nn.Module,
    reader: ImageReader,
    indices: np.ndarray,
    *,
    device: torch.device,
    patch_size: int | None = None,
    world: World = World(),  # noqa: B008 - frozen
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Outputs:
    """Return the model's logits for every image of a part.

    Under several processes each does its share, and every process gets all. A file that can no longer be read is left
    out and noted in `images.dropped`.

    Args:
        patch_size: side of the patches, where it is not the model's own (FlexiViT).
        advance: called with the number done and the total, for a progress bar.
    """
    logits, targets, seen, done = [], [], [], 0
    with evaluating(model), torch.inference_mode():
        for batch in eval_batches(reader, indices, batch_size=BATCH, device=device, rank=world.rank, ranks=world.size):
            if isinstance(batch, VariableSizeBatch):
                found = cast(ViT, model).forward_packed(batch.images, patch_size)
            else:
                found = model(batch.images, patch_size)
            logits.append(found.float().cpu().numpy())
            targets.append(batch.targets.cpu().numpy())
            seen.append(batch.indices)
            done += len(batch.indices) * world.size
            advance(min(done, len(indices)), len(indices))
    mine = (logits, targets, seen)
    shares = [mine]
    if world.size > 1:
        shares = [mine] * world.size
        dist.all_gather_object(shares, mine)
    columns = [np.concatenate([chunk for share in shares for chunk in share[column]]) for column in range(3)]
    order = np.argsort(columns[2], kind="stable")
    return Outputs(*(column[order] for column in columns))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while; frozen parts that were in it already stay there."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
