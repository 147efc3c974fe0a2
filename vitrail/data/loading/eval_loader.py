"""Batches for evaluation: every image once, in order, by the model's own preprocessing."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitrail.data.loading.reader import ImageReader, ReadResult, attempt
from vitrail.data.loading.train_loader import Batch


@dataclass(frozen=True)
class VariableSizeBatch:
    """A batch whose images [C, H, W] differ in size: a model computes it by `forward_packed`."""

    images: list[Tensor]
    targets: Tensor
    indices: np.ndarray


def eval_batches(
    reader: ImageReader, indices: np.ndarray, *, batch_size: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> Iterator[Batch | VariableSizeBatch]:
    """Yield every image exactly once, over all ranks, unchanged but for the model's preprocessing.

    A batch has images of several sizes where preprocessing keeps the aspect ratio. Files that can no longer be read are
    left out and noted in `reader.dropped`.
    """
    mine = indices[rank::ranks]
    targets = torch.from_numpy(reader.targets)
    chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    waiting: deque = deque()
    for number in range(len(chunks) + 2):
        if number < len(chunks):
            chunk = chunks[number]
            waiting.append((chunk, None if reader.is_ready else start_reading(reader, chunk)))
        if number >= 2 and waiting:
            chunk, futures = waiting.popleft()
            if futures is None:
                assert reader.stored is not None
                pixels, positions = reader.stored[chunk], np.arange(len(chunk))
            else:
                pixels, positions = reader.collect(futures, chunk)
            if not len(positions):
                continue
            chosen = chunk[positions]
            answers = targets[torch.from_numpy(chosen)].to(device, non_blocking=True)
            if len({each.shape for each in pixels}) > 1:
                images = [reader.preprocess.normalise(torch.from_numpy(each).to(device)) for each in pixels]
                yield VariableSizeBatch(images, answers, chosen)
            else:
                images = torch.from_numpy(np.asarray(pixels)).to(device, non_blocking=True)
                yield Batch(reader.preprocess.normalise(images), answers, chosen)


def start_reading(reader: ImageReader, chunk: np.ndarray) -> list[Future[list[ReadResult]]]:
    """Start the threads on some images."""

    def read(positions: range) -> list[ReadResult]:
        return [attempt(lambda position: reader.read_whole(int(chunk[position])), position) for position in positions]

    return reader.submit(read, len(chunk), max(1, min(8, -(-len(chunk) // 8))))
