"""Evaluate during training, and keep the weights that did best."""

from __future__ import annotations

from collections.abc import Mapping

from vitrail.console import TrainingDisplay
from vitrail.distributed import whole_tensors
from vitrail.evaluation.diagnosis import NotFinite
from vitrail.models.vit import ViT
from vitrail.optim.optimizers import at_evaluation_point
from vitrail.training.cadence import Cadence
from vitrail.training.run_record import model_header
from vitrail.training.session import Session
from vitrail.training.state import State
from vitrail.weights.model_file import save_model


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
