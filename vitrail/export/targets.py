"""`vitrail export`: the formats there are, and what each writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.export.hf import write_hf
from vitrail.lookup import pick
from vitrail.weights.imported import Imported
from vitrail.weights.store import build_model, save_model
from vitrail.weights.words import open_weights


@dataclass(frozen=True)
class Target:
    """A format.

    Attributes:
        suffix: what the model's name gets behind it, unless the user names a place.
        write: writes a model to a path that does not exist, and returns what should be told.
    """

    suffix: str
    write: Callable[[Imported, Path], list[str]]


@dataclass(frozen=True)
class Exported:
    """What an export left: the path, and what should be told of the reading and of the writing."""

    path: Path
    notes: tuple[str, ...]


def write_vitrail(model: Imported, out: Path) -> list[str]:
    """Write one self-describing model file."""
    if out.is_dir():
        raise ValueError(
            f"{out}: is a folder; --out of a model file must name a file, such as {out / 'model.safetensors'}"
        )
    save_model(out, model.weights, model.header)
    return []


TARGETS = {
    "hf": Target("-hf", write_hf),
    "vitrail": Target(".safetensors", write_vitrail),
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
        word: any MODEL word; see `open_weights`.
        to: a name of `TARGETS`.
        out: where to; unless given, beside a run or model file, else in this folder.
        described: what a bare weights file does not say of itself.

    Raises:
        ValueError: the model cannot be read, the format cannot express it, or there is something at `out` already.
    """
    target = pick(TARGETS, to, "--to")
    name = os.fspath(word)
    path = Path(out) if out is not None else default_place(name, target.suffix)
    if (path.is_dir() and any(path.iterdir())) or path.is_file():
        raise ValueError(f"{path}: is there already; name another place by --out, or remove it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    model = open_weights(name, described)
    build_model(model.header.architecture, model.weights, name)  # names and shapes fit, or one error says what does not
    return Exported(path, (*model.report.lines(), *target.write(model, path)))


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
