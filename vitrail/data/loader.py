"""Batches for training: endless, shuffled and resumable."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitrail.config import AugmentConfig
from vitrail.data.augment import augment_batch, crop_boxes, draw
from vitrail.data.mixing import Mix, erase_, mix_pairs_
from vitrail.data.order import Order
from vitrail.data.pictures import Outcome, Pictures, attempt
from vitrail.data.regions import Box

T = TypeVar("T")

_CACHE_BYTES = 5 * 2**19  # of float pictures that a thread works on at once; from 4 MB on it is three times slower
_SMALLEST_RUN = 32  # pictures in a task, where so many are small enough: one by one, calls cost more than pixels


@dataclass(frozen=True)
class Batch:
    """Some labelled pictures on the device.

    Attributes:
        images: normalised model input [B, C, S, S].
        targets: class indices [B].
        indices: [B] which pictures of the source these are (host memory).
        patch_size: side of the patches to cut them into, where the step chose one; None leaves it to the model.
        weights: [B] what each picture counts in the loss; None where all count alike. Never in a judgement.
        mix: the other label of each picture and its own one's share, where pictures are mixed.
    """

    images: Tensor
    targets: Tensor
    indices: np.ndarray
    patch_size: int | None = None
    weights: Tensor | None = None
    mix: Mix | None = None

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
            mix=None if self.mix is None else self.mix.part(start, stop),
        )


class _Step(NamedTuple):
    """A batch that is being made.

    Attributes:
        boxes: crops that are yet to be taken, of pictures in memory.
        images: on a CPU, what the threads fill; elsewhere they only read, and the device does the rest.
    """

    indices: np.ndarray
    draws: dict[str, np.ndarray]
    boxes: np.ndarray | None
    futures: list[Future[list[Outcome]]]
    images: np.ndarray | None


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
            yield from ahead((self.at(step, self.end(self.begin(step))) for step in range(start, stop)), self.device)
            return
        waiting: deque[_Step] = deque()
        for step in range(start, stop + 2):  # two batches are being decoded while one is trained on
            if step < stop:
                waiting.append(self.begin(step))
            if step >= start + 2 and waiting:
                yield self.at(step - 2, self.end(waiting.popleft()))

    def at(self, step: int, batch: Batch) -> Batch:
        """Return the batch with its step's patch size: the same on all processes, each as likely (FlexiViT, section 3)."""
        if not self.patch_sizes:
            return batch
        random = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, 1]))
        return dataclasses.replace(batch, patch_size=int(random.choice(self.patch_sizes)))

    def begin(self, step: int) -> _Step:
        """Start the threads on a batch."""
        occasions, places = self.order.at(step, self.rank, self.ranks)
        indices = self.part[places]
        draws = draw(self.seed, occasions, places)
        preprocess, stored, sizes = self.pictures.preprocess, self.pictures.stored, self.pictures.sizes
        count, side = len(indices), preprocess.image_size
        boxes = None
        if stored is not None:
            size = stored.shape[2:]
            if self.augment.crop_scale < 1 or size != (side, side):
                boxes = crop_boxes(self.augment, draws, np.tile(size, (count, 1)))
        elif self.augment.crop_scale < 1:
            assert sizes is not None
            boxes = crop_boxes(self.augment, draws, sizes[indices])
        later = boxes if stored is not None else None

        def read(place: int) -> np.ndarray:
            index = int(indices[place])
            if stored is not None:
                return stored[index]
            if boxes is None:
                return self.pictures.for_judging(index)
            assert sizes is not None
            high, wide = sizes[index].tolist()
            box = Box(*boxes[place].tolist())
            # The size differs from the listed one in the cache, or when the file was replaced.
            return self.pictures.for_training(index, lambda width, height: box.scaled(width / wide, height / high))

        images = None
        if self.device.type == "cpu":  # NumPy asks for huge pages, a fourth of the cost of fresh memory
            images = np.empty((count, preprocess.channels, side, side), np.float32)

        def make(places: Sequence[int]) -> list[Outcome]:
            found = [attempt(read, place) for place in places]
            read_ones = {number: each for number, each in enumerate(found) if isinstance(each, np.ndarray)}
            if images is not None and read_ones:
                good = list(read_ones)
                pixels, rows = np.stack(list(read_ones.values())), np.asarray(places)[good]
                part = images[places[0] : places[0] + len(good)]  # without the failed ones, which `end` leaves out
                self.finish(torch.from_numpy(pixels), only(draws, rows), None if later is None else later[rows], part)
                for number, image in zip(good, part, strict=True):
                    found[number] = image
            return found

        # Independent of the number of threads, so that nothing can depend on it.
        run = min(max(1, _CACHE_BYTES // (4 * preprocess.channels * side * side)), max(-(-count // 8), _SMALLEST_RUN))
        return _Step(indices, draws, later, self.pictures.submit(make, count, run), images)

    def end(self, step: _Step) -> Batch:
        """Wait for a batch's pictures and do what is left."""
        found, places = self.pictures.collect(step.futures, step.indices)
        self.pictures.check_some_left(len(places), len(step.indices))
        indices, draws = step.indices[places], only(step.draws, places)
        if step.images is None:
            side = self.pictures.preprocess.image_size
            images = torch.empty((len(found), len(found[0]), side, side), device=self.device)
            pixels = torch.from_numpy(np.stack(found)).to(self.device, non_blocking=True)
            self.finish(pixels, draws, None if step.boxes is None else step.boxes[places], images)
        else:
            images = torch.from_numpy(step.images if len(found) == len(step.images) else np.stack(found))
        chosen = torch.from_numpy(indices)
        targets = self.targets[chosen].to(self.device, non_blocking=True)
        weights = None if self.weights is None else self.weights[chosen].to(self.device)
        images, mix = mix_pairs_(images, targets, places, self.augment, draws, weights)
        return Batch(images, targets, indices, weights=weights, mix=mix)

    def finish(
        self, pixels: Tensor, draws: dict[str, np.ndarray], boxes: np.ndarray | None, out: np.ndarray | Tensor
    ) -> None:
        """Augment and normalise pictures [B, C, H, W] on their device, into `out`."""
        preprocess = self.pictures.preprocess
        images = out if isinstance(out, Tensor) else torch.from_numpy(out)
        preprocess.normalise(augment_batch(pixels, self.augment, draws, boxes, preprocess.image_size), out=images)
        erase_(images, self.augment, draws)


def only(draws: dict[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
    """Return the random numbers of some of a batch's pictures."""
    return {name: values[places] for name, values in draws.items()}


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
