"""Write a model in the format of another library, or as a model file (`vitrail export`)."""

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
    """A format that a model can be written in.

    Attributes:
        suffix: end of the output's name, unless the user gives a path.
        write: writes the model into a folder, or a file, and returns notes for the user.
        is_folder: whether the output is a folder; it appears only when all of it is written.
    """

    suffix: str
    write: Callable[[ModelHeader, Mapping[str, Tensor], Path], list[str]]
    is_folder: bool = True


@dataclass(frozen=True)
class Exported:
    """The path of an exported model, and notes on how it was read and written."""

    path: Path
    notes: tuple[str, ...]


def write_vitrail(header: ModelHeader, weights: Mapping[str, Tensor], file: Path) -> list[str]:
    """Write one self-describing model file."""
    save_model(file, weights, header)
    return []


def _write_timm(header: ModelHeader, weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads; timm itself is slow to import."""
    from vitrail.weights.formats.timm_writer import write_timm

    return write_timm(header, weights, folder)


FORMATS = {
    "hf": ExportFormat("-hf", write_hf),
    "timm": ExportFormat("-timm", _write_timm),
    "vitrail": ExportFormat(".safetensors", write_vitrail, is_folder=False),
}


def export(
    model_spec: str | os.PathLike[str],
    to: str,
    *,
    out: str | os.PathLike[str] | None = None,
    description: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model in another format.

    Args:
        model_spec: the model; see `open_weights`.
        to: a name of `FORMATS`.
        out: path of the output; unless given, beside a run or model file, else in the current folder.
        description: what a weights file does not say of its model.

    Raises:
        ValueError: the model cannot be read, the format cannot express it, or there is something at `out` already.
    """
    export_format = pick(FORMATS, to, "--to")
    name = os.fspath(model_spec)
    path = Path(out) if out is not None else default_path(name, export_format.suffix)
    if (path.is_dir() and any(path.iterdir())) or path.is_file():
        raise ValueError(f"{path}: is there already; name another path by --out, or remove it")
    if path.is_dir() and not export_format.is_folder:
        raise ValueError(f"{path}: is a folder; name a file by --out, such as {path / 'model.safetensors'}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    model = open_weights(name, description)
    build_model(model.header.architecture, model.weights, name)  # names and shapes fit, or one error says what does not
    output = new_folder(path) if export_format.is_folder else contextlib.nullcontext(path)
    with output as draft:
        notes = export_format.write(model.header, model.weights, draft)
    return Exported(path, (*model.report.lines(), *notes))


def default_path(name: str, suffix: str) -> Path:
    """Return the path of an export where the user gives none."""
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
