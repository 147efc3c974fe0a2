"""Adapt a model's weights to another image size, patch size, number of channels, tokens, decoder or set of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitrail.lookup import shorten
from vitrail.models.config import ViTConfig
from vitrail.models.encoders import kernel_resize, resize_kernel
from vitrail.models.positions import resize_table, sincos2d
from vitrail.weights.finalise import plain_labels
from vitrail.weights.imported_model import ImportedModel, LoadReport
from vitrail.weights.match_labels import match_labels

# Fields in which both architectures must agree: the weights were made for them, even where other shapes would fit.
FIXED: tuple[str, ...] = (
    "encoder", "patch_norm", "embed_dim", "num_heads", "head_width", "mlp", "mlp_ratio", "qkv_bias", "qk_norm",
    "layer_scale", "layer_norm_eps", "init",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The weights with which a run starts.

    Attributes:
        weights: a tensor for every name in the model's state dict.
        report: what became of the weights of the file.
        random: names of the parameters that are not, or not wholly, from the file.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    report: LoadReport = field(default_factory=lambda: LoadReport(""))
    random: tuple[str, ...] = ()


def refuse_misfit(source: ViTConfig, target: ViTConfig, origin: str) -> None:
    """Raise an error where two architectures differ in something that no change of the weights can reconcile.

    Raises:
        ValueError: the architectures differ in something that the weights fix; all such differences are named.
    """
    fixed = list(FIXED)
    if source.encoder != "patch" or source.patch_norm:
        fixed.append("patch_size")
    if source.patch_norm:
        fixed.append("in_channels")
    wrong = [name for name in fixed if getattr(source, name) != getattr(target, name)]
    if target.depth > source.depth:
        wrong.append("depth")
    # A fixed table may go on as a learned one; any other change of positions is another model.
    if target.positions != source.positions and (source.positions, target.positions) != ("sincos2d", "learned"):
        wrong.append("positions")
    if wrong:
        differences = [
            f"model.{'head_dim' if name == 'head_width' else name} {getattr(target, name)!r} (they have "
            f"{getattr(source, name)!r})"
            for name in wrong
        ]
        raise ValueError(
            f"{origin}: its weights cannot start a model with {', '.join(differences)}; leave that out, or start from "
            "scratch with a variant's name as --model"
        )


def adapt(imported: ImportedModel, config: ViTConfig, labels: Sequence[str], fresh: Mapping[str, Tensor]) -> Start:
    """Return an imported model's weights, adapted to the architecture and labels of a new model.

    Args:
        labels: classes of the new head, in order.
        fresh: the state dict of a newly initialised `ViT(config)`; what the imported weights lack is taken from it.

    Raises:
        ValueError: the architectures cannot be reconciled.
    """
    source = imported.header.architecture
    refuse_misfit(source, config, imported.report.origin)
    assert config.num_classes == len(labels), (config.num_classes, labels)
    weights = {name: tensor for name, tensor in imported.weights.items() if not name.startswith("head.")}
    notes = [*imported.report.notes, *_rename_norm(weights, fresh)]
    if "pos_embed" in fresh and source.positions == "sincos2d":
        table = sincos2d(config.grid, source.embed_dim, source=source.grid)
        weights["pos_embed"] = torch.nn.functional.pad(table, (0, 0, source.num_prefix, 0))
        notes.append("positions: the fixed sine-cosine table starts the learned one")
    if source.decoder != config.decoder:
        notes.append(f"decoder: {source.decoder} → {config.decoder}")
    changed: dict[str, str] = {}
    renewed: set[str] = set()
    taken: dict[str, Tensor] = {}
    for name in fresh.keys() & weights.keys():
        change = CHANGES.get(name, _change_channels)
        values = weights[name]
        values = values.float() if values.is_floating_point() else values
        values, description, is_partly_new = change(values, source, config, fresh[name])
        if values.shape != fresh[name].shape:
            raise ValueError(
                f"{imported.report.origin}: {name} is {tuple(weights[name].shape)}, and cannot be made "
                f"{tuple(fresh[name].shape)}"
            )
        taken[name] = values
        changed |= {name: description} if description else {}
        renewed |= {name} if is_partly_new else set()
    head, about_head, is_new = new_head(imported, config, labels, fresh)
    missing = sorted({*(fresh.keys() - taken.keys() - head.keys()), *(set(imported.report.missing) & fresh.keys())})
    unexpected = sorted({*imported.report.unexpected, *(weights.keys() - fresh.keys())})
    report = dataclasses.replace(
        imported.report,
        loaded=len(taken.keys() - {*missing, *changed}) + len(head) * (not is_new),
        resized=(*imported.report.resized, *(f"{name}: {changed[name]}" for name in sorted(changed))),
        head=about_head,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        notes=tuple(notes),
    )
    random = {*missing, *renewed, *(head if is_new else ())}
    ready = {name: tensor.clone() for name, tensor in {**fresh, **taken, **head}.items()}
    return Start(ready, report, tuple(sorted(random)))


def new_head(
    imported: ImportedModel, config: ViTConfig, labels: Sequence[str], fresh: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str, bool]:
    """Return the weights of the new head, what became of the old one in words, and whether any row of it is new.

    Rows of labels that both models have are copied; new rows start at zero (Dosovitskiy et al. 2021, section 3.2).
    """
    source, old = imported.header.architecture, imported.header.labels
    head = {name: torch.zeros_like(fresh[name]) for name in ("head.weight", "head.bias")}
    weight, bias = imported.weights.get("head.weight"), imported.weights.get("head.bias")
    if weight is None or bias is None:
        return head, f"new, {len(labels)} classes; the weights have none", True
    instead = f"new, {len(labels)} classes instead of {len(old) or len(weight)}"
    if source.decoder != config.decoder:
        return head, f"{instead}: the decoder is a different one", True
    if not imported.header.split and old in (plain_labels(len(old)), tuple(f"LABEL_{i}" for i in range(len(old)))):
        return head, f"{instead}: the weights number their classes and do not name them", True
    rows = match_labels(old, labels) if len(old) == len(weight) else {}
    if not rows:
        return head, f"{instead}: no name is the same", True
    for new, known in rows.items():
        head["head.weight"][new], head["head.bias"][new] = weight[known], bias[known]
    if len(rows) == len(labels):
        same = rows == {index: index for index in range(len(old))}
        return head, "" if same else f"all {len(labels)} rows found by name among {len(old)} classes", False
    added = [label for index, label in enumerate(labels) if index not in rows]
    return (
        head,
        f"{len(rows)} of {len(labels)} rows found by name among {len(old)} classes; new: {shorten(added)}",
        True,
    )


Changed = tuple[Tensor, str, bool]  # the weight, what was changed in words, whether part of it is new


def _change_channels(values: Tensor, source: ViTConfig, target: ViTConfig, fresh: Tensor) -> Changed:
    """Change the first layer between colour and grey: a grey image gets the vectors that its three equal channels got.

    Exact where mean and std of the preprocessing are equal over the channels; the new preprocessing takes their means.
    """
    if source.in_channels == target.in_channels or values.ndim != 4 or values.shape == fresh.shape:
        return values, "", False
    if target.in_channels == 1:
        values = values.sum(dim=1, keepdim=True)
    else:
        values = values.expand(-1, 3, -1, -1) / 3
    return values, f"{source.in_channels} → {target.in_channels} channels", False


def _change_kernel(values: Tensor, source: ViTConfig, target: ViTConfig, fresh: Tensor) -> Changed:
    """Resize the patch kernel to another patch size, and change its channels."""
    values, change, _ = _change_channels(values, source, target, fresh)
    if source.encoder != "patch" or source.patch_size == target.patch_size:
        return values, change, False
    sizes = source.patch_size, target.patch_size
    text = "{0}×{0} → {1}×{1} pixels".format(*sizes)
    return resize_kernel(values, kernel_resize(*sizes)), ", ".join(filter(None, (change, text))), False


def _change_positions(values: Tensor, source: ViTConfig, target: ViTConfig, fresh: Tensor) -> Changed:
    """Resize the rows of patches in 2-D; rows of the class token and the registers stay, those of new tokens are fresh."""
    patches = values[:, source.num_prefix :]
    if source.positions != "sincos2d":  # a fixed table is made for the target's grid already
        patches = resize_table(patches, source.grid, target.grid)
    prefix, is_new = fresh[:, : target.num_prefix].clone(), target.num_registers > source.num_registers
    if target.class_token:
        if source.class_token:
            prefix[:, 0] = values[:, 0]
        is_new = is_new or not source.class_token
    kept = min(source.num_registers, target.num_registers)
    prefix[:, int(target.class_token) :][:, :kept] = values[:, int(source.class_token) :][:, :kept]
    change = "" if source.grid == target.grid else "{}×{} → {}×{} patches".format(*source.grid, *target.grid)
    return torch.cat([prefix, patches], dim=1), change, is_new


def _change_registers(values: Tensor, source: ViTConfig, target: ViTConfig, fresh: Tensor) -> Changed:
    """Leave out registers, or add fresh ones."""
    if source.num_registers == target.num_registers:
        return values, "", False
    kept, new = values[:, : target.num_registers], fresh[:, source.num_registers :]
    return torch.cat([kept, new], dim=1), f"{source.num_registers} → {target.num_registers} tokens", new.shape[1] > 0


# Weights whose shape may change → the function that changes it; all others may change their channels.
CHANGES: dict[str, Callable[[Tensor, ViTConfig, ViTConfig, Tensor], Changed]] = {
    "patch_embed.proj.weight": _change_kernel,
    "pos_embed": _change_positions,
    "reg_token": _change_registers,
}


def _rename_norm(weights: dict[str, Any], fresh: Mapping[str, Tensor]) -> Iterable[str]:
    """Rename the last layer norm where it stands before pooling in one model and after it in the other."""
    for one, other in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{one}.weight" in weights and f"{one}.weight" not in fresh and f"{other}.weight" in fresh:
            for parameter in ("weight", "bias"):
                weights[f"{other}.{parameter}"] = weights.pop(f"{one}.{parameter}")
            return [f"{one} is taken for {other}"]
    return []
