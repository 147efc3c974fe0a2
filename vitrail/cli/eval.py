"""`vitrail eval`: evaluate a model on labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from vitrail.cli.options import (
    Damaged,
    DataArgument,
    Device,
    FiguresFile,
    ImageSize,
    ModelArgument,
    PatchSize,
    Resize,
    require_folder,
)
from vitrail.cli.output import OK, recall_note, write_json
from vitrail.config import DataConfig
from vitrail.console import Console

HELP = "Evaluate a model on labelled images: accuracy, loss, calibration, confusion."


@dataclass(frozen=True)
class Options:
    """Options of `vitrail eval`."""

    model: ModelArgument
    data: DataArgument
    split: Annotated[str | None, arg(help="test, val, train or all; the first there is", metavar="NAME")] = None
    out: FiguresFile = None
    device: Device = "auto"
    image_size: ImageSize = None
    patch_size: PatchSize = None
    resize: Resize = None
    damaged: Damaged = "stop"


def run(options: Options) -> int:
    """Evaluate a model, print the headline, and write all figures when they are asked for."""
    from vitrail.device import pick_device
    from vitrail.evaluation.evaluate import evaluate

    require_folder("--out", options.out)
    console = Console()
    metrics = evaluate(
        options.model,
        options.data,
        split=options.split,
        device=pick_device(options.device),
        console=console,
        data=DataConfig(damaged=options.damaged),
        image_size=options.image_size,
        patch_size=options.patch_size,
        resize=options.resize,
    )
    print_metrics(metrics, console)
    if options.out is not None:
        write_json(options.out, metrics)
        console.info(f"all figures: {options.out}")
    return OK


def print_metrics(metrics: Mapping[str, Any], console: Console) -> None:
    """Print accuracy, loss, calibration, and the classes with the lowest recall."""
    images = f"{metrics['num_images']:,} images ({metrics['split']})"
    console.success(f"accuracy {metrics['top1']:.2%} of {images}{recall_note(metrics)}")
    calibration = f"{metrics['ece']:.2%} (calibrated, as predict: {metrics['calibrated']['ece']:.2%})"
    console.info(f"top-5 {metrics['top5']:.2%}  loss {metrics['loss']:.4f}  calibration error {calibration}")
    recalls = [(row["recall"], label) for label, row in metrics["per_class"].items() if row["recall"] is not None]
    lowest = ", ".join(f"{label} ({recall:.1%})" for recall, label in sorted(recalls)[:3])
    console.info(f"lowest recall: {lowest}")
