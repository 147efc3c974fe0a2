"""`vitrail export`: the formats there are, and what each writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.files import new_folder
from vitrail.lookup import pick
from vitrail.weights.formats.hf_writer import write_hf
from vitrail.weights.model_file import ModelHeader, build_model, save_model
from vitrail.weights.resolve import open_weights


@dataclass(frozen=True)
class ExportFormat:
    """A format.

    Attributes:
        suffix: what the model's name gets behind it, unless the user names a place.
        write: writes into a folder, or a file, and returns what should be told.
        is_folder: whether it is a folder; it appears when all of it is written.
    """

    suffix: str
    write: Callable[[ModelHeader, Mapping[str, Tensor], Path], list[str]]
    is_folder: bool = True


@dataclass(frozen=True)
class Exported:
    """What an export left: the path, and what should be told of the reading and of the writing."""

    path: Path
    notes: tuple[str, ...]


def write_vitrail(header: ModelHeader, weights: Mapping[str, Tensor], file: Path) -> list[str]:
    """Write one self-describing model file."""
    save_model(file, weights, header)
    return []


def write_timm(header: ModelHeader, weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads; timm itself is slow to import."""
    from vitrail.weights.formats.timm_writer import write_timm as write

    return write(header, weights, folder)


FORMATS = {
    "hf": ExportFormat("-hf", write_hf),
    "timm": ExportFormat("-timm", write_timm),
    "vitrail": ExportFormat(".safetensors", write_vitrail, is_folder=False),
}


def export(
    word: str | os.PathLike[str],
    to: str,
    *,
    out: str | os.PathLike[str] | None = None,
    described: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model in another format.

    Args:
        word: any model spec; see `open_weights`.
        to: a name of `TARGETS`.
        out: where to; unless given, beside a run or model file, else in this folder.
        described: what a bare weights file does not say of itself.

    Raises:
        ValueError: the model cannot be read, the format cannot express it, or there is something at `out` already.
    """
    target = pick(FORMATS, to, "--to")
    name = os.fspath(word)
    path = Path(out) if out is not None else default_place(name, target.suffix)
    if (path.is_dir() and any(path.iterdir())) or path.is_file():
        raise ValueError(f"{path}: is there already; name another place by --out, or remove it")
    if path.is_dir() and not target.is_folder:
        raise ValueError(f"{path}: is a folder; name a file by --out, such as {path / 'model.safetensors'}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    model = open_weights(name, described)
    build_model(model.header.architecture, model.weights, name)  # names and shapes fit, or one error says what does not
    place = new_folder(path) if target.is_folder else contextlib.nullcontext(path)
    with place as draft:
        notes = target.write(model.header, model.weights, draft)
    return Exported(path, (*model.report.lines(), *notes))


def default_place(name: str, suffix: str) -> Path:
    """Return where an export goes unless the user says so."""
    path = Path(name)
    if path.is_dir():
        return path.with_name(path.name + suffix) if path.name else Path(path.absolute().name + suffix)
    if path.is_file():
        return (
            path.with_name(path.stem + suffix)
            if path.stem + suffix != path.name
            else path.with_name("vitrail-" + path.name)
        )
    return Path(name.partition(":")[2].partition("@")[0].rstrip("/").rsplit("/", 1)[-1] + suffix)
