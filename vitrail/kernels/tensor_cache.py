"""Masks and biases that were made, kept for the next call while they are small."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


def has_no_storage() -> bool:
    """Whether tensors that are made now are fake (FakeTensorMode), and of no use to later calls."""
    return type(torch.empty(0, device="cpu")) is not Tensor


class TensorCache:
    """Tensors by key, those used last, up to so many bytes in all; what is larger is made in every call."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self.tensors: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of a key, made now where it is not kept.

        Where tensors have no storage it is neither kept nor taken.
        """
        if has_no_storage():
            return make()
        with self.lock:
            if key in self.tensors:
                self.tensors.move_to_end(key)
                return self.tensors[key]
        # What is first made while evaluating must serve training too: inference tensors cannot be saved for backward.
        with torch.inference_mode(False):
            made = make()
        with self.lock:
            if key not in self.tensors and made.nbytes <= self.limit_bytes:
                self.tensors[key] = made
                self.held_bytes += made.nbytes
            while self.held_bytes > self.limit_bytes:
                self.held_bytes -= self.tensors.popitem(last=False)[1].nbytes
        return made
