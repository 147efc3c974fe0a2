"""One process or many: torchrun's variables, gradients averaged, sums gathered."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run. Rank 0 writes files and talks."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Return the objective with its gradients averaged over processes."""
        if self.size == 1:
            return objective
        return nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)

    def max(self, *numbers: float) -> tuple[float, ...]:
        """Return the largest of each number over all processes, so that all decide alike."""
        if self.size == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return tuple(values.tolist())

    def mean_(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def broadcast(self, value: T) -> T:
        """Return the main process's value on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


def init() -> World:
    """Join the processes that torchrun started, or be a world of one.

    The gloo back end works on every machine; on GPUs NCCL carries the tensors that live there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), size)


def shutdown() -> None:
    """Leave the processes joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
