"""The learning rate over a run, as a factor of its peak."""

from __future__ import annotations

import math

from vitrail.config import ScheduleConfig
from vitrail.durations import to_steps


class Schedule:
    """Linear warm-up, then a decay; `schedule(step)` is the factor of the update number `step`, from 1 on."""

    def __init__(self, config: ScheduleConfig, *, total_steps: int, steps_per_epoch: float) -> None:
        lengths = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        self.config, self.total_steps = config, total_steps
        self.warmup_steps = to_steps(config.warmup, "schedule.warmup", **lengths)
        self.step_every = to_steps(config.step_every, "schedule.step_every", **lengths)
        if self.warmup_steps >= total_steps:
            raise ValueError(
                f"schedule.warmup {config.warmup!r} is {self.warmup_steps:.0f} steps, but the run has only {total_steps}; "
                "shorten it, for instance --schedule.warmup '5 %'"
            )

    def __call__(self, step: int) -> float:
        if (
            self.config.decay == "step"
        ):  # the warm-up lies over the steps: a rate that fell never rises to the peak again
            return min(1.0, step / max(1.0, self.warmup_steps)) * self.config.step_gamma ** int(
                (step - 1) // self.step_every
            )
        if step < self.warmup_steps:
            return step / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1.0, self.total_steps - self.warmup_steps))
        final = self.config.final_fraction
        if self.config.decay == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
        if self.config.decay == "linear":
            return final + (1 - final) * (1 - done)
        return 1.0
