"""Read timm's models: published weights by name, a folder that timm wrote, or a file with the name of its model.

The architecture is read from the modules of timm's own model, which is built without storage.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import timm.models
import torch
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from vitrail.data.images.preprocess import INTERPOLATIONS, Preprocess
from vitrail.lookup import first_line
from vitrail.models.config import ViTConfig
from vitrail.weights import naming
from vitrail.weights.file_kinds import is_timm_folder
from vitrail.weights.finalise import RawModel, finalise, plain_labels, with_zero_rows
from vitrail.weights.formats.state_dict import foreign_names_error
from vitrail.weights.formats.state_dict_files import read_state_dict
from vitrail.weights.formats.timm_modules import read_architecture
from vitrail.weights.hub import snapshot
from vitrail.weights.imported_model import ImportedModel
from vitrail.weights.key_mapping import to_ours

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def open_timm_model(rest: str, description: Mapping[str, Any] | None = None) -> ImportedModel:
    """Return the model of `timm:REST`, where REST names published weights, a folder, NAME=FILE, or hf-hub:OWNER/NAME.

    Raises:
        ValueError: timm has no such model, its weights cannot be had or do not fit, or Vitrail cannot express it.
    """
    if description:
        raise ValueError(
            f"timm:{rest}: timm describes all of its models; {', '.join(description)} cannot be given with it"
        )
    if Path(rest).is_dir():
        return open_timm_folder(rest)
    if rest.startswith("hf-hub:"):
        return _from_repository(rest)
    name, equals, file = rest.partition("=")
    return _from_file(name, Path(file)) if equals else _from_hub(name)


def open_timm_folder(name: str, origin: str = "", notes: tuple[str, ...] = ()) -> ImportedModel:
    """Return the model of a folder with timm's `config.json` and weights.

    Args:
        origin: name of the model in the report, if not the folder's.
        notes: more notes for the report.

    Raises:
        ValueError: the folder has no such files, or they do not fit each other or Vitrail.
    """
    folder = Path(name)
    if not is_timm_folder(folder):
        raise ValueError(f"{name}: has no config.json of timm's, which names its architecture")
    file = next((folder / file_name for file_name in WEIGHTS if (folder / file_name).is_file()), None)
    if file is None:
        raise ValueError(f"{name}: has no weights; expected {' or '.join(WEIGHTS)}")
    content = json.loads((folder / "config.json").read_text("utf-8"))
    refuse_unknown_name(content["architecture"], f"{name}/config.json: architecture")
    model = _built(f"local-dir:{folder}", name)
    return _imported(origin or name, model, read_state_dict(file).tensors, exact_size=True, notes=notes)


def _from_repository(rest: str) -> ImportedModel:
    """Return the model of a repository on the hub that timm wrote, from huggingface_hub's cache or the network."""
    files = snapshot(rest.removeprefix("hf-hub:"), "timm:hf-hub:")
    return open_timm_folder(str(files.folder), f"timm:hf-hub:{files.name}@{files.commit}", files.notes)


def _from_file(name: str, file: Path) -> ImportedModel:
    refuse_unknown_name(name, "timm:")
    origin = f"timm:{name}={file}"
    state_dict = read_state_dict(file)
    if any("/" in key for key in state_dict.tensors):
        raise ValueError(f"{origin}: the file has Google's layout; give it alone, without a name of timm's")
    head = state_dict.tensors.get("head.weight")
    classes = {"num_classes": len(head)} if head is not None and head.ndim == 2 else {}  # it may be fine-tuned
    return _imported(origin, _built(name, origin, **classes), state_dict.tensors, notes=state_dict.notes)


def _from_hub(name: str) -> ImportedModel:
    """Return published weights through timm, which caches them with huggingface_hub."""
    refuse_unknown_name(name, "timm:")
    origin = f"timm:{name}"
    model = _built(name, origin)
    read_architecture(model, origin)  # what cannot be expressed is refused before anything is downloaded
    if not (model.pretrained_cfg.get("hf_hub_id") or model.pretrained_cfg.get("url")):
        raise ValueError(f"{origin}: timm publishes no weights of this name; one with weights: {_published(name)}")
    try:
        _ask_hub(model.pretrained_cfg.get("hf_hub_id") or "")
        trained: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # network, cache and hub errors come in many classes
        raise ValueError(
            f"{origin}: its weights could not be had ({first_line(error)}); they need the network once, then come from the cache; or "
            f"give a file of them: timm:{name}=FILE"
        ) from None
    return _imported(origin, trained, trained.state_dict())


def _ask_hub(repository: str) -> None:
    """Raise the hub's error at once where nothing is in the cache: a download would retry for most of a minute."""
    cached = (huggingface_hub.try_to_load_from_cache(repository, name) for name in WEIGHTS) if repository else ()
    if repository and not any(isinstance(path, str) for path in cached):
        huggingface_hub.HfApi().model_info(repository.partition("@")[0], timeout=10)


