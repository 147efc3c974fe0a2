"""The one training loop."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrail.config import RunConfig
from vitrail.console import Console, TrainingDisplay
from vitrail.data.images.preprocess import preprocess_from_config
from vitrail.data.loading.train_loader import Batch
from vitrail.data.setup import TrainData
from vitrail.device import autocast, pick_device
from vitrail.distributed import World
from vitrail.durations import to_steps
from vitrail.evaluation.metrics import headline_metrics
from vitrail.evaluation.predict_logits import predict_logits
from vitrail.models.lora import merged
from vitrail.objectives.classification import Classification
from vitrail.optim.optimizers import clip_gradient, set_lr, update_average
from vitrail.optim.schedules import Schedule
from vitrail.training.diagnosis import check_finite, check_outputs
from vitrail.training.frozen import running_statistics
from vitrail.training.meter import Meter
from vitrail.training.run_folder import Run
from vitrail.training.signals import Stopped, StopRequest
from vitrail.training.start import head_warmup_parameters, run_kernels, set_trainable, start_state, trainable_parameters
from vitrail.training.state import Progress, State, load_state, save_state
from vitrail.weights.adapt import Start
from vitrail.weights.model_file import ModelHeader, save_model, versions

_SHOW_SECONDS = 0.5


def train_steps(
    config: RunConfig, data: TrainData, run: Run, world: World, console: Console, start_from: Start
) -> Progress:
    """Train until the last step; goes on from the run's saved state where there is one.

    Afterwards `model.safetensors` in the run's folder holds the weights that did best on the validation split, and
    `last/` the exact state.

    Args:
        start_from: the weights of the first step, where they are not random, and which of them are.

    Returns:
        Where the run is.

    Raises:
        Stopped: SIGINT or SIGTERM came; the state is saved.
        NotFinite: the loss or the gradient broke; the state saved is from before.
        OSError: a file could not be written; the state saved before is whole.
    """
    device = pick_device(config.device)
    cadence = build_cadence(config, len(data.splits.indices["train"]))
    schedule = Schedule(config.schedule, total_steps=cadence.total, steps_per_epoch=cadence.per_epoch)
    resumed = world.broadcast(run.has_state)
    state = start_state(config, device, fresh=not resumed, start=start_from)
    state.model.kernels = run_kernels(config, device, run, world)
    if state.average is not None:
        state.average.kernels = state.model.kernels
    if resumed:
        load_state(run.last, state)
    elif config.pretrained and world.is_main:
        save_state(run.last, state)  # from here on the run depends on no other file
    statistics = running_statistics(state.model)
    run.forget_after(state.progress.step)
    objective = Classification(state.model, label_smoothing=config.optim.label_smoothing)
    if config.compile:
        # A graph for each patch size: beyond its limit torch would go on uncompiled, and say so in a log only.
        limit = torch._dynamo.config.recompile_limit  # pyright: ignore[reportAttributeAccessIssue]
        graphs = (1 + config.warms_head) * len(config.model.patch_sizes)
        torch._dynamo.config.recompile_limit = limit + graphs  # pyright: ignore[reportAttributeAccessIssue]
        objective.compile()
    all_learning, wrapped = trainable_parameters(state.model), objective
    first = head_warmup_parameters(state.model, config, start_from) if cadence.head else {}
    loader = data.loader(config, device, world)
    start = state.progress.step
    batches = loader.batches(start, cadence.total)
    meter = Meter(state.progress.window)
    display = TrainingDisplay(console, total_steps=cadence.total, steps_per_epoch=cadence.per_epoch, start=start)
    started_at, elapsed_s = time.monotonic(), state.progress.elapsed_s
    shown_at, saved_at = 0.0, started_at

    with display, StopRequest() as stop:
        for step in range(start + 1, cadence.total + 1):
            if step in (start + 1, cadence.head + 1):
                set_trainable(state.model, all_learning, first if step <= cadence.head else all_learning)
                wrapped = objective  # ends an earlier wrapping, which counts on other gradients
                wrapped = world.wrap(objective)
            batch = meter.next(batches)
            lr = config.optim.lr * schedule(step)
            set_lr(state.optimizer, lr)
            # All randomness of a step comes from its number: resuming needs no generator state.
            torch.manual_seed(step_seed(config.seed, step, world.rank))
            losses = update(wrapped, state, batch, config, device)
            world.mean_(statistics)
            if state.average is not None:
                update_average(state.average, state.model, config.optim.ema_decay, step)
            meter.add(losses, len(batch.targets))
            state.progress.step = step

            log, judged = cadence.is_due(step, cadence.log), cadence.is_due(step, cadence.evaluate)
            now = time.monotonic()
            late = now - saved_at > 60 * config.log.save_minutes > 0
            stopping, late = (int(number) for number in world.max(stop.number, late))
            save = judged or stopping or late
            if log or judged or save or now - shown_at > _SHOW_SECONDS:
                pending = meter.flush()
                check_finite(
                    step + 1 - len(pending[0]), *pending, state.model, loader, autocast(config.precision, device)
                )
                means, shown_at = meter.means(), now
                remaining_s = (cadence.total - step) * (now - started_at) / (step - start)
                display.update(step, means["train/loss"], means["train/top1"], meter.images_per_s(), remaining_s)
                state.progress.elapsed_s = elapsed_s + now - started_at
                report_dropped(data, run, console)
                if log:
                    line = {**means, "train/lr": lr, **meter.speed()}
                    run.log(
                        step=step, epoch=cadence.epoch(step), **line, **{"time/elapsed_s": state.progress.elapsed_s}
                    )
                    meter.restart()
            if judged:
                evaluate_and_save_best(config, data, run, world, state, cadence, display)
                meter.restart_clock()
            if save:
                state.progress.window = meter.window
                if world.is_main:
                    save_state(run.last, state)
                saved_at = time.monotonic()
            if stopping:
                world.barrier()  # no process may end, and so end the others, before the state is saved
                raise Stopped(stopping, step)
    return state.progress


def report_dropped(data: TrainData, run: Run, console: Console) -> None:
    """Say at once which files failed after the first look, to be left out from then on, and that the cache's disk is full."""
    cache = data.reader.cache
    if cache is not None and cache.full and cache.full not in data.reader.reported:
        data.reader.reported.add(cache.full)
        console.warn(
            f"no more images are kept decoded ({cache.full}); training goes on and decodes the others each time"
        )
    dropped, told = data.reader.dropped, data.reader.reported
    new = [path for path in dropped if path not in told]
    if not new:
        return
    told.update(new)
    console.warn(f"{len(new)} files can no longer be read and are left out: {', '.join(new[:5])}")
    problems = [{"severity": "warning", "kind": "unreadable", "paths": new, "message": "failed during the run"}]
    run.note(problems=[*run.info().get("problems", []), *problems])


