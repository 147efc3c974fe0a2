"""The one training loop, for every objective."""

from __future__ import annotations

import torch

from vitrail.console import TrainingDisplay
from vitrail.optim.optimizers import set_lr
from vitrail.optim.schedules import Schedule
from vitrail.training.best_weights import evaluate_and_save_best
from vitrail.training.cadence import Clock, build_cadence
from vitrail.training.head_warmup import HeadWarmup
from vitrail.training.meter import Meter
from vitrail.training.parallelize import ParallelObjective
from vitrail.training.reporting import report
from vitrail.training.session import Session
from vitrail.training.signals import Stopped, StopRequest
from vitrail.training.start import build_classification
from vitrail.training.state import BuildObjective, Progress, open_state, save_state
from vitrail.training.step import check_finite, update
from vitrail.weights.adapt import Start


def train_steps(session: Session, start: Start, build: BuildObjective = build_classification) -> Progress:
    """Train until the last step; goes on from the run's saved state where there is one. Collective.

    Afterwards `model.safetensors` in the run's folder holds the weights that evaluated best, and `last/` the exact state.

    Args:
        start: the weights of the first step, where they are not random, and which of them are.
        build: makes the objective.

    Returns:
        Where the run is.

    Raises:
        Stopped: SIGINT or SIGTERM came; the state is saved.
        NotFinite: the loss, the gradient or an output broke; the state saved is from before.
        OSError: a file could not be written; the state saved before is whole.
    """
    config, world = session.config, session.world
    cadence = build_cadence(config, session.data.num_train)
    schedule = Schedule(config.schedule, total_steps=cadence.total, steps_per_epoch=cadence.per_epoch)
    state = open_state(session, start, build)
    done, elapsed_s = state.progress.step, state.progress.elapsed_s
    parallel = ParallelObjective(state.objective, config, world)
    warmup = HeadWarmup(state.objective, config, start, cadence.head)
    loader = session.data.loader(config, session.device, world, num_views=state.objective.num_views)
    meter = Meter(state.progress.window, world)
    display = TrainingDisplay(session.console, total_steps=cadence.total, steps_per_epoch=cadence.per_epoch, start=done)
    with display, StopRequest() as stop:
        clock = Clock(cadence, config.log.save_minutes, world, stop, start=done)
        for step, batch in enumerate(meter.timed(loader.batches(done, cadence.total)), done + 1):
            if warmup.enter(step):
                parallel.wrap()
            lr = config.optim.lr * schedule(step)
            set_lr(state.optimizer, lr)
            torch.manual_seed(step_seed(config.seed, step, world.data_rank))
            meter.add(update(parallel, state, batch, session))
            state.objective.after_step(step)
            state.progress.step = step
            due = clock.due(step)
            if due.report:
                check_finite(step, meter.flush(), state, loader, session)
                state.progress.elapsed_s = elapsed_s + clock.seconds
                report(session, state, meter, display, clock, lr=lr, log=due.log)
            if due.evaluate:
                evaluate_and_save_best(session, state, cadence, display)
                meter.restart_clock()
            if due.save:
                save_state(session, state)
                clock.saved()
            if due.stop:
                world.barrier()  # no rank may end, and so end the others, before the state is saved
                raise Stopped(due.stop, step)
    return state.progress


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of one step's dropout on one rank: resuming needs no generator state."""
    return (seed * 1_000_003 + step) * 4096 + rank & (2**63 - 1)