def _built(name: str, origin: str, **arguments: Any) -> Any:
    """Return timm's model without storage.

    Raises:
        ValueError: timm refuses to build it.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments)
    except Exception as error:  # wrong arguments in a folder's config.json raise errors of any class
        raise ValueError(f"{origin}: timm cannot build it ({first_line(error)})") from None


def _imported(
    origin: str, model: Any, tensors: Mapping[str, Tensor], *, exact_size: bool = False, notes: tuple[str, ...] = ()
) -> ImportedModel:
    """Return a timm model as one of ours: its weights, preprocessing and labels.

    Args:
        exact_size: whether the preprocessing's size must be the model's, unless the model takes any size.
    """
    timm_model = read_architecture(model, origin)
    config, cfg = timm_model.config, dict(model.pretrained_cfg)
    preprocess, preprocess_notes = timm_preprocess(cfg, config, origin)
    if exact_size and preprocess.image_size != config.image_size and not timm_model.any_size:
        raise ValueError(
            f"{origin}: its config.json does not fit itself: pretrained_cfg.input_size is {preprocess.image_size} px, the model "
            f"takes {config.image_size} px"
        )
    labels, label_notes = timm_labels(cfg, config.num_classes)
    weights, unexpected = to_ours(naming.join_heads(tensors), timm_model.rules, config, origin)
    if not weights:
        raise ValueError(foreign_names_error(origin, tensors, "timm's"))
    weights = _with_all_positions(weights, model, config)
    notes = (*notes, *timm_model.notes, *preprocess_notes, *label_notes)
    return finalise(RawModel(origin, weights, (), tuple(unexpected), notes), config, preprocess, labels)


def _with_all_positions(weights: dict[str, Tensor], model: Any, config: ViTConfig) -> dict[str, Tensor]:
    """Return weights whose position table has a row for every token: zeros where timm adds no position."""
    if config.num_prefix and "pos_embed" in weights and model.no_embed_class:
        weights["pos_embed"] = with_zero_rows(weights["pos_embed"], 0, config.num_prefix)
    return weights


def timm_preprocess(cfg: Mapping[str, Any], config: ViTConfig, origin: str) -> tuple[Preprocess, list[str]]:
    """Return the preprocessing of timm's `create_transform(**resolve_data_config(...))`, and notes.

    Raises:
        ValueError: the preprocessing cannot be expressed.
    """
    data = resolve_data_config(pretrained_cfg=dict(cfg))
    channels, height, width = data["input_size"]
    fraction, mode, interpolation = data["crop_pct"], data["crop_mode"], data["interpolation"]
    problems = []
    if height != width:
        problems.append(f"input_size {height}×{width} is not square")
    if channels != config.in_channels:
        problems.append(f"input_size has {channels} channels, the model {config.in_channels}")
    if interpolation not in INTERPOLATIONS:
        problems.append(f"interpolation {interpolation!r} is none of {', '.join(INTERPOLATIONS)}")
    if mode not in ("center", "squash"):
        problems.append(f"crop_mode {mode!r} is neither 'center' nor 'squash'")
    if fraction > 1:
        problems.append(f"crop_pct {fraction} pads images")
    if problems:
        raise ValueError(f"{origin}: its preprocessing cannot be expressed: {'; '.join(problems)}")
    preprocess = Preprocess(
        image_size=height,
        channels=channels,
        resize="crop" if mode == "center" else "squash" if fraction == 1 else "squash_crop",
        crop_fraction=float(fraction),
        interpolation=interpolation,
        mean=tuple(float(value) for value in data["mean"]),
        std=tuple(float(value) for value in data["std"]),
    )
    test = cfg.get("test_input_size")
    notes = (
        [f"timm names {test[-1]} px as its best size for tests; {height} px is the size of training"] if test else []
    )
    return preprocess, notes


def timm_labels(cfg: Mapping[str, Any], count: int) -> tuple[tuple[str, ...], list[str]]:
    """Return the class names that timm has for a model or assumes from its number of classes, and notes on assumptions."""
    names = cfg.get("label_names")
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    if names and len(names) == count:
        return tuple(str(name) for name in names), []
    subset = infer_imagenet_subset({"num_classes": count}) if count else None
    if subset:
        known = ImageNetInfo(subset).label_names()
        return tuple(known), [f"labels are the WordNet ids of {subset}, assumed from {count} classes"]
    return plain_labels(count), ["labels are numbers: timm names none"] * bool(count)


def refuse_unknown_name(name: str, where: str) -> None:
    """Raise a ValueError unless timm has a model of this name, and weights of its tag."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        family = timm.list_models(f"{architecture.partition('_')[0]}_*")
        near = timm.list_models(f"*{architecture}*")[:1] or difflib.get_close_matches(
            architecture, family or timm.list_models(), n=1, cutoff=0.5
        )
        hint = f"; did you mean {near[0]!r}?" if near else "; expected such as 'vit_base_patch16_224'"
        raise ValueError(f"{where} {name!r} is no model of timm's{hint}; timm.list_models() has them all")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        raise ValueError(
            f"{where} {name!r}: timm has no weights {tag!r} of {architecture}; it has {_published(name)}"
        ) from None


def _published(name: str) -> str:
    known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    return ", ".join(known[:6]) or "none"