def update(
    wrapped: nn.Module, state: State, batch: Batch, config: RunConfig, device: torch.device
) -> dict[str, Tensor]:
    """Do one optimizer step: forward, backward, clip, step. The figures stay on the device."""
    count = len(batch.targets)
    parts = min(config.optim.accumulate, count)
    loss = correct = torch.zeros((), device=device)
    for number in range(parts):
        part = batch.take(number * count // parts, (number + 1) * count // parts)
        share = len(part.targets) / count
        # Gradients cross processes once a step, with the last part.
        shared = isinstance(wrapped, nn.parallel.DistributedDataParallel) and number + 1 < parts
        with wrapped.no_sync() if shared else contextlib.nullcontext():  # pyright: ignore[reportCallIssue]
            with autocast(config.precision, device):
                losses = wrapped(part)
            (losses["loss"] * share).backward()
        loss, correct = loss + losses["loss"].detach() * share, correct + losses["correct"]
    grad_norm = clip_gradient(state.model, config.optim.clip_norm)
    # A gradient that is not finite must not touch the weights: the diagnosis needs them as they were. The fused
    # optimizer looks at this number on the device, without a sync.
    state.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # pyright: ignore[reportAttributeAccessIssue]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "correct": correct, "grad_norm": grad_norm}


def evaluate_and_save_best(
    config: RunConfig, data: TrainData, run: Run, world: World, state: State, cadence: Cadence, display: TrainingDisplay
) -> None:
    """Evaluate the weights on the validation split, log it, and keep them where they are the best so far."""
    part = data.splits.indices["val"]
    model = merged(state.evaluated_model)
    outputs = predict_logits(model, data.reader, part, device=pick_device(config.device), world=world)
    check_outputs(state.progress.step, outputs, model, data.reader)
    figures = headline_metrics(outputs)
    step, epoch, best = state.progress.step, cadence.epoch(state.progress.step), state.progress.best
    line = {f"eval/{name}": value for name, value in figures.items()}
    run.log(step=step, epoch=epoch, **line, **{"eval/num_images": len(outputs.targets)})
    better = not best or (figures["top1"], -figures["loss"]) > (best["top1"], -best["loss"])
    display.evaluated(epoch, figures["top1"], figures["loss"], len(outputs.targets), better)
    if better:
        state.progress.best = {**figures, "step": step, "epoch": epoch}
        if run.is_main:
            save_model(run.model, model.state_dict(), model_header(config, data, state.progress.best))


def model_header(
    config: RunConfig, data: TrainData, metrics: dict[str, float], temperature: float = 1.0
) -> ModelHeader:
    """Return what the run's model file says of its weights."""
    return ModelHeader(
        architecture=config.model,
        labels=data.dataset.labels,
        preprocess=preprocess_from_config(config),
        temperature=temperature,
        split=data.split_header(config.data),
        metrics=metrics,
        versions=versions(),
    )


@dataclass(frozen=True)
class Cadence:
    """When things happen, in steps (not rounded but for `head`, the last step in which the head learns alone)."""

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
    judged = to_steps(config.log.eval_every, "log.eval_every", **lengths)
    head = round(to_steps(config.optim.head_warmup, "optim.head_warmup", **lengths))
    if config.warms_head and head >= total:
        raise ValueError(
            f"optim.head_warmup {config.optim.head_warmup!r} is {head} steps, but the run has only {total}; shorten it, for "
            "instance --optim.head_warmup '10 %', or let the head learn alone to the end by --optim.freeze"
        )
    return Cadence(total, per_epoch, max(1.0, log), max(1.0, judged), max(head, int(config.warms_head)))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of one step's dropout on one process; distinct for all practical counts."""
    return (seed * 1_000_003 + step) * 4096 + rank & (2**63 - 1)
