"""Batches for training: endless, shuffled and resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitrail.config import AugmentConfig
from vitrail.data.augment.erasing import erase_
from vitrail.data.augment.mixup import MixTargets, mix_pairs_
from vitrail.data.augment.random_changes import augment_batch, crop_boxes, draw_changes
from vitrail.data.loading.crop_decode import Box
from vitrail.data.loading.reader import ImageReader, ReadResult, attempt
from vitrail.data.loading.sampler import Sampler

T = TypeVar("T")

_VIEW = 2**32  # visits from one view of an image to the next; more than an image ever gets
_CACHE_BYTES = 5 * 2**19  # of float images that a thread works on at once; from 4 MB on it is three times slower


@dataclass(frozen=True)
class Batch:
    """Some labelled images on the device.

    Attributes:
        images: normalised model input [B, C, S, S].
        targets: class indices [B].
        indices: [B] which images of the dataset these are (host memory).
        patch_size: side of the patches to cut them into, where the step chose one; None leaves it to the model.
        weights: [B] what each image counts in the loss; None where all count alike. Never in an evaluation.
        mix: the other label of each image and its own one's share, where images are mixed.
        views: differently augmented views of the images [B, C, S, S] each, never mixed, where several were asked for; the
            first one is `images` before any mixing.
    """

    images: Tensor
    targets: Tensor
    indices: np.ndarray
    patch_size: int | None = None
    weights: Tensor | None = None
    mix: MixTargets | None = None
    views: tuple[Tensor, ...] = ()

    def take(self, start: int, stop: int) -> Batch:
        """Return some of the batch."""
        chosen = slice(start, stop)
        weights = None if self.weights is None else self.weights[chosen]
        return dataclasses.replace(
            self,
            images=self.images[chosen],
            targets=self.targets[chosen],
            indices=self.indices[chosen],
            weights=weights,
            mix=None if self.mix is None else self.mix.take(start, stop),
            views=tuple(view[chosen] for view in self.views),
        )


# Normalised images [n, C, S, S] and their positions in the batch; failed ones are not there.
Assembled = tuple[Tensor, np.ndarray]


class _Step(NamedTuple):
    """A batch on its way; each of `views` waits for the images of one view."""

    indices: np.ndarray
    draws: dict[str, np.ndarray]
    views: list[Callable[[], Assembled]]


class TrainLoader:
    """The training split as endless shuffled batches; batch `s` depends on nothing but the arguments and `s`.

    `Sampler` decides which images each step has.

    Args:
        weights: [N] what each image of the dataset counts in the loss; None where all count alike.
        num_views: differently augmented views of each image; with 1 a batch has its images only.
    """

    def __init__(
        self,
        reader: ImageReader,
        indices: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        augment: AugmentConfig,
        device: torch.device,
        patch_sizes: tuple[int, ...] = (),
        sampling: str = "natural",
        weights: np.ndarray | None = None,
        num_views: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.patch_sizes, self.num_views = patch_sizes, num_views
        self.reader, self.indices, self.batch_size, self.seed = reader, indices, batch_size, seed
        self.augment_config, self.device, self.rank, self.ranks = augment, device, rank, ranks
        self.targets = torch.from_numpy(reader.targets)
        self.weights = None if weights is None else torch.from_numpy(weights.astype(np.float32))
        self.sampler = Sampler(
            reader.targets[indices], batch_size=batch_size, seed=seed, sampling=sampling, repeats=augment.repeats
        )

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps `start` … `stop - 1`."""
        batch_images = self.batches_in_order(start, stop)
        yield from batch_images if self.device.type == "cpu" or self.reader.stored is None else prefetch(batch_images)

    def batches_in_order(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield batches; while one is trained on, the threads decode the next two, or augment the next one in memory."""
        waiting: deque[_Step] = deque()
        depth = 2 if self.reader.stored is None else 1
        for step in range(start, stop + depth):
            if step < stop:
                waiting.append(self.submit(step))
            if step >= start + depth:
                yield self.with_patch_size(step - depth, self.collate(waiting.popleft()))

    def with_patch_size(self, step: int, batch: Batch) -> Batch:
        """Return the batch with its step's patch size: the same on all processes, each as likely (FlexiViT, section 3)."""
        if not self.patch_sizes:
            return batch
        random = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, 1]))
        return dataclasses.replace(batch, patch_size=int(random.choice(self.patch_sizes)))

    def submit(self, step: int) -> _Step:
        """Start the threads on a batch. On a CPU they do all of an image's work; else they read, and the device does the rest."""
        visits, positions = self.sampler.samples(step, self.rank, self.ranks)
        indices = self.indices[positions]
        # What a view shows does not depend on how many there are: each has visits of its own.
        draws = [draw_changes(self.seed, visits + number * _VIEW, positions) for number in range(self.num_views)]
        make = self.from_files if self.reader.stored is None else self.from_memory
        return _Step(indices, draws[0], [make(indices, each) for each in draws])

    def collate(self, step: _Step) -> Batch:
        """Wait for a batch's images and do what concerns several of them."""
        views, positions = common_images([wait() for wait in step.views])
        images = views[0]
        if self.num_views == 1:
            views = ()
        elif self.augment_config.mixes:
            images = images.clone()
        indices = step.indices[positions]
        chosen = torch.from_numpy(indices)
        targets = self.targets[chosen].to(self.device, non_blocking=True)
        weights = None if self.weights is None else self.weights[chosen].to(self.device)
        images, mix = mix_pairs_(images, targets, positions, self.augment_config, take(step.draws, positions), weights)
        return Batch(images, targets, indices, weights=weights, mix=mix, views=views)

    def from_memory(self, indices: np.ndarray, draws: dict[str, np.ndarray]) -> Callable[[], Assembled]:
        """Augment stored images, crop included."""
        stored, side = self.reader.stored, self.reader.preprocess.image_size
        assert stored is not None
        boxes, count, size = None, len(indices), stored.shape[2:]
        if self.augment_config.crop_scale < 1 or size != (side, side):
            boxes = crop_boxes(self.augment_config, draws, np.tile(size, (count, 1)))
        images = self.allocate(count)

        def make(positions: range) -> None:
            part = slice(positions.start, positions.stop)
            pixels = torch.from_numpy(stored[indices[part]]).to(self.device, non_blocking=True)
            self.augment(pixels, take(draws, part), None if boxes is None else boxes[part], images[part])

        if self.device.type == "cpu":
            # One by one, calls would cost more than pixels; independent of the number of threads, as all is.
            futures = self.reader.submit(make, count, self.chunk_size(max(-(-count // 8), min(64, -(-count // 2)))))
        else:
            futures = []
            make(range(count))

        def wait() -> Assembled:
            for future in futures:
                future.result()
            return images, np.arange(count)

        return wait

    def from_files(self, indices: np.ndarray, draws: dict[str, np.ndarray]) -> Callable[[], Assembled]:
        """Decode, crop and resize, then do the rest; a file that fails is left out."""
        sizes, count, boxes = self.reader.sizes, len(indices), None
        if self.augment_config.crop_scale < 1:
            assert sizes is not None
            boxes = crop_boxes(self.augment_config, draws, sizes[indices])
        on_cpu = self.device.type == "cpu"
        images = self.allocate(count) if on_cpu else None

        def read(position: int) -> np.ndarray:
            index = int(indices[position])
            if boxes is None or sizes is None:
                return self.reader.read_whole(index)
            high, wide = sizes[index].tolist()
            box = Box(*boxes[position].tolist())
            # The size differs from the listed one in the cache, or when the file was replaced.
            return self.reader.read_crop(index, lambda width, height: box.scaled(width / wide, height / high))

        def make(positions: range) -> list[ReadResult]:
            found = [attempt(read, position) for position in positions]
            pixels = {
                position: each for position, each in zip(positions, found, strict=True) if isinstance(each, np.ndarray)
            }
            if images is None or not pixels:
                return found
            part = slice(positions.start, positions.stop) if len(pixels) == len(positions) else np.asarray(list(pixels))
            batch_images = images[part]  # a view where all were read, else a copy
            self.augment(torch.from_numpy(np.stack(list(pixels.values()))), take(draws, part), None, batch_images)
            images[part] = batch_images
            return found

        futures = self.reader.submit(make, count, self.chunk_size(-(-count // 8)))

        def wait() -> Assembled:
            pixels, positions = self.reader.collect(futures, indices)
            self.reader.require_some(len(positions), count)
            if images is not None:
                return images if len(positions) == count else images[torch.from_numpy(positions)], positions
            batch_images = self.allocate(len(positions))
            onto = torch.from_numpy(np.stack(pixels)).to(self.device, non_blocking=True)
            self.augment(onto, take(draws, positions), None, batch_images)
            return batch_images, positions

        return wait

    def allocate(self, count: int) -> Tensor:
        """Return memory for a batch; on a CPU from NumPy, which asks for huge pages, a fourth of the cost of others."""
        preprocess = self.reader.preprocess
        shape = (count, preprocess.channels, preprocess.image_size, preprocess.image_size)
        if self.device.type == "cpu":
            return torch.from_numpy(np.empty(shape, np.float32))
        return torch.empty(shape, device=self.device)

    def chunk_size(self, wanted: int) -> int:
        """Return how many images a thread works on at once: as many as wanted, if the caches hold them."""
        preprocess = self.reader.preprocess
        return max(1, min(wanted, _CACHE_BYTES // (4 * preprocess.channels * preprocess.image_size**2)))

    def augment(self, pixels: Tensor, draws: dict[str, np.ndarray], boxes: np.ndarray | None, out: Tensor) -> None:
        """Augment and normalise images [B, C, H, W] on their device, into `out`.

        Args:
            boxes: crops that are yet to be taken.
        """
        preprocess = self.reader.preprocess
        preprocess.normalise(augment_batch(pixels, self.augment_config, draws, boxes, preprocess.image_size), out=out)
        erase_(out, self.augment_config, draws)


def common_images(views: list[Assembled]) -> tuple[tuple[Tensor, ...], np.ndarray]:
    """Return views of the same images, and their positions in the batch; what failed in one view is in none."""
    positions = views[0][1]
    for _, other in views[1:]:
        positions = np.intersect1d(positions, other)
    return tuple(
        images if len(own) == len(positions) else images[torch.from_numpy(np.searchsorted(own, positions))]
        for images, own in views
    ), positions


def take(draws: dict[str, np.ndarray], positions: np.ndarray | slice) -> dict[str, np.ndarray]:
    """Return the random numbers of some of a batch's images."""
    return {name: values[positions] for name, values in draws.items()}


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Prepare items ahead on a thread, for a GPU, which computes on its own."""
    ready: queue.Queue = queue.Queue(maxsize=2)
    stopped = threading.Event()
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    def put(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error), timeout=0.2)
                return

    def fill() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # a thread begins on the first one
            for item in items:
                put(item, None)
                if stopped.is_set():
                    return
            put(None, None)
        except BaseException as error:
            put(None, error)

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
