"""When things happen in a training: figures, evaluations, saves and the end; all ranks decide alike."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

from vitrail.config import RunConfig
from vitrail.distributed import World
from vitrail.durations import to_steps
from vitrail.training.signals import StopRequest

_SHOW_SECONDS = 0.5


@dataclass(frozen=True)
class Cadence:
    """The durations of a run in steps.

    Attributes:
        total: the number of the last step.
        per_epoch: steps in a pass over the training split, not rounded.
        log, evaluate: steps between two lines of metrics, and between two evaluations, not rounded.
        head: the last step in which the head learns alone.
    """

    total: int
    per_epoch: float
    log: float
    evaluate: float
    head: int

    def is_due(self, step: int, every: float) -> bool:
        """Whether this step passed a multiple of `every` steps, or is the last."""
        return step == self.total or math.floor(step / every + 1e-9) > math.floor((step - 1) / every + 1e-9)

    def epoch(self, step: int) -> float:
        """Return passes over the training split after this step, to a thousandth."""
        return round(step / self.per_epoch, 3)


def build_cadence(config: RunConfig, num_train: int) -> Cadence:
    """Turn a configuration's durations into steps.

    Raises:
        ValueError: the head would learn alone to the end.
    """
    per_epoch = num_train / config.batch_size
    total = max(1, math.ceil(config.epochs * per_epoch))
    lengths = {"total_steps": total, "steps_per_epoch": per_epoch}
    log = to_steps(config.log.every, "log.every", **lengths)
    evaluate = to_steps(config.log.eval_every, "log.eval_every", **lengths)
    head = round(to_steps(config.optim.head_warmup, "optim.head_warmup", **lengths))
    if config.warms_head and head >= total:
        raise ValueError(
            f"optim.head_warmup {config.optim.head_warmup!r} is {head} steps, but the run has only {total}; shorten it, for "
            "instance --optim.head_warmup '10 %', or let the head learn alone to the end by --optim.freeze"
        )
    return Cadence(total, per_epoch, max(1.0, log), max(1.0, evaluate), max(head, int(config.warms_head)))


class Due(NamedTuple):
    """What follows a step. `stop` is the number of the signal that ends the run; 0: none."""

    report: bool
    log: bool
    evaluate: bool
    save: bool
    stop: int


class Clock:
    """What is due after a step, by the cadence, by the time since it was last done, and by signals."""

    def __init__(self, cadence: Cadence, save_minutes: float, world: World, stop: StopRequest, *, start: int) -> None:
        self.cadence, self.save_seconds, self.world, self.stop = cadence, 60 * save_minutes, world, stop
        self.start = start
        self.started_at = self.saved_at = time.monotonic()
        self.shown_at = 0.0

    def due(self, step: int) -> Due:
        """Return what is due after this step; collective, so that no rank waits for another that goes on."""
        now = time.monotonic()
        late = now - self.saved_at > self.save_seconds > 0
        show = now - self.shown_at > _SHOW_SECONDS
        stop, late, show = (int(number) for number in self.world.max(self.stop.number, late, show))
        log, evaluate = (self.cadence.is_due(step, each) for each in (self.cadence.log, self.cadence.evaluate))
        save = bool(evaluate or stop or late)
        report = bool(log or save or show)
        if report:
            self.shown_at = now
        return Due(report, log, evaluate, save, stop)

    def saved(self) -> None:
        """Note that the state was saved just now."""
        self.saved_at = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since training began or went on."""
        return time.monotonic() - self.started_at

    def remaining_s(self, step: int) -> float:
        """Return the seconds that the steps after this one will take, at the speed so far."""
        return (self.cadence.total - step) * self.seconds / (step - self.start)
