"""`vitrail probe`: evaluate a model's features on a dataset by k-NN and linear classifiers, without training the model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from vitrail.cli.options import MODEL, Damaged, DataArgument, Device, FiguresFile, ImageSize, require_folder
from vitrail.cli.output import OK, write_json
from vitrail.config import DataConfig
from vitrail.console import Console

HELP = "Evaluate a model's features on your images in seconds: k-NN, ridge and logistic regression."

_SAVE = "write a model file, .safetensors, whose head is the logistic regression"


@dataclass(frozen=True)
class Options:
    """Options of `vitrail probe`."""

    model: Annotated[Positional[str], arg(help=f"{MODEL}; or a variant for random weights", metavar="MODEL")]
    data: DataArgument
    out: FiguresFile = None
    save: Annotated[str | None, arg(help=_SAVE, metavar="FILE")] = None
    device: Device = "auto"
    image_size: ImageSize = None
    damaged: Damaged = "stop"
    fresh: Annotated[bool, arg(help="compute the features again, also those that are cached")] = False


def run(options: Options) -> int:
    """Probe a model, print each accuracy with its time, and write all figures if requested."""
    from vitrail.device import pick_device
    from vitrail.evaluation.probe import probe

    require_folder("--out", options.out)
    console = Console()
    result = probe(
        options.model,
        options.data,
        device=pick_device(options.device),
        console=console,
        data=DataConfig(damaged=options.damaged),
        image_size=options.image_size,
        save=None if options.save is None else Path(options.save),
        fresh=options.fresh,
    )
    print_result(result, console)
    if options.out is not None:
        write_json(options.out, result)
        console.info(f"all figures: {options.out}")
    print_next(options, console)
    return OK


def print_result(result: Mapping[str, Any], console: Console) -> None:
    """Print the accuracy of each of the three classifiers, and the time of each step."""
    seconds = result["seconds_each"]
    images = f"{result['num_train']:,} images (train), evaluated on {result['num_images']:,} ({result['split']})"
    console.info(f"fitted to {images}")
    counts = f"{result['computed']:,} images computed, {result['from_cache']:,} from the cache"
    console.info(f"features  {counts}, {result['num_features']} numbers each  {seconds['features']:.2f} s")
    for name, title, how in (
        ("knn", "k-NN", f"k = {result['k']}"),
        ("ridge", "ridge", f"λ = {result['lambda']:.3g}, chosen by leave-one-out"),
        ("logistic", "logistic", f"α = {result['alpha']:.3g}, {result['steps']} steps"),
    ):
        console.success(f"{title:<9} accuracy {result[name]:.2%}  {seconds[name]:.2f} s  ({how})")
    console.info(f"all of it took {result['seconds']:.1f} s, of which checking the data took {seconds['data']:.1f} s")
    console.info(f"features cached in {result['cache']} ({result['cache_bytes'] / 1e6:.1f} MB)")
    if not result["converged"]:
        console.warn("the logistic regression has not converged; its accuracy may still change a little")


def print_next(options: Options, console: Console) -> None:
    """Print the next command: save the probe as a model, or evaluate the one that was saved."""
    model, data = shlex.quote(options.model), shlex.quote(options.data)
    if options.save is None:
        size = "" if options.image_size is None else f" --image-size {options.image_size}"
        console.info(f"next:    vitrail probe {model} {data}{size} --save probe.safetensors")
    else:
        console.info(f"model:   {options.save}")
        console.info(f"next:    vitrail eval {shlex.quote(options.save)} {data}")
