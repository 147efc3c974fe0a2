"""One optimizer step, and the check of its numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrail.data.loading.train_loader import Batch, TrainLoader
from vitrail.device import autocast
from vitrail.evaluation.diagnosis import NotFinite, first_broken
from vitrail.optim.optimizers import clip_gradient
from vitrail.training.meter import Flushed
from vitrail.training.parallelize import ParallelObjective
from vitrail.training.session import Session
from vitrail.training.state import State


def update(parallel: ParallelObjective, state: State, batch: Batch, session: Session) -> dict[str, Tensor]:
    """Do one optimizer step: forward, backward, clip, step; returns its figures, which stay on the device.

    The batch is computed in `optim.accumulate` micro-batches, one after the other.
    """
    config, count = session.config, len(batch.targets)
    num_micro_batches = min(config.optim.accumulate, count)
    totals: dict[str, Tensor] = {}
    for number in range(num_micro_batches):
        micro_batch = batch.take(number * count // num_micro_batches, (number + 1) * count // num_micro_batches)
        share = len(micro_batch.targets) / count
        # Gradients cross ranks once a step, with the last one.
        with parallel.gradients(shared=number + 1 == num_micro_batches):
            with autocast(config.precision, session.device):
                figures = parallel(micro_batch)
            (figures["loss"] * share).backward()
        figures["loss"] = figures["loss"].detach() * share
        totals = {name: totals[name] + value if totals else value for name, value in figures.items()}
    norm = clip_gradient(state.objective, config.optim.clip_norm)
    # A gradient that is not finite must not touch the weights: the diagnosis needs them as they were. The fused
    # optimizer looks at this number on the device, without a sync.
    state.optimizer.found_inf = (~torch.isfinite(norm)).float()  # pyright: ignore[reportAttributeAccessIssue]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    parallel.average_statistics()
    return {**totals, "grad_norm": norm}


def check_finite(last_step: int, flushed: Flushed, state: State, loader: TrainLoader, session: Session) -> None:
    """Raise `NotFinite` with a diagnosis when a step's loss or gradient norm is NaN or infinite.

    Collective: the figures are those of all ranks, so all meet the same broken step and look for its cause together.

    Args:
        last_step: the step (from 1) of the last figure.
    """
    first_step = last_step + 1 - len(flushed.losses)
    for step, (loss, norm) in enumerate(zip(*flushed, strict=True), first_step):
        if math.isfinite(loss) and math.isfinite(norm):
            continue
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        cause, files = find_cause(step, state, loader, session)
        raise NotFinite(
            f"step {step}: {what}. {cause}. The batch's files begin with {', '.join(files)}. "
            "The saved state is from before; try a lower --optim.lr, a longer --schedule.warmup or --precision fp32"
        )


def find_cause(step: int, state: State, loader: TrainLoader, session: Session) -> tuple[str, list[str]]:
    """Return what broke first in a step, and the first files of the batch; those of the first rank where it did."""
    batch = next(iter(loader.batches(step - 1, step)))
    model = next(state.objective.vits())
    with autocast(session.config.precision, session.device):
        cause = first_broken(model, batch.images, lambda: state.objective.forward(batch))
    files = [loader.reader.dataset.location(int(index)) for index in batch.indices[:5]]
    found = session.world.gather((cause, files))
    return next((each for each in found if each[0]), ("Every layer's output is finite on that batch now", found[0][1]))
