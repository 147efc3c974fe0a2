"""Batches: endless, shuffled and resumable for training; in order and complete for judging."""

from __future__ import annotations

import dataclasses
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vitrail.config import AugmentConfig
from vitrail.data.augment import augment_batch, crop_boxes, draw
from vitrail.data.decode import PictureError
from vitrail.data.mixing import Mix, erase_, mix_pairs_
from vitrail.data.preprocess import INTERPOLATIONS, Preprocess, to_array, unit_scale
from vitrail.data.sources import Source

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some labelled pictures on the device.

    Attributes:
        images: normalised model input [B, C, S, S].
        targets: class indices [B].
        indices: [B] which pictures of the source these are (host memory).
        patch_size: side of the patches to cut them into, where the step chose one; None leaves it to the model.
        mix: the other label of each picture and its own one's share, where pictures are mixed.
    """

    images: Tensor
    targets: Tensor
    indices: np.ndarray
    patch_size: int | None = None
    mix: Mix | None = None

    def part(self, start: int, stop: int) -> Batch:
        """Return some of the batch."""
        return Batch(
            self.images[start:stop],
            self.targets[start:stop],
            self.indices[start:stop],
            patch_size=self.patch_size,
            mix=None if self.mix is None else self.mix.part(start, stop),
        )


@dataclass(frozen=True)
class MixedBatch:
    """A batch whose pictures [C, H, W] differ in size: a model computes it by `forward_packed`."""

    images: list[Tensor]
    targets: Tensor
    indices: np.ndarray


@dataclass
class Pictures:
    """Random access to a source's pictures, from memory or from files.

    Attributes:
        targets: [N] class index of every picture, as the model numbers its classes.
        stored: decoded pictures uint8 [N, C, H, W], or None to read files.
        is_ready: whether the stored pictures are the model's input as they are.
        dropped: paths of files that failed after the scan, with the reason.
        told: those of them that the user was told of.
    """

    source: Source
    targets: np.ndarray
    preprocess: Preprocess
    stored: np.ndarray | None
    is_ready: bool = False
    workers: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.workers or os.cpu_count() or 1, thread_name_prefix="decode")

    def submit(self, read: Callable[[int, int], np.ndarray], indices: np.ndarray) -> list[Future[np.ndarray]]:
        """Start reading the pictures `indices` as `read(place in batch, index)` on the threads."""
        return [self.pool.submit(read, place, int(index)) for place, index in enumerate(indices)]

    def gather(self, futures: list[Future[np.ndarray]], indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pictures that were read [B, C, S, S] and their places; one that fails is dropped and noted."""
        pixels, places = self.collect(futures, indices)
        side = self.preprocess.image_size
        nothing = np.empty((0, self.preprocess.channels, side, side), dtype=np.uint8)
        return np.stack(pixels) if pixels else nothing, places

    def collect(self, futures: list[Future[np.ndarray]], indices: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the pictures that were read, each of its own size, and their places."""
        pixels, places = [], []
        for place, future in enumerate(futures):
            try:
                pixels.append(future.result())
                places.append(place)
            except (PictureError, OSError) as error:
                self.dropped[self.source.location(int(indices[place]))] = str(error)
        return pixels, np.asarray(places, dtype=np.int64)

    def check_some_left(self, read: int, wanted: int) -> None:
        """Raise a ValueError when all of some files have failed."""
        if wanted and not read:
            raise ValueError(f"none of {wanted} files can be read any more: {next(iter(self.dropped.items()))}")

    def for_judging(self, index: int) -> np.ndarray:
        """Return one picture as `Preprocess.apply` does: [C, S, S], or [C, H, W] with preprocessing `aspect`."""
        if self.stored is None:
            return self.preprocess.apply(self.source.read(index, self.preprocess.mode))
        pixels = self.stored[index]
        if self.is_ready:
            return pixels
        return self.preprocess.apply(PIL.Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)))


class TrainStream:
    """The training part as endless shuffled batches; batch `s` depends on nothing but the arguments and `s`.

    Step s takes positions s·B … s·B+B-1 of an endless row of epochs, each a permutation of the part: nothing is left
    out, and every batch is full.
    """

    def __init__(
        self,
        pictures: Pictures,
        part: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        augment: AugmentConfig,
        device: torch.device,
        patch_sizes: tuple[int, ...] = (),
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.patch_sizes = patch_sizes
        self.pictures, self.part, self.batch_size, self.seed = pictures, part, batch_size, seed
        self.augment, self.device, self.rank, self.ranks = augment, device, rank, ranks
        self.targets = torch.from_numpy(pictures.targets)
        self._orders: dict[int, np.ndarray] = {}

    def positions(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (epoch, place in the part) of every sample of this process in step `step` (from 0).

        A place, unlike a picture's number in the listing, stays when files are added to the folder.
        """
        share = self.batch_size // self.ranks
        start = step * self.batch_size + self.rank * share
        epochs, turns = np.divmod(np.arange(start, start + share), len(self.part))
        return epochs, np.asarray([self.order(int(epoch))[turn] for epoch, turn in zip(epochs, turns, strict=True)])

    def order(self, epoch: int) -> np.ndarray:
        """Return the part's places in this epoch's order."""
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._orders[epoch] = random.permutation(len(self.part))
        return self._orders[epoch]

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps `start` … `stop - 1`."""
        if self.pictures.stored is not None:
            yield from ahead((self.at(step, self.from_memory(step)) for step in range(start, stop)), self.device)
            return
        waiting: deque = deque()
        for step in range(start, stop + 2):  # two batches are being decoded while one is trained on
            if step < stop:
                waiting.append(self.start_reading(step))
            if step >= start + 2 and waiting:
                yield self.at(step - 2, self.from_files(*waiting.popleft()))

    def at(self, step: int, batch: Batch) -> Batch:
        """Return the batch with its step's patch size: the same on all processes, each as likely (FlexiViT, section 3)."""
        if not self.patch_sizes:
            return batch
        random = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, 1]))
        return dataclasses.replace(batch, patch_size=int(random.choice(self.patch_sizes)))

    def from_memory(self, step: int) -> Batch:
        """Augment stored pictures, crop included."""
        epochs, places = self.positions(step)
        indices = self.part[places]
        assert self.pictures.stored is not None
        stored = self.pictures.stored[indices]
        draws = draw(self.seed, epochs, places)
        size, target = (stored.shape[2], stored.shape[3]), self.pictures.preprocess.image_size
        cropped = self.augment.crop_scale < 1 or size != (target, target)
        boxes = crop_boxes(self.augment, draws, np.tile(size, (len(indices), 1))) if cropped else None
        return self.finish(stored, indices, draws, boxes, np.arange(len(indices)))

    def start_reading(self, step: int):
        """Start the threads on a batch: decode, random resized crop."""
        epochs, places = self.positions(step)
        indices = self.part[places]
        draws = draw(self.seed, epochs, places)

        def read(place: int, index: int) -> np.ndarray:
            preprocess = self.pictures.preprocess
            picture = self.pictures.source.read(index, preprocess.mode)
            if self.augment.crop_scale == 1.0:
                return preprocess.apply(picture)
            one = {name: values[place : place + 1] for name, values in draws.items()}
            left, top, width, height = crop_boxes(self.augment, one, np.asarray([[picture.height, picture.width]]))[0]
            box = (left, top, min(left + width, picture.width), min(top + height, picture.height))
            side = preprocess.image_size
            return to_array(picture.resize((side, side), INTERPOLATIONS[preprocess.interpolation], box=box))

        return indices, draws, self.pictures.submit(read, indices)

    def from_files(self, indices: np.ndarray, draws: dict[str, np.ndarray], futures: list[Future[np.ndarray]]) -> Batch:
        """Wait for a batch's files and do the rest of its augmentation."""
        pixels, places = self.pictures.gather(futures, indices)
        self.pictures.check_some_left(len(places), len(indices))
        draws = {name: values[places] for name, values in draws.items()}
        return self.finish(pixels, indices[places], draws, None, places)

    def finish(
        self,
        pixels: np.ndarray,
        indices: np.ndarray,
        draws: dict[str, np.ndarray],
        boxes: np.ndarray | None,
        places: np.ndarray,
    ) -> Batch:
        """Move to the device, augment there, normalise; pictures at `places` of the batch that follow each other are mixed."""
        preprocess = self.pictures.preprocess
        values = unit_scale(torch.from_numpy(pixels).to(self.device, non_blocking=True))
        images = augment_batch(values, self.augment, draws, boxes, preprocess.image_size)
        targets = self.targets[torch.from_numpy(indices)].to(self.device, non_blocking=True)
        images = erase_(preprocess.normalise(images), self.augment, draws)
        images, mix = mix_pairs_(images, targets, places, self.augment, draws)
        return Batch(images, targets, indices, mix=mix)


