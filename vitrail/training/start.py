"""What a run starts from: weights, random or from elsewhere, and which of them learn, and when."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vitrail.config import RunConfig
from vitrail.console import Console
from vitrail.kernels.registry import Kernels
from vitrail.models.kernel_choice import training_kernels
from vitrail.models.lora import add_adapters, is_adapter
from vitrail.models.variants import is_variant
from vitrail.models.vit import ViT
from vitrail.objectives.classification import Classification
from vitrail.training.frozen import batch_norms, freeze, scale_bn_momentum, within
from vitrail.training.head_warmup import head_warmup_parameters, trainable_parameters
from vitrail.training.session import Session
from vitrail.weights.adapt import Start, adapt
from vitrail.weights.imported_model import ImportedModel, LoadReport
from vitrail.weights.model_file import ModelHeader, build_model
from vitrail.weights.resolve import open_weights


def parse_model_spec(model: str) -> dict[str, str]:
    """Return the setting that a model spec means: a variant, or trained weights."""
    name = os.fspath(model)
    if Path(name).exists():
        return {"pretrained": os.path.abspath(name)}  # the run's config.json may be read from elsewhere
    return {"variant": name} if is_variant(name) else {"pretrained": name}


def open_start_weights(base: RunConfig | None, given: Mapping[str, Any]) -> ImportedModel | None:
    """Read the weights that a run is to start from, or return None when it starts at random.

    Raises:
        ValueError: the weights cannot be had, or a variant is given beside them.
    """
    if "variant" in given and given.get("pretrained"):
        raise ValueError(
            f"variant {given['variant']!r} and pretrained {given['pretrained']!r} both say what the model is; give one"
        )
    word = given.get("pretrained", base.pretrained if base and "variant" not in given else "")
    return open_weights(word) if word else None


def pin_revision(model_spec: str, origin: str) -> str:
    """Return a model spec with the commit of its hub appended, where it was read from one."""
    name, at, _ = origin.partition("@")
    return origin if at and name == model_spec.partition("@")[0] else model_spec


def required_channels(base: RunConfig | None, given: Mapping[str, Any], header: ModelHeader | None) -> int:
    """Return the channels that the model is known to want; 0: the images decide."""
    if header is not None and "pretrained" in given:
        known = 3 if header.architecture.in_channels == 3 else 0  # grey weights can learn colour
    else:
        known = base.model.in_channels if base else 0
    return int(given.get("model.in_channels", known))


def report_start(config: RunConfig, start: Start, console: Console) -> dict[str, int]:
    """Say what became of the weights that a run starts from and how many learn, and raise what is wrong with them.

    Returns:
        The count for `run.json`, where not all learn.

    Raises:
        ValueError: the encoder's weights cannot be had, or what is to be frozen or to learn first is not in the model.
    """
    for line in start.report.lines() if config.pretrained else ():
        console.info(line)
    if not (config.encoder_weights or config.optim.freeze or config.lora.rank or config.warms_head):
        return {}
    model = start_model(config, fresh=True, start=start)
    found = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    if config.warms_head:
        head_warmup_parameters(model, config, start)
    if found == total:
        return {}
    console.info(f"{found:,} of {total:,} weights learn ({found / total:.1%})")
    return {"num_learning": found}


def load_start(config: RunConfig, labels: Sequence[str], opened: ImportedModel | None = None) -> Start:
    """Return the weights that a run starts from, made to fit its model and labels; nothing when they start at random.

    Args:
        opened: what `config.pretrained` names, where it was read already.

    Raises:
        ValueError: the weights cannot be had, or cannot be made to fit.
    """
    if not config.pretrained:
        return Start()
    opened = opened or open_weights(config.pretrained)
    torch.manual_seed(config.seed)
    return adapt(opened, config.model, labels, ViT(config.model).state_dict())


def start_from_record(info: Mapping[str, Any]) -> Start:
    """Return what `run.json` says of a run's start; its weights are in the saved state."""
    start = info.get("start") or {}
    return Start(report=LoadReport(start.get("origin", "")), random=tuple(start.get("random", ())))


def start_record(start: Start) -> dict[str, Any]:
    """Return what `run.json` keeps of a start."""
    report = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(start.report).items()}
    return {**report, "random": list(start.random)} if start.weights else {}


def build_classification(config: RunConfig, start: Start, fresh: bool = True) -> Classification:
    """Return the objective of a classifier before the first step.

    Args:
        fresh: False where its weights are about to be replaced by saved ones.
    """
    model = start_model(config, fresh=fresh, start=start)
    return Classification(model, label_smoothing=config.optim.label_smoothing, ema_decay=config.optim.ema_decay)


def start_model(config: RunConfig, *, fresh: bool, start: Start = Start()) -> ViT:  # noqa: B008 - frozen
    """Return the model before the first step, in training mode but for its frozen parts.

    With adapters, what learns is these, the head, and what starts at random.

    Raises:
        ValueError: the encoder's weights cannot be had, or a frozen part is not in the model.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model, start.weights, config.pretrained) if start.weights else ViT(config.model)
    if config.encoder_weights and fresh:
        from vitrail.models.cnns import load_pretrained

        load_pretrained(cast(nn.Module, model.patch_embed.backbone), config.model, config.encoder_weights)
    model.train()
    if config.lora.rank:
        add_adapters(model, config.lora.rank, config.lora.alpha, config.lora.targets)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name) or within(name, "head") or name in start.random)
        for norm in batch_norms(model):
            norm.eval()
    freeze(model, config.optim.freeze)
    scale_bn_momentum(model, config.optim.accumulate)
    return model


def run_kernels(session: Session) -> Kernels:
    """Return the attention kernels of a run: those it began with, else measured now and noted in `run.json`; collective.

    All ranks use what the main one found.

    Raises:
        ValueError: a kernel that the configuration or the run names cannot compute this model here.
    """
    run = session.run

    def on_main() -> Kernels:
        known = run.info().get("kernels")
        kernels = choose_kernels(session.config, session.device, known=known)
        if dict(kernels.chosen) != known:
            run.note(kernels=dict(kernels.chosen))
        return kernels

    return session.world.run_on_main(on_main)


def choose_kernels(config: RunConfig, device: torch.device, *, known: Any = None, measuring: bool = True) -> Kernels:
    """Return the kernels for a configuration on a device, those in `known` as they are.

    Raises:
        ValueError: a kernel that the configuration names cannot compute this model here.
    """
    return training_kernels(
        config.model,
        config.precision,
        device.type,
        global_attention=config.kernels.global_attention,
        local_attention=config.kernels.local_attention,
        known=known,
        measuring=measuring,
    )
