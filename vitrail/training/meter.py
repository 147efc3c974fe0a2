"""The figures of training between two lines of metrics, and the speed; those of all ranks together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vitrail.data.loading.train_loader import Batch
from vitrail.distributed import World


class Flushed(NamedTuple):
    """Losses and gradient norms that were brought to the host, a step each."""

    losses: list[float]
    norms: list[float]


class Meter:
    """Collects a step's figures on the device and brings them to the host only when they are read (one sync).

    Args:
        window: the steps since the last line of metrics, by figure: an objective's, and `grad_norm`.
    """

    def __init__(self, window: dict[str, list[float]], world: World) -> None:
        self.window, self.world = window, world
        self.pending: list[Tensor] = []
        self.names: list[str] = []
        self.restart_clock()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches, and note how long each was waited for."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited_s += time.monotonic() - start
            self.images += len(batch.targets)
            yield batch

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Note one step's figures; nothing waits for the device here."""
        self.names = list(figures)
        self.pending.append(torch.stack([value.detach().float() for value in figures.values()]))

    def flush(self) -> Flushed:
        """Bring pending figures to the host and add up those of all ranks; collective."""
        rows = torch.stack(self.pending).tolist() if self.pending else []
        self.pending = []
        if self.world.size > 1:
            rows = self._of_all_ranks(rows)
        for row in rows:
            for name, value in zip(self.names, row, strict=True):
                self.window.setdefault(name, []).append(value)
        columns = dict(zip(self.names, zip(*rows, strict=True), strict=True)) if rows else {}
        return Flushed(list(columns.get("loss", ())), list(columns.get("grad_norm", ())))

    def _of_all_ranks(self, rows: list[list[float]]) -> list[list[float]]:
        """Return the figures over all ranks: the loss is a mean over images, the norm is the same on all."""
        ranks = self.world.data_size
        clock = [self.images, self.waited_s]
        loss, count, norm = (self.names.index(name) for name in ("loss", "count", "grad_norm")) if rows else (0, 0, 0)
        for row in rows:
            row[loss] *= row[count]
        *rows, clock = self.world.sum([*rows, clock + [0.0] * (len(self.names) - 2)])
        for row in rows:
            row[loss] /= row[count]
            row[norm] /= ranks
        self.images_of_all, self.waited_s_of_all = clock[0], clock[1] / ranks
        return rows

    def means(self) -> dict[str, float]:
        """Return the figures' means since the last line, over the images of all ranks."""
        counts = self.window["count"]
        total = sum(counts)
        weighted = sum(loss * n for loss, n in zip(self.window["loss"], counts, strict=True))
        norms = self.window["grad_norm"]
        sums = {name: sum(values) / total for name, values in self.window.items() if name not in _OWN}
        own = {"loss": weighted / total, **sums, "grad_norm": sum(norms) / len(norms)}
        return {f"train/{name}": value for name, value in own.items()}

    def images_per_s(self) -> float:
        """Return the speed of all ranks since the clock was restarted."""
        images = self.images if self.world.size == 1 else self.images_of_all
        return images / max(1e-9, time.monotonic() - self.marked_at)

    def speed(self) -> dict[str, float]:
        """Return images per second and the share of time spent waiting for images, of all ranks."""
        spent = max(1e-9, time.monotonic() - self.marked_at)
        waited = self.waited_s if self.world.size == 1 else self.waited_s_of_all
        return {"time/images_per_s": round(self.images_per_s(), 1), "time/data_wait": round(waited / spent, 4)}

    def restart(self) -> None:
        """Begin the next line."""
        for values in self.window.values():
            values.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what has happened since the last line, such as an evaluation."""
        self.marked_at, self.waited_s, self.images = time.monotonic(), 0.0, 0
        self.images_of_all, self.waited_s_of_all = 0.0, 0.0


_OWN = ("loss", "count", "grad_norm")  # what is no sum over images
