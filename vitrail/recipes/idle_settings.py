"""Settings that have no effect in some configurations; one that the user gave is refused, never ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vitrail.config import RunConfig
from vitrail.config_schema import leaves

# Setting → (the setting that it depends on, whether it has an effect in a configuration).
IDLE: dict[str, tuple[str, Callable[[RunConfig], bool]]] = {
    "schedule.step_every": ("schedule.decay", lambda config: config.schedule.decay == "step"),
    "schedule.step_gamma": ("schedule.decay", lambda config: config.schedule.decay == "step"),
    "schedule.final_fraction": ("schedule.decay", lambda config: config.schedule.decay in ("cosine", "linear")),
    "optim.effective_beta": ("optim.class_weights", lambda config: config.optim.class_weights == "effective"),
    "data.val_fraction": ("data.folds", lambda config: config.data.folds == 0),
    "lora.alpha": ("lora.rank", lambda config: config.lora.rank > 0),
    "lora.targets": ("lora.rank", lambda config: config.lora.rank > 0),
    "data.cache_bytes": ("data.cache_side", lambda config: config.data.cache_side > 0),
    "data.decode": (
        "augment.crop_scale",
        lambda config: config.data.decode == "exact" or config.augment.crop_scale < 1,
    ),
    "preprocess.crop_fraction": ("preprocess.resize", lambda config: "crop" in config.preprocess.resize),
    "preprocess.crop_offset": ("preprocess.resize", lambda config: "crop" in config.preprocess.resize),
    "augment.crop_ratio": ("augment.crop_scale", lambda config: config.augment.crop_scale < 1),
    "augment.saturation": ("model.in_channels", lambda config: config.model.in_channels == 3),
    "augment.fill": ("augment.rotation", lambda config: config.augment.rotation > 0 or config.augment.shift > 0),
    "augment.policy_ops": ("augment.policy", lambda config: config.augment.policy == "randaugment"),
    "augment.policy_magnitude": ("augment.policy", lambda config: config.augment.policy == "randaugment"),
    "augment.erasing_fill": ("augment.erasing", lambda config: config.augment.erasing > 0),
    "augment.mix_chance": ("augment.mixup", lambda config: config.augment.mixes),
}


def refuse_idle(config: RunConfig, given: Mapping[str, Any]) -> None:
    """Raise a ValueError when a setting that the user gave has no effect in this configuration."""
    values = dict(leaves(config))
    for name, (other, has_effect) in IDLE.items():
        if given.get(name) and not has_effect(config):
            raise ValueError(
                f"{name} {given[name]!r} has no effect with {other} {values[other]!r}; leave it out or change that"
            )
