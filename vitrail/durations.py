"""Durations as users write them: `500 steps`, `2 epochs` or `5 %` of a run."""

from __future__ import annotations

import re


def parse_duration(text: str, name: str) -> tuple[float, str]:
    """Return the number and the unit (`step`, `epoch` or `%`) of a duration such as `500 steps`.

    Raises:
        ValueError: the text is no duration; the message calls it `name`.
    """
    parsed = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)\s*", text)
    if parsed is None:
        raise ValueError(f"{name} is {text!r}; expected a duration such as '500 steps', '2 epochs' or '5 %'")
    return float(parsed[1]), parsed[2].rstrip("s")


def to_steps(text: str, name: str, *, total_steps: int, steps_per_epoch: float) -> float:
    """Return a duration in optimizer steps, not rounded; `name` is the setting's, for messages."""
    number, unit = parse_duration(text, name)
    return number * {"step": 1.0, "epoch": steps_per_epoch, "%": total_steps / 100}[unit]
