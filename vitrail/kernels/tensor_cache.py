"""A cache for masks and biases that are needed in every call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


def has_no_storage() -> bool:
    """Whether tensors that are made now have no storage (FakeTensorMode), so that later calls cannot use them."""
    return type(torch.empty(0, device="cpu")) is not Tensor


class TensorCache:
    """The most recently used tensors by key, up to `limit_bytes` in all; a larger tensor is made in every call."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self.tensors: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of a key, made now unless it is cached.

        Where tensors have no storage, the cache is not used.
        """
        if has_no_storage():
            return make()
        with self.lock:
            if key in self.tensors:
                self.tensors.move_to_end(key)
                return self.tensors[key]
        # What is first made while evaluating must serve training too: inference tensors cannot be saved for backward.
        with torch.inference_mode(False):
            tensor = make()
        with self.lock:
            if key not in self.tensors and tensor.nbytes <= self.limit_bytes:
                self.tensors[key] = tensor
                self.held_bytes += tensor.nbytes
            while self.held_bytes > self.limit_bytes:
                self.held_bytes -= self.tensors.popitem(last=False)[1].nbytes
        return tensor
