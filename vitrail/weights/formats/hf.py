"""Read a model from a folder of transformers: `config.json`, weights, `preprocessor_config.json`. transformers is not needed."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitrail.data.images.preprocess import Preprocess
from vitrail.lookup import pick, shorten
from vitrail.models.config import ViTConfig
from vitrail.models.vit import ViT
from vitrail.weights.formats.hf_config import absent_biases, hf_architecture
from vitrail.weights.formats.hf_files import read_json_object, read_tensors
from vitrail.weights.formats.hf_image_processor import from_processor
from vitrail.weights.formats.hf_tables import FAMILIES, LEFT_OUT, Family
from vitrail.weights.imported_model import ImportedModel, LoadReport
from vitrail.weights.key_mapping import Rule, to_ours, to_theirs, translated
from vitrail.weights.model_file import ModelHeader, versions
from vitrail.weights.user_spec import preprocess_from_description, split_description

_UNUSED = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate")


def open_hf_model(reference: str, description: Mapping[str, Any]) -> ImportedModel:
    """Return the model of `hf:FOLDER` or `hf:NAME[@revision]`.

    Args:
        reference: what stands after `hf:`.
        description: preprocessing and labels to use instead of the folder's own.

    Raises:
        ValueError: there is no such model, it cannot be fetched, its files are broken, or it cannot be expressed here.
    """
    from vitrail.weights.hub import reads_as_path, snapshot

    folder = Path(os.path.expanduser(reference))
    if not folder.is_dir() and reference.count("/") > 1 and not reference.startswith((".", "/", "~")):
        raise ValueError(f"hf:{reference}: no such folder, and names on the hub are OWNER/NAME")
    if folder.is_dir() or reads_as_path(reference):
        return read_hf_folder(folder, description)
    files = snapshot(reference)
    imported = read_hf_folder(files.folder, description, origin=f"hf:{files.name}@{files.commit}")
    report = dataclasses.replace(imported.report, notes=(*files.notes, *imported.report.notes))
    return dataclasses.replace(imported, report=report)


def read_hf_folder(folder: Path, description: Mapping[str, Any], origin: str = "") -> ImportedModel:
    """Return the model of a folder that `save_pretrained` wrote, or that was downloaded from the hub.

    Args:
        description: preprocessing and labels to use instead of the folder's own.
        origin: name of the model in the report, if not the folder's.

    Raises:
        ValueError: a file is missing or broken, or the model cannot be expressed here; the message says which.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    labels, image_fields = split_description(description, f"{folder}: its config.json says its architecture")
    try:
        return _read(folder, labels, image_fields, origin or str(folder))
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def _read(folder: Path, labels: tuple[str, ...] | None, image_fields: Mapping[str, Any], origin: str) -> ImportedModel:
    raw = read_json_object(folder / "config.json")
    if "model_type" not in raw and "pretrained_cfg" in raw:
        name = f"hf-hub:{origin.removeprefix('hf:')}" if origin.startswith("hf:") else folder
        raise ValueError(f"{folder}: is a model of timm, not of transformers; load it as timm:{name}")
    if any(str(key).startswith("AutoModel") for key in raw.get("auto_map") or ()):
        raise ValueError(
            "auto_map in config.json names code of its own, which is not run; only transformers' own models are read"
        )
    if raw.get("quantization_config"):
        raise ValueError("quantization_config in config.json: quantised weights cannot be read")
    model_type = str(raw.get("model_type", ""))
    family = pick(FAMILIES, model_type, "model_type in config.json:")
    tensors, notes = read_tensors(folder)
    tensors = _without_prefix(tensors, family.prefix)
    join_classifiers(tensors)
    settings = ChainMap({key: value for key, value in raw.items() if value is not None}, dict(family.defaults))
    num_classes, pair = _classifier(raw, tensors)
    config = hf_architecture(model_type, settings, num_classes, pair=pair)
    weights, unexpected = match_weights(tensors, family, config, absent_biases(settings))
    preprocess, preprocess_notes = _preprocess(folder, family, config, image_fields)
    config, weights, resized = at_size(config, weights, preprocess.image_size, antialias=family.antialias)
    own = raw["vitrail"] if isinstance(raw.get("vitrail"), dict) else {}
    header = ModelHeader(
        architecture=config,
        labels=_labels(raw, config.num_classes) if labels is None else _checked(labels, config.num_classes),
        preprocess=preprocess,
        temperature=_temperature(own),
        versions={**versions(), "imported_from": origin, "written_by": str(raw.get("transformers_version", "unknown"))},
    )
    report = LoadReport(
        origin=origin,
        loaded=len(tensors) - len(unexpected),
        resized=resized,
        unexpected=tuple(unexpected),
        notes=(*notes, *preprocess_notes, *_model_notes(raw, header.labels)),
    )
    return ImportedModel(header, weights, report)


