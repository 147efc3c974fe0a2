"""What a training says of itself on the way: figures, failed files, evaluations and the best weights."""

from __future__ import annotations

from collections.abc import Mapping

from vitrail.console import TrainingDisplay
from vitrail.distributed import whole_tensors
from vitrail.evaluation.diagnosis import NotFinite
from vitrail.models.vit import ViT
from vitrail.optim.optimizers import at_evaluation_point
from vitrail.training.cadence import Cadence, Clock
from vitrail.training.meter import Meter
from vitrail.training.run_record import model_header
from vitrail.training.session import Session
from vitrail.training.state import State
from vitrail.weights.model_file import save_model


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
    """Say at once which files failed on any rank after the scan, and that the cache's disk is full; collective.

    Those files are left out from then on.
    """
    reader, console = session.data.reader, session.console
    cache = reader.cache
    if cache is not None and cache.full and cache.full not in reader.reported:
        reader.reported.add(cache.full)
        console.warn(
            f"no more images are cached decoded ({cache.full}); training goes on and decodes the others each time"
        )
    new = {path: reason for path, reason in reader.dropped.items() if path not in reader.reported}
    if not session.world.max(len(new))[0]:
        return
    for each in session.world.gather(new):
        reader.dropped |= each
        new |= each
    paths = [path for path in new if path not in reader.reported]
    reader.reported.update(paths)
    if paths:
        console.warn(f"{len(paths)} files can no longer be read and are left out: {', '.join(paths[:5])}")
        problem = {"severity": "warning", "kind": "unreadable", "paths": paths, "message": "failed during the run"}
        session.run.note_problem(problem)


def evaluate_and_save_best(session: Session, state: State, cadence: Cadence, display: TrainingDisplay) -> None:
    """Evaluate on the validation split, log it, and save the weights where they are the best so far; collective."""
    progress, objective = state.progress, state.objective
    step, epoch = progress.step, cadence.epoch(progress.step)
    with at_evaluation_point(state.optimizer, session.config.optim):
        try:
            metrics = objective.evaluate(session.data.reader, session.data.split("val"), session.world)
        except NotFinite as error:
            raise NotFinite(f"step {step}: {error}") from None
        session.run.log(step=step, epoch=epoch, **{f"eval/{name}": value for name, value in metrics.items()})
        is_best = not progress.best or objective.better(metrics, progress.best)
        display.evaluated(epoch, metrics, is_best)
        if is_best:
            progress.best = {**metrics, "step": step, "epoch": epoch}
            save_best(session, objective.model_to_save(), progress.best)


def save_best(session: Session, model: ViT, metrics: Mapping[str, float]) -> None:
    """Write the run's model file; collective, and the main rank writes.

    Args:
        metrics: of the evaluation that chose these weights.
    """
    weights = whole_tensors(model.state_dict())
    if session.run.is_main:
        header = model_header(session.config, session.data, metrics, architecture=model.config)
        save_model(session.run.model, weights, header)
