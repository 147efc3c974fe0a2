"""`vitrail predict`: predict a label and its probability for every image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from vitrail.cli.options import Device, ImageSize, ModelArgument, PatchSize, Resize
from vitrail.cli.output import OK, USAGE_ERROR, fail
from vitrail.console import Console

if TYPE_CHECKING:
    from vitrail.evaluation.classifier import Classifier, Prediction

HELP = "Predict the labels of images; a broken file gets an error in its row."

_TOP = "labels to rank per image (5 in a table, 1 on the terminal)"


@dataclass(frozen=True)
class Options:
    """Options of `vitrail predict`."""

    model: ModelArgument
    paths: Annotated[Positional[tuple[str, ...]], arg(help="images, folders, globs", metavar="PATH…")]
    out: Annotated[str | None, arg(help="write a table: .csv, .jsonl or .parquet", metavar="FILE")] = None
    top: Annotated[int | None, arg(help=_TOP, metavar="K")] = None
    device: Device = "auto"
    image_size: ImageSize = None
    patch_size: PatchSize = None
    resize: Resize = None


def run(options: Options) -> int:
    """Predict, and print or write a row for every image."""
    from vitrail.evaluation.prediction_tables import check_ending, find_images, write_table

    if options.out is not None:
        check_ending(Path(options.out))
    if not options.paths:
        return fail("predict needs at least one image, folder or glob after MODEL", USAGE_ERROR)
    console = Console()
    classifier = load_classifier(options, console)
    rows = classifier.predict(find_images(options.paths), top=5 if options.top is None else options.top)
    failed = sum(row.error is not None for row in rows)
    if options.out is None:
        for row in rows:
            console.info(f"{row.path}  {row_text(row, top=options.top or 1)}")
    else:
        write_table(Path(options.out), rows)
        console.info(f"{len(rows):,} rows in {options.out}" + (f", {failed:,} with an error" if failed else ""))
    return OK if failed < len(rows) else fail(f"none of the {len(rows)} images could be read")


def load_classifier(options: Options, console: Console) -> Classifier:
    """Return the model at the requested size, after warnings on what makes its predictions doubtful."""
    from vitrail.device import pick_device
    from vitrail.evaluation.classifier import load
    from vitrail.evaluation.evaluate import report_weights, warn_of_patches

    classifier = load(options.model).to(pick_device(options.device))
    classifier = classifier.at(image_size=options.image_size, patch_size=options.patch_size, resize=options.resize)
    report_weights(classifier, console)
    warn_of_patches(classifier, console)
    classifier = classifier.tuned(measuring=False)
    return classifier


def row_text(row: Prediction, *, top: int) -> str:
    """Return the `top` most probable labels of an image with their probabilities, or why it could not be read."""
    if row.error is not None:
        return f"ERROR {row.error}"
    ranked = list(zip(row.top_labels, row.top_probabilities, strict=True))[:top]
    return "  ".join(f"{label}  {probability:.1%}" for label, probability in ranked)
