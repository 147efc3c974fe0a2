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
from typing import NamedTuple, TypeVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vitrail.config import AugmentConfig
from vitrail.data.augment import augment_batch, crop_boxes, draw, is_plain
from vitrail.data.cache import PictureCache
from vitrail.data.decode import PictureError
from vitrail.data.preprocess import Preprocess
from vitrail.data.regions import Box, Choose, Cut
from vitrail.data.sources import Source

T = TypeVar("T")
Outcome = np.ndarray | PictureError | OSError  # of reading one picture

_CACHE_BYTES = 5 * 2**19  # of float pictures that are worked on at once; from 4 MB on it is three times slower


@dataclass(frozen=True)
class Batch:
    """Some labelled pictures on the device.

    Attributes:
        images: normalised model input [B, C, S, S].
        targets: class indices [B].
        indices: [B] which pictures of the source these are (host memory).
        patch_size: side of the patches to cut them into, where the step chose one; None leaves it to the model.
        weights: [B] what each picture counts in the loss; None where all count alike. Never in a judgement.
    """

    images: Tensor
    targets: Tensor
    indices: np.ndarray
    patch_size: int | None = None
    weights: Tensor | None = None

    def part(self, start: int, stop: int) -> Batch:
        """Return some of the batch."""
        chosen = slice(start, stop)
        weights = None if self.weights is None else self.weights[chosen]
        return dataclasses.replace(
            self,
            images=self.images[chosen],
            targets=self.targets[chosen],
            indices=self.indices[chosen],
            weights=weights,
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
        sizes: [N, 2] height and width of every picture; needed for training from files.
        fast: whether training may decode and resize faster, and a little differently; see `Cut`.
        cache: decoded training pictures on disk.
        dropped: paths of files that failed after the scan, with the reason.
        told: those of them that the user was told of.
    """

    source: Source
    targets: np.ndarray
    preprocess: Preprocess
    stored: np.ndarray | None
    is_ready: bool = False
    workers: int = 0
    sizes: np.ndarray | None = None
    fast: bool = False
    cache: PictureCache | None = None
    dropped: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.num_threads = self.workers or os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode")

    def submit(self, read: Callable[[int, int], np.ndarray], indices: np.ndarray) -> list[Future[list[Outcome]]]:
        """Start reading the pictures `indices` as `read(place in batch, index)` on the threads, some in a task.

        A task a picture would cost a tenth of an ImageNet picture's decoding, and more than a small one's.
        """

        def attempt(place: int) -> Outcome:
            try:
                return read(place, int(indices[place]))
            except (PictureError, OSError) as error:
                return error

        run = max(1, min(8, len(indices) // (2 * self.num_threads)))
        starts = range(0, len(indices), run)
        return [
            self.pool.submit(
                lambda first: [attempt(each) for each in range(first, min(first + run, len(indices)))], start
            )
            for start in starts
        ]

    def collect(self, futures: list[Future[list[Outcome]]], indices: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the pictures that were read, each of its own size, and their places; one that failed is noted."""
        pixels, places = [], []
        for place, found in enumerate(each for future in futures for each in future.result()):
            if isinstance(found, np.ndarray):
                pixels.append(found)
                places.append(place)
            else:
                self.dropped[self.source.location(int(indices[place]))] = str(found)
        return pixels, np.asarray(places, dtype=np.int64)

    @property
    def cut(self) -> Cut:
        """How training takes crops out of files."""
        preprocess = self.preprocess
        return Cut(preprocess.image_size, preprocess.interpolation, preprocess.mode, self.fast)

    def for_training(self, index: int, choose: Choose) -> np.ndarray:
        """Return a crop of one picture, uint8 [C, S, S]."""
        cut = self.cut
        if self.cache is None:
            return cut.read(self.source, index, choose)
        pixels = self.cache.read(index)
        return cut.resize(pixels, choose(pixels.shape[1], pixels.shape[0]), (cut.side, cut.side))

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


class _Reading(NamedTuple):
    """A batch that is being read; `images` is what the threads fill where they do all that there is to do."""

    indices: np.ndarray
    draws: dict[str, np.ndarray]
    futures: list[Future[list[Outcome]]]
    images: np.ndarray | None = None


class TrainStream:
    """The training part as endless shuffled batches; batch `s` depends on nothing but the arguments and `s`.

    `Order` says which pictures it has.

    Args:
        weights: [N] what each picture of the source counts in the loss; None where all count alike.
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
        sampling: str = "natural",
        weights: np.ndarray | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.patch_sizes = patch_sizes
        self.pictures, self.part, self.batch_size, self.seed = pictures, part, batch_size, seed
        self.augment, self.device, self.rank, self.ranks = augment, device, rank, ranks
        self.targets = torch.from_numpy(pictures.targets)
        self.weights = None if weights is None else torch.from_numpy(weights.astype(np.float32))
        self.order = Order(
            pictures.targets[part], batch_size=batch_size, seed=seed, sampling=sampling, repeats=augment.repeats
        )

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
                yield self.at(step - 2, self.from_files(waiting.popleft()))

    def at(self, step: int, batch: Batch) -> Batch:
        """Return the batch with its step's patch size: the same on all processes, each as likely (FlexiViT, section 3)."""
        if not self.patch_sizes:
            return batch
        random = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, 1]))
        return dataclasses.replace(batch, patch_size=int(random.choice(self.patch_sizes)))

    def from_memory(self, step: int) -> Batch:
        """Augment stored pictures, crop included."""
        occasions, places = self.order.at(step, self.rank, self.ranks)
        indices = self.part[places]
        assert self.pictures.stored is not None
        stored = self.pictures.stored[indices]
        draws = draw(self.seed, occasions, places)
        size, target = (stored.shape[2], stored.shape[3]), self.pictures.preprocess.image_size
        cropped = self.augment.crop_scale < 1 or size != (target, target)
        boxes = crop_boxes(self.augment, draws, np.tile(size, (len(indices), 1))) if cropped else None
        return self.finish(stored, indices, draws, boxes)

    def start_reading(self, step: int) -> _Reading:
        """Start the threads on a batch: decode, random resized crop; on a CPU also mirror and normalise if that is all."""
        epochs, places = self.positions(step)
        indices = self.part[places]
        draws = draw(self.seed, epochs, places)
        preprocess, sizes = self.pictures.preprocess, self.pictures.sizes
        boxes = None
        if self.augment.crop_scale < 1:
            assert sizes is not None
            boxes = crop_boxes(self.augment, draws, sizes[indices])

        def read(place: int, index: int) -> np.ndarray:
            if boxes is None:
                return self.pictures.for_judging(index)
            assert sizes is not None
            high, wide = sizes[index].tolist()
            box = Box(*boxes[place].tolist())
            # The size differs from the listed one in the cache, or when the file was replaced.
            return self.pictures.for_training(index, lambda width, height: box.scaled(width / wide, height / high))

        if self.device.type != "cpu" or not is_plain(self.augment):
            return _Reading(indices, draws, self.pictures.submit(read, indices))
        flip, vertical = draws["flip"] < self.augment.flip, draws["vertical"] < self.augment.vertical_flip
        images = np.empty((len(indices), preprocess.channels, preprocess.image_size, preprocess.image_size), np.float32)

        def read_and_finish(place: int, index: int) -> np.ndarray:
            pixels = read(place, index)[:, :: -1 if vertical[place] else 1, :: -1 if flip[place] else 1]
            preprocess.normalise_into(images[place], pixels)
            return images[place]

        return _Reading(indices, draws, self.pictures.submit(read_and_finish, indices), images)

    def from_files(self, reading: _Reading) -> Batch:
        """Wait for a batch's files and do the rest of its augmentation."""
        indices, draws, images = reading.indices, reading.draws, reading.images
        pixels, places = self.pictures.collect(reading.futures, indices)
        self.pictures.check_some_left(len(places), len(indices))
        left = indices[places]
        if images is None:
            return self.finish(np.stack(pixels), left, {name: values[places] for name, values in draws.items()}, None)
        if len(left) < len(indices):
            images = images[places]
        return Batch(torch.from_numpy(images), self.targets[torch.from_numpy(left)], left)

    def finish(
        self, pixels: np.ndarray, indices: np.ndarray, draws: dict[str, np.ndarray], boxes: np.ndarray | None
    ) -> Batch:
        """Move to the device, augment there, normalise."""
        side = self.pictures.preprocess.image_size
        values = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        images = empty_batch((len(values), values.shape[1], side, side), self.device)
        chunk = len(images)
        if self.device.type == "cpu":  # what the caches hold: each step of the work then finds what the last one wrote
            chunk = max(1, _CACHE_BYTES // (4 * images[0].numel()))
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            some = {name: each[part] for name, each in draws.items()}
            changed = augment_batch(values[part], self.augment, some, boxes[part] if boxes is not None else None, side)
            self.pictures.preprocess.normalise(changed, out=images[part])
        targets = self.targets[torch.from_numpy(indices)].to(self.device, non_blocking=True)
        return Batch(images, targets, indices)


def empty_batch(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return memory for float pictures; on a CPU from NumPy, which asks for huge pages: fresh memory costs a fourth."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, dtype=np.float32))
    return torch.empty(shape, device=device)


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