def judging_batches(
    pictures: Pictures, part: np.ndarray, *, batch_size: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> Iterator[Batch | MixedBatch]:
    """Yield every picture of a part exactly once, over all processes, unchanged but for the model's preprocessing.

    Batches are mixed where preprocessing keeps the aspect ratio and pictures have different ones.
    """
    mine = part[rank::ranks]
    targets = torch.from_numpy(pictures.targets)
    chunks = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    ready = pictures.is_ready
    waiting: deque = deque()
    num_read = 0
    for number in range(len(chunks) + 2):
        if number < len(chunks):
            chunk = chunks[number]
            read = pictures.submit(lambda _, index: pictures.for_judging(index), chunk) if not ready else None
            waiting.append((chunk, read))
        if number >= 2 and waiting:
            chunk, futures = waiting.popleft()
            if futures is None:
                assert pictures.stored is not None
                pixels, places = pictures.stored[chunk], np.arange(len(chunk))
            else:
                pixels, places = pictures.collect(futures, chunk)
            if not len(places):
                continue
            num_read += len(places)
            chosen = chunk[places]
            answers = targets[torch.from_numpy(chosen)].to(device, non_blocking=True)
            if len({each.shape for each in pixels}) > 1:
                images = [pictures.preprocess.normalise(torch.from_numpy(each).to(device)) for each in pixels]
                yield MixedBatch(images, answers, chosen)
            else:
                images = torch.from_numpy(np.asarray(pixels)).to(device, non_blocking=True)
                yield Batch(pictures.preprocess.normalise(images), answers, chosen)
    pictures.check_some_left(num_read, len(mine))


def ahead(items: Iterator[T], device: torch.device) -> Iterator[T]:
    """Prepare one item ahead on a thread where the device computes on its own; on a CPU that would only compete."""
    if device.type == "cpu":
        yield from items
        return
    ready: queue.Queue = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def fill() -> None:
        try:
            for item in items:
                while not stopped.is_set():
                    try:
                        ready.put((item, None), timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set():
                    return
            ready.put((None, None))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=fill, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
