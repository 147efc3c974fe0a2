"""`vitrail shard`: write images into tar shards."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from vitrail.cli.options import Damaged, DataArgument
from vitrail.cli.output import OK
from vitrail.config import DataConfig
from vitrail.console import Console

if TYPE_CHECKING:
    from vitrail.data.datasets.write_shards import WrittenShards

HELP = "Write images into WebDataset tar shards, as they are, for network disks, object stores and other readers."

_BYTES = "begin a new shard before it exceeds this many bytes, too"
_SEED = "of the order: images of each split are shuffled, so that readers in order get mixed classes"


@dataclass(frozen=True)
class Options:
    """Options of `vitrail shard`."""

    data: DataArgument
    out: Annotated[Positional[str], arg(help="folder to write; it must be new or empty", metavar="OUT")]
    size: Annotated[int, arg(help="images in a shard", metavar="N")] = 3000
    bytes: Annotated[int | None, arg(help=_BYTES, metavar="N")] = None
    seed: Annotated[int, arg(help=_SEED)] = 0
    damaged: Damaged = "stop"


def run(options: Options) -> int:
    """Write shards, and print a summary of them."""
    from vitrail.data.datasets.write_shards import write_shards

    console = Console()
    config = DataConfig(source=options.data, damaged=options.damaged)
    written = write_shards(
        config, Path(options.out), size=options.size, limit_bytes=options.bytes, seed=options.seed, bar=console.bar
    )
    print_result(written, options.out, console)
    return OK


def print_result(written: WrittenShards, folder: str, console: Console) -> None:
    """Print the number of images and shards, and one pattern for the shards of each split."""
    from vitrail.data.datasets.write_shards import WITHOUT_SPLITS

    for problem in written.problems:
        console.warn(problem.message)
    whole = {WITHOUT_SPLITS: "images"}  # their shards begin with another word
    counts = ", ".join(f"{count:,} {whole.get(split, split)}" for split, count in written.counts.items())
    left_out = f"; {written.num_left_out:,} broken ones left out" if written.num_left_out else ""
    console.success(f"{counts} in {len(written.names):,} shards, {written.num_bytes / 1e6:,.1f} MB{left_out}")
    for split in written.counts:
        names = [name for name in written.names if name.startswith(f"{split}-")]
        last = names[-1].removeprefix(f"{split}-").removesuffix(".tar")
        console.info(f"{whole.get(split, split) + ':':<10}{folder}/{split}-{{{'0' * len(last)}..{last}}}.tar")
    console.info(f"next:     vitrail train {shlex.quote(folder)}")
