"""A model's logits for some images of a dataset, every image once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.data.loading.eval_loader import VariableSizeBatch, eval_batches
from vitrail.data.loading.reader import ImageReader
from vitrail.data.loading.train_loader import Batch
from vitrail.distributed import World
from vitrail.models.vit import ViT

# One batch size everywhere, and fp32: `vitrail eval` computes the very bits that a training's evaluation computed.
BATCH = 256


@dataclass(frozen=True)
class Outputs:
    """What a model says of some images of a dataset, in the order of the images' indices.

    Attributes:
        logits: [N, classes] float32; of a model without a head, its pooled vectors.
        targets: [N] class indices.
        indices: [N] which images of the dataset these are.
    """

    logits: np.ndarray
    targets: np.ndarray
    indices: np.ndarray


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
    """Return the model's logits for some images; collective.

    Each rank computes its share, and every rank gets all. A file that can no longer be read is left out and noted in
    `reader.dropped`, on every rank.

    Args:
        patch_size: side of the patches, where it is not the model's own (FlexiViT).
        advance: called with the number done and the total, for a progress bar.

    Raises:
        ValueError: there are images, but none of them can be read.
    """
    share = Share()
    # Sharded weights are gathered into tensors that training uses again, so these must not be inference tensors.
    without_gradients = torch.inference_mode() if world.size == 1 else torch.no_grad()
    with evaluating(model), without_gradients:
        batches = eval_batches(
            reader, indices, batch_size=BATCH, device=device, rank=world.data_rank, ranks=world.data_size
        )
        for batch in batches:
            share.add(batch, logits_of(model, batch, patch_size))
            advance(min(share.count * world.data_size, len(indices)), len(indices))
        compute_padding(model, share.num_batches, len(indices), world, reader, device, patch_size)
    share.dropped = dict(reader.dropped)
    shares = world.gather(share)
    for each in shares:
        reader.dropped |= each.dropped
    reader.require_some(sum(each.count for each in shares), len(indices))
    return join_shares(shares, world)


class Share:
    """What one rank computes of some images' logits."""

    def __init__(self) -> None:
        self.logits: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.indices: list[np.ndarray] = []
        self.dropped: dict[str, str] = {}
        self.count = 0

    @property
    def num_batches(self) -> int:
        """How often the model was called."""
        return len(self.indices)

    def add(self, batch: Batch | VariableSizeBatch, logits: Tensor) -> None:
        """Add a batch's logits."""
        self.logits.append(logits.float().cpu().numpy())
        self.targets.append(batch.targets.cpu().numpy())
        self.indices.append(batch.indices)
        self.count += len(batch.indices)


def logits_of(model: nn.Module, batch: Batch | VariableSizeBatch, patch_size: int | None) -> Tensor:
    """Return the logits of a batch, whose images have one size or several."""
    if isinstance(batch, VariableSizeBatch):
        return cast(ViT, model).forward_packed(batch.images, patch_size)
    return model(batch.images, patch_size)


def compute_padding(
    model: nn.Module,
    done: int,
    num_images: int,
    world: World,
    reader: ImageReader,
    device: torch.device,
    patch_size: int | None,
) -> None:
    """Call the model as often as the rank with the largest share does.

    Where its weights are sharded, every call is collective: a rank with fewer batches would leave the others waiting.
    """
    if world.size == 1:
        return
    wanted = math.ceil(math.ceil(num_images / world.data_size) / BATCH)
    side = reader.preprocess.image_size
    for _ in range(wanted - done):
        model(torch.zeros(1, reader.preprocess.channels, side, side, device=device), patch_size)


def join_shares(shares: list[Share], world: World) -> Outputs:
    """Return the logits of all ranks in the order of the images' indices."""
    shares = shares[:: world.size // world.data_size]  # ranks that compute one share together have the same
    columns = [[each for share in shares for each in getattr(share, name)] for name in ("logits", "targets", "indices")]
    logits, targets, indices = (np.concatenate(column) for column in columns)
    order = np.argsort(indices, kind="stable")
    return Outputs(logits[order], targets[order], indices[order])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while; frozen modules that were in it already stay there."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
