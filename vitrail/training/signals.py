"""Ctrl-C and SIGTERM: finish the step, save, stop with the command that goes on."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Stopped(Exception):
    """A run was asked to stop and has saved its state."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")
        self.number, self.step = number, step
        self.command = ""  # what goes on with the run; filled in where the run's name is known


class StopRequest:
    """Remembers the first SIGINT or SIGTERM while it is entered; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> StopRequest:
        # Python delivers signals only to the main thread; elsewhere (a notebook's worker) there is nothing to catch.
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            self.old = {each: signal.signal(each, self.remember) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number
