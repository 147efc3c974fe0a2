"""The ranks of a run: one process, or those that `torchrun` starts."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# The main rank may scan millions of files while the others wait for its result; a rank that dies closes its connection.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class World:
    """One process's rank in a run, and how many there are; rank 0, the main one, writes files and prints.

    Every method but the properties is collective: all ranks must call it, in the same order.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        data_rank: which share of every batch this process computes, from 0.
        data_size: number of shares. Each process has its own share, so both equal rank and size; where a model is divided
            over processes, those that compute one share together have one `data_rank`.
    """

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def max(self, *numbers: float) -> tuple[float, ...]:
        """Return the largest of each number over all ranks, so that all decide alike."""
        if self.size == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return tuple(values.tolist())

    def sum(self, rows: list[list[float]]) -> list[list[float]]:
        """Return the sums of equal tables of numbers over all shares of a batch."""
        if self.size == 1:
            return rows
        values = torch.tensor(rows, dtype=torch.float64) * (self.data_size / self.size)
        dist.all_reduce(values)
        return values.tolist()

    def mean_(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / self.size).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on all ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the main rank's value on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast_array(self, array: np.ndarray | None) -> np.ndarray | None:
        """Return the main rank's array on every rank, without a copy through pickle; None stays None."""
        if self.size == 1:
            return array
        form = self.broadcast(None if array is None else (array.shape, array.dtype.str))
        if form is None:
            return None
        received = array if array is not None and self.is_main else np.empty(form[0], np.dtype(form[1]))
        dist.broadcast(torch.from_numpy(np.ascontiguousarray(received)), src=0)
        return received

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Call a function on the main rank only and return its result on every rank.

        Raises:
            ValueError, OSError: what the function raised there, on every rank.
        """
        result: T | None = None
        error: ValueError | OSError | None = None
        if self.is_main:
            try:
                result = function()
            except (ValueError, OSError) as raised:
                error = raised
                if self.size == 1:
                    raise
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()


def init() -> World:
    """Return the world of the processes that `torchrun` started, or a world of one.

    The gloo back end works on every machine; on GPUs NCCL carries the tensors that live there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    rank = dist.get_rank()
    return World(rank, size, data_rank=rank, data_size=size)


def shutdown() -> None:
    """Leave the group of processes, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by name, each whole, also where ranks hold a shard of it; collective, and in the order given.

    The one place where sharded states are gathered: what saves or compares weights calls it on all ranks.
    """
    if not dist.is_initialized():
        return dict(tensors)
    from torch.distributed.tensor import DTensor  # more than a second to import, and needed by several ranks only

    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}
