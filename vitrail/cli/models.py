"""`vitrail models`: list the architectures with their size and cost, or draw one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tyro.conf import Positional, arg

from vitrail.cli.output import OK
from vitrail.console import Console

HELP = "List the architectures with their parameters and cost, or draw one."

_NAME = "draw this one: size + patch + suffixes, such as s16-resnet50"
_COLUMNS = ("name", "image", "tokens", "width", "depth", "heads", "parameters", "multiply-adds")


@dataclass(frozen=True)
class Options:
    """Options of `vitrail models`."""

    name: Annotated[Positional[str | None], arg(help=_NAME, metavar="NAME")] = None


def run(options: Options) -> int:
    """List the variants, or draw the one that is named."""
    if options.name is None:
        print_variants(Console())
    else:
        print_drawing(options.name, Console())
    return OK


def print_variants(console: Console) -> None:
    """Print a table of the variants with their size and cost, and how names are combined."""
    from vitrail.models.variants import LISTED, SUFFIXES

    table = Table(*_COLUMNS, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in LISTED:
        table.add_row(*variant_row(name))
    console.terminal.print(table)
    console.info("Any size and patch can be combined (s8, ti14, …).")
    console.info(f"Suffixes: {', '.join('-' + suffix for suffix in SUFFIXES)}, -local7 (any odd window),")
    console.info(
        "and timm's CNNs as encoder, such as -resnet50, -efficientnet_b0; several combine: s16-resnet50-concat."
    )
    console.info("One as a drawing of its data flow: vitrail models NAME")


def variant_row(name: str) -> tuple[str, ...]:
    """Return a variant's row of the table: its size, its parameters, and its multiply-adds for one image."""
    from vitrail.models.cost import num_macs, num_parameters
    from vitrail.models.variants import variant_config

    config = variant_config(name)
    num_tokens = config.num_prefix + config.grid[0] * config.grid[1]
    sizes = (config.image_size, num_tokens, config.embed_dim, config.depth, config.num_heads)
    cost = (f"{num_parameters(config) / 1e6:.2f} M", f"{num_macs(config) / 1e9:.2f} G")
    return (name, *map(str, sizes), *cost)


def print_drawing(name: str, console: Console) -> None:
    """Print a variant's data flow with shapes, parameters and cost."""
    from vitrail.models.drawing import draw_architecture
    from vitrail.models.kernel_choice import remark_on_window
    from vitrail.models.variants import variant_config

    config = variant_config(name)
    console.info(f"{name}: {draw_architecture(config)}")
    if remark := remark_on_window(config):
        console.info(remark)
