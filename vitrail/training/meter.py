"""The figures of training between two lines of metrics, and the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from vitrail.data.loading.train_loader import Batch

KEYS = ("loss", "correct", "count", "grad_norm")


class Meter:
    """Collects a step's figures on the device and brings them to the host only when they are read (one sync)."""

    def __init__(self, window: dict[str, list[float]]) -> None:
        self.window = window or {key: [] for key in KEYS}
        self.pending: list[Tensor] = []
        self.restart_clock()

    def next(self, batches: Iterator[Batch]) -> Batch:
        """Take the next batch, and note how long it was waited for."""
        start = time.monotonic()
        batch = next(batches)
        self.waited_s += time.monotonic() - start
        self.images += len(batch.targets)
        return batch

    def add(self, figures: dict[str, Tensor], count: int) -> None:
        """Note one step's figures; nothing waits for the device here."""
        values = [figures["loss"], figures["correct"], figures["loss"].new_tensor(count), figures["grad_norm"]]
        self.pending.append(torch.stack([value.detach().float() for value in values]))

    def flush(self) -> tuple[list[float], list[float]]:
        """Bring pending figures to the host; returns the losses and gradient norms that were pending."""
        if not self.pending:
            return [], []
        rows = torch.stack(self.pending).tolist()
        self.pending = []
        for row in rows:
            for key, value in zip(KEYS, row, strict=True):
                self.window[key].append(value)
        return [row[0] for row in rows], [row[3] for row in rows]

    def means(self) -> dict[str, float]:
        """Return the settled figures' means since the last line."""
        count = sum(self.window["count"])
        weighted = sum(loss * n for loss, n in zip(self.window["loss"], self.window["count"], strict=True))
        return {
            "train/loss": weighted / count,
            "train/top1": sum(self.window["correct"]) / count,
            "train/grad_norm": sum(self.window["grad_norm"]) / len(self.window["grad_norm"]),
        }

    def images_per_s(self) -> float:
        """Return the speed since the clock was restarted."""
        return self.images / max(1e-9, time.monotonic() - self.marked_at)

    def speed(self) -> dict[str, float]:
        """Return images per second and the share of time spent waiting for images."""
        spent = max(1e-9, time.monotonic() - self.marked_at)
        return {"time/images_per_s": round(self.images / spent, 1), "time/data_wait": round(self.waited_s / spent, 4)}

    def restart(self) -> None:
        """Begin the next line."""
        for values in self.window.values():
            values.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed what has happened since the last line, such as an evaluation."""
        self.marked_at, self.waited_s, self.images = time.monotonic(), 0.0, 0
