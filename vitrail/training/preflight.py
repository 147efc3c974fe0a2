"""What can be known to fail before a run begins: settings, weights, device, schedule, ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitrail.config import RunConfig
from vitrail.data.setup import CheckedData, check_cache_settings
from vitrail.device import autocast, pick_device
from vitrail.distributed import World
from vitrail.models.config import ENCODER_NAMES
from vitrail.optim.schedules import Schedule
from vitrail.recipes import DatasetFacts, build_config
from vitrail.training.cadence import build_cadence
from vitrail.training.start import choose_kernels
from vitrail.weights.adapt import refuse_misfit
from vitrail.weights.model_file import ModelHeader


def refuse_early(recipe: str, given: Mapping[str, Any], header: ModelHeader | None) -> None:
    """Validate names, settings and weights before any data is read.

    Raises:
        ValueError: a name or a setting is refused, or the weights cannot fit the architecture.
    """
    if "model.num_classes" in given:
        raise ValueError("model.num_classes is the number of classes of the data; leave it out")
    channels = int(given.get("model.in_channels", len(given.get("preprocess.mean", (0.5, 0.5, 0.5)))))
    nothing = DatasetFacts(1000, 2, 224, True, channels, "", "cpu", False)
    config = build_config(recipe, nothing, given, header)[0]
    model = config.model
    if header is not None:
        refuse_misfit(header.architecture, model, config.pretrained)
    if model.is_cnn and model.encoder not in ENCODER_NAMES:
        from vitrail.models.cnns import feature_strides, index_of

        # The images' size may yet decide the stride; a name or a stride that is given is known to be wrong now.
        fixed = "variant" in given or "model.patch_size" in given
        index_of(model.encoder, model.patch_size) if fixed else feature_strides(model.encoder)


def check_runnable(config: RunConfig, num_train: int, world: World, *, schedule: bool = True) -> None:
    """Raise what this machine or the number of steps rules out, before a folder is made.

    Raises:
        ValueError: device, precision, processes or schedule do not fit.
    """
    device = pick_device(config.device)
    autocast(config.precision, device)
    choose_kernels(config, device, measuring=False)  # raises where a kernel that was asked for cannot run here
    check_cache_settings(config)
    samples = config.batch_size // world.data_size // config.optim.accumulate
    if config.model.is_cnn and config.model.grid == (1, 1) and samples < 2:
        raise ValueError(
            f"a CNN's batch norm needs more than one value a channel, but its map has one pixel and a part of a batch has "
            f"{samples} image; lower optim.accumulate ({config.optim.accumulate}) or model.patch_size "
            f"({config.model.patch_size}), or raise batch_size ({config.batch_size})"
        )
    if config.batch_size % world.data_size:
        raise ValueError(
            f"batch_size {config.batch_size} is global and must be a multiple of the {world.data_size} processes; "
            f"try --batch-size {-(-config.batch_size // world.data_size) * world.data_size}"
        )
    if config.augment.mixes and config.augment.repeats == config.batch_size:
        raise ValueError(
            f"augment.mixup and augment.cutmix mix neighbours of a batch, but with augment.repeats {config.augment.repeats} and "
            f"batch_size {config.batch_size} all of it is one image; lower augment.repeats"
        )
    if config.augment.mixes and config.batch_size // world.data_size % 2:
        raise ValueError(
            f"augment.mixup and augment.cutmix mix neighbours of a batch two by two, but each of {world.data_size} processes has "
            f"{config.batch_size // world.data_size} of batch_size {config.batch_size}; try --batch-size "
            f"{config.batch_size + world.data_size}, or leave them out"
        )
    if schedule:
        cadence = build_cadence(config, num_train)
        Schedule(config.schedule, total_steps=cadence.total, steps_per_epoch=cadence.per_epoch)


def refuse_idle_fractions(checked: CheckedData, given: Mapping[str, Any]) -> None:
    """Raise a ValueError when a share was asked for that the dataset's own splits decide."""
    own = set() if checked.dataset.split is None else set(checked.dataset.split.tolist())
    for split in ("val", "test"):
        if split in own and f"data.{split}_fraction" in given:
            raise ValueError(f"data.{split}_fraction has no effect: {checked.dataset.name} has its own {split} split")