def match_weights(
    tensors: Mapping[str, Tensor], family: Family, config: ViTConfig, absent: frozenset[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under our names, and the names of those that the model does not need.

    Raises:
        ValueError: names or shapes differ from what the configuration expects; all differences are listed.
    """
    _check_depth(tensors, family, config, absent)
    kept = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(LEFT_OUT, name)}
    rules = max(family.tables(config, absent), key=lambda rules: sum(_matches(rules, name) for name in kept))
    with torch.device("meta"):
        wanted = ViT(config).state_dict()
    theirs, no_rule = to_theirs(wanted, rules, config)
    assert not no_rule, no_rule
    missing, unknown = sorted(set(theirs) - set(kept)), sorted(set(kept) - set(theirs))
    shapes = [
        f"{name} is {tuple(kept[name].shape)}, config.json wants {tuple(theirs[name].shape)}"
        for name in sorted(set(theirs) & set(kept))
        if kept[name].shape != theirs[name].shape
    ]
    if missing or unknown or shapes:
        lines = ["its weights do not fit its config.json"]
        differences = (("missing", missing, ", "), ("unknown", unknown, ", "), ("shape", shapes, "; "))
        lines += [f"  {what}: {shorten(names, between=between)}" for what, names, between in differences if names]
        raise ValueError("\n".join(lines))
    weights, _ = to_ours(kept, rules, config)
    for name in set(wanted) - set(weights):  # biases that the configuration switches off
        weights[name] = torch.zeros(wanted[name].shape)
    return weights, sorted(set(tensors) - set(kept))


def at_size(
    config: ViTConfig, weights: dict[str, Tensor], image_size: int, *, antialias: bool
) -> tuple[ViTConfig, dict[str, Tensor], tuple[str, ...]]:
    """Return the architecture and weights for another image size, the positions resized as transformers does at run time.

    Raises:
        ValueError: the size is not a multiple of the patch.
    """
    if image_size == config.image_size:
        return config, weights, ()
    changed = dataclasses.replace(config, image_size=image_size)
    if config.positions != "learned" or config.grid == changed.grid:
        return changed, weights, ()
    table = weights["pos_embed"]
    prefix, patches = table[:, : config.num_prefix], table[:, config.num_prefix :]
    image = rearrange(patches, "1 (h w) D -> 1 D h w", h=config.grid[0])
    image = F.interpolate(image, size=changed.grid, mode="bicubic", align_corners=False, antialias=antialias)
    table = torch.cat([prefix, rearrange(image, "1 D h w -> 1 (h w) D")], dim=1)
    sides = [f"{h}×{w}" for h, w in (config.grid, changed.grid)]
    how = "bicubic, antialiased" if antialias else "bicubic"
    return (
        changed,
        {**weights, "pos_embed": table},
        (f"pos_embed: {sides[0]} → {sides[1]} patches ({how}, as transformers)",),
    )


def join_classifiers(tensors: dict[str, Tensor]) -> None:
    """Replace the two heads of a distilled DeiT, whose outputs are averaged, by one over both tokens: [W/2, W'/2]."""
    heads = [f"{name}_classifier.weight" for name in ("cls", "distillation")]
    if not all(name in tensors for name in heads):
        return
    first, second = (tensors.pop(name) for name in heads)
    if first.shape != second.shape:
        raise ValueError(
            f"{heads[0]} is {tuple(first.shape)}, {heads[1]} is {tuple(second.shape)}; expected equal shapes"
        )
    tensors["classifier.weight"] = torch.cat([first, second], dim=1) / 2
    biases = [f"{name}_classifier.bias" for name in ("cls", "distillation")]
    if all(name in tensors for name in biases):
        tensors["classifier.bias"] = (tensors.pop(biases[0]) + tensors.pop(biases[1])) / 2


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights without the prefix of models with a classifier, and without empty tensors (no registers)."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        if (bare := name.removeprefix(prefix)) in named:
            raise ValueError(f"has both {prefix}{bare} and {bare}; which of them counts is not known")
        named[bare] = tensor
    return named


def _matches(rules: list[Rule], name: str) -> bool:
    return translated(name, rules, "theirs") is not None


def _check_depth(tensors: Mapping[str, Tensor], family: Family, config: ViTConfig, absent: frozenset[str]) -> None:
    """Raise an error, before a model is built, unless the weights have as many layers as config.json says."""
    rules = [rule for table in family.tables(config, absent) for rule in table]
    found = {translated(name, rules, "theirs") for name in tensors}
    layers = {match[1].split(".")[1] for match in found if match and match[1].startswith("blocks.")}
    if not layers:
        names = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"its weights ({names}, …) are not those of the model_type in config.json")
    if len(layers) != config.depth:
        raise ValueError(f"num_hidden_layers is {config.depth}, but its weights are of {len(layers)} layers")


def _classifier(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, bool]:
    """Return the number of classes, and whether the model is a distilled DeiT with both its heads."""
    weight = tensors.get("classifier.weight")
    if weight is not None and weight.ndim == 2:
        return weight.shape[0], raw["model_type"] == "deit" and weight.shape[1] == 2 * raw.get("hidden_size", 768)
    name = str((raw.get("architectures") or [""])[0])
    classifies = name.endswith(("ForImageClassification", "ForImageClassificationWithTeacher"))
    labels = raw.get("id2label", {"0": "", "1": ""})  # two, where a config.json says nothing
    return (len(labels) if classifies and isinstance(labels, dict) else 0), name.endswith("WithTeacher")


def _labels(raw: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    labels = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(num_classes)}
    if not num_classes:
        return ()
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(num_classes)}:
        raise ValueError(
            f"id2label names {len(labels)} classes, expected 0 to {num_classes - 1}, one for every row of the classifier"
        )
    return tuple(str(labels[str(i)]) for i in range(num_classes))


def _checked(labels: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    if len(labels) != num_classes:
        raise ValueError(f"{len(labels)} labels are described, but the model has {num_classes} classes")
    return labels


def _preprocess(
    folder: Path, family: Family, config: ViTConfig, description: Mapping[str, Any]
) -> tuple[Preprocess, list[str]]:
    path = folder / "preprocessor_config.json"
    if not path.exists():
        if not description:
            raise ValueError(
                f"{path}: no such file, so it is unknown how images become its input, and guessing costs accuracy silently; "
                f"add the file, or make a model file that says it: vitrail export {folder} --to vitrail --describe mean=0.5 std=0.5 "
                "resize=squash interpolation=bilinear"
            )
        return preprocess_from_description(description, image_size=config.image_size, channels=config.in_channels), []
    try:
        preprocess, unused = from_processor(read_json_object(path), family.processor, config.in_channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    notes = [f"preprocessor_config.json: not used here: {', '.join(unused)}"] * bool(unused)
    if description:
        preprocess = preprocess_from_description(description, preprocess)
        notes.append(f"as described, and not as preprocessor_config.json says: {', '.join(description)}")
    return preprocess, notes


def _model_notes(raw: Mapping[str, Any], labels: tuple[str, ...]) -> list[str]:
    """Return notes on what a user should know of a model besides its architecture."""
    notes = []
    dropped = [f"{name} {raw[name]}" for name in _UNUSED if raw.get(name)]
    if dropped:
        notes.append(f"of its training, not taken over: {', '.join(dropped)}")
    if raw.get("problem_type") == "multi_label_classification":
        notes.append(
            "trained for several labels per image (sigmoid); probabilities here are those of one label (softmax)"
        )
    repeated = sorted({label for label in labels if labels.count(label) > 1}) if len(set(labels)) < len(labels) else []
    if repeated:
        notes.append(f"labels that stand for several classes: {', '.join(repeated[:5])}")
    return notes


def _temperature(own: Mapping[str, Any]) -> float:
    value = own.get("temperature", 1.0)
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"vitrail.temperature in config.json is {value!r}; expected a number above 0")
    return float(value)
