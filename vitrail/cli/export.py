"""`vitrail export`: write a model in the format of another library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from vitrail.cli.options import ModelArgument
from vitrail.cli.output import OK
from vitrail.console import Console

HELP = "Write a model for transformers or timm, or a foreign model as a model file of Vitrail."

_TO = "hf or timm: a folder that it opens; vitrail: one self-describing model file"
_DESCRIBE = "what the model's files do not say: mean=0.5 resize=squash labels=names.txt"


@dataclass(frozen=True)
class Options:
    """Options of `vitrail export`."""

    model: ModelArgument
    to: Annotated[str, arg(help=_TO, metavar="FORMAT")]
    out: Annotated[str | None, arg(help="where to (default: beside the model)", metavar="PATH")] = None
    describe: Annotated[tuple[str, ...], arg(help=_DESCRIBE, metavar="KEY=VALUE…")] = ()


def run(options: Options) -> int:
    """Write a model in another format, and print what changed on the way."""
    from vitrail.export.formats import export
    from vitrail.weights.user_spec import parse_description

    console = Console()
    exported = export(options.model, options.to, out=options.out, description=parse_description(options.describe))
    for note in exported.notes:
        console.info(note)
    console.success(f"written: {exported.path}")
    return OK
