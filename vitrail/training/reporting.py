"""What a training prints and logs on the way: its figures, and files that failed."""

from __future__ import annotations

from vitrail.console import TrainingDisplay
from vitrail.training.cadence import Clock
from vitrail.training.meter import Meter
from vitrail.training.session import Session
from vitrail.training.state import State


def report(
    session: Session, state: State, meter: Meter, display: TrainingDisplay, clock: Clock, *, lr: float, log: bool
) -> None:
    """Show where training is, name files that failed, and write a line of metrics where one is due; collective."""
    step, means = state.progress.step, meter.means()
    display.update(step, means, meter.images_per_s(), clock.remaining_s(step))
    report_dropped(session)
    if log:
        position = {"step": step, "epoch": clock.cadence.epoch(step)}
        line = {**means, "train/lr": lr, **meter.speed(), "time/elapsed_s": state.progress.elapsed_s}
        session.run.log(**position, **line)
        meter.restart()


def report_dropped(session: Session) -> None:
    """Say at once which files failed on any rank after the scan, and that a cache's disk is full; collective.

    Those files are left out from then on.
    """
    reader, console = session.data.reader, session.console
    dropped = {path: reason for path, reason in reader.dropped.items() if path not in reader.reported}
    full = [reader.cache.full] if reader.cache is not None and reader.cache.full not in {"", *reader.reported} else []
    if not any(session.world.max(len(dropped), len(full))):
        return
    reported = set(reader.reported)
    for others, disks in session.world.gather((dropped, full)):
        reader.dropped |= others
        reader.reported |= {*others, *disks}
    new = reader.reported - reported
    for disk in sorted(new - reader.dropped.keys()):
        console.warn(f"no more images are cached decoded ({disk}); training goes on and decodes the others each time")
    if paths := [path for path in reader.dropped if path in new]:
        console.warn(f"{len(paths)} files can no longer be read and are left out: {', '.join(paths[:5])}")
        problem = {"severity": "warning", "kind": "unreadable", "paths": paths, "message": "failed during the run"}
        session.run.note_problem(problem)
