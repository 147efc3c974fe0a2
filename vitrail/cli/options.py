"""Flags that several commands share, and flags that are made from the configuration classes.

The shared ones are types for the fields of a command's `Options`, such as `data: DataArgument`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from tyro.conf import Positional, arg

from vitrail.config_schema import field_types, join

MODEL = "run folder, model or weights file, folder of transformers or timm, hf:NAME, timm:NAME, torchvision:NAME"
DATA = (
    "a folder of class folders; a table .csv, .jsonl or .parquet with columns path,label[,split][,group][,weight]; tar "
    "shards: a folder of them, 'train-{000..123}.tar', s3://…, https://…; torchvision:NAME; hf:NAME-or-folder; or digits"
)
_IMAGE_SIZE = "side of the square that images are resized to (the model's own)"
_PATCH_SIZE = "side of a patch, for models trained with several by --model.patch-sizes (the model's own)"
_RESIZE = "crop, squash, or aspect: whole images in their own aspect ratio (the model's own)"

ModelArgument = Annotated[Positional[str], arg(help=MODEL, metavar="MODEL")]
DataArgument = Annotated[Positional[str], arg(help=DATA, metavar="DATA")]
Device = Annotated[str, arg(help="auto, cpu or cuda")]
ImageSize = Annotated[int | None, arg(help=_IMAGE_SIZE, metavar="PIXELS")]
PatchSize = Annotated[int | None, arg(help=_PATCH_SIZE, metavar="PIXELS")]
Resize = Annotated[str | None, arg(help=_RESIZE, metavar="HOW")]
Damaged = Annotated[str, arg(help="broken files: stop, drop or keep", name="data.damaged")]
FiguresFile = Annotated[str | None, arg(help="write all figures as JSON", metavar="FILE")]


@dataclass(frozen=True)
class LazyOptions:
    """A command's own options and settings of a configuration, joined when they are needed: `vitrail --help` does without.

    Attributes:
        own: class of the options that are no settings.
        settings: returns the settings as fields for `make_dataclass`.
    """

    own: type
    settings: Callable[[], list[Any]]

    def build(self) -> type:
        """Return the class whose fields are the command's flags."""
        return dataclasses.make_dataclass("Options", self.settings(), bases=(self.own,), frozen=True)


def options_of(command: Any) -> type:
    """Return the class of a command's options, the fields of which are its flags."""
    return command.Options.build() if isinstance(command.Options, LazyOptions) else command.Options


def settings_of(kind: type, *, skip: tuple[str, ...] = (), otherwise: str = ", or the recipe's") -> list[Any]:
    """Return the settings of a configuration class as fields for `make_dataclass`, with those of nested classes.

    Every setting is None unless given, so that a recipe knows what the user gave.

    Args:
        skip: dotted names of settings that get no flag.
        otherwise: text that follows the default in `--help`.
    """
    fields: list[Any] = []
    kinds = field_types(kind)
    for field in dataclasses.fields(kind):
        inner = kinds[field.name]
        if field.name in skip:
            continue
        if dataclasses.is_dataclass(inner):
            prefix = f"{field.name}."
            inside = tuple(name.removeprefix(prefix) for name in skip if name.startswith(prefix))
            fields.append(section_of(field.name, cast(type, inner), skip=inside, otherwise=otherwise))
        else:
            fields.append((field.name, _flag_of(field, inner, otherwise), None))
    return fields


def section_of(
    name: str, kind: type, *, skip: tuple[str, ...] = (), otherwise: str = ", or the recipe's"
) -> tuple[str, type, Any]:
    """Return a field for `make_dataclass` whose flags are `--name.setting`; the other arguments are `settings_of`'s."""
    nested = dataclasses.make_dataclass(name, settings_of(kind, skip=skip, otherwise=otherwise), frozen=True)
    return name, nested, dataclasses.field(default_factory=nested)


def _flag_of(field: dataclasses.Field[Any], kind: Any, otherwise: str) -> Any:
    """Return a setting's type for tyro, which may be None, with its help text, its default and the name of its type."""
    default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    is_tuple = typing.get_origin(kind) is tuple
    metavar = (typing.get_args(kind)[0] if is_tuple else kind).__name__.upper() + "…" * is_tuple
    hint = f"(default: {default}{otherwise})"
    return Annotated[kind | None, arg(help=field.metadata["help"], help_behavior_hint=hint, metavar=metavar)]


def given_settings(options: Any, where: str = "", *, own: type | None = None) -> dict[str, Any]:
    """Return the settings that were given on the command line, by dotted name.

    Args:
        where: dotted name of the section that `options` is.
        own: class of the command's own options, which are not settings and are left out.
    """
    left_out = {field.name for field in dataclasses.fields(own)} if own is not None else set()
    given: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        name, value = join(where, field.name), getattr(options, field.name)
        if field.name in left_out or value is None:
            continue
        given |= given_settings(value, name) if dataclasses.is_dataclass(value) else {name: value}
    return given


def require_folder(flag: str, path: str | None) -> None:
    """Raise an error, before any work is done, if the folder of an output file does not exist.

    Raises:
        ValueError: the folder of `path` is missing; the message names the flag.
    """
    if path is not None and not Path(path).parent.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {Path(path).parent}")
