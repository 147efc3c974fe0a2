"""`vitrail train`: train a model on images, and leave a run folder."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from vitrail.cli.options import MODEL, DataArgument, LazyOptions, given_settings, settings_of
from vitrail.cli.output import OK, recall_note
from vitrail.config import RECIPE_NAMES, RunConfig
from vitrail.console import Console

if TYPE_CHECKING:
    from vitrail.api import Result

HELP = "Check the data, train, evaluate, and leave a run folder with weights and a report."

_MODEL = f"variant, such as nano4, ti16, s16-concat; or trained weights to start from: {MODEL}"
_RECIPE = f"{', '.join(RECIPE_NAMES)}, or an earlier run's config.json (default: auto)"
# Settings that the command's own options give, or the data.
_NO_FLAG = ("recipe", "variant", "pretrained", "data.source", "model.num_classes")


@dataclass(frozen=True)
class OwnOptions:
    """Options of `vitrail train` that are no settings of a run."""

    data_source: DataArgument
    out: Annotated[str | None, arg(help="folder of the run (default: runs/NAME)", metavar="RUN")] = None
    model_name: Annotated[str | None, arg(name="model", help=_MODEL, metavar="MODEL")] = None
    recipe: Annotated[str | None, arg(help=_RECIPE, metavar="NAME")] = None
    resume: Annotated[bool, arg(help="continue the run in --out (default: the newest of DATA), exactly")] = False


# With every setting of `RunConfig` as `--section.field`.
Options = LazyOptions(OwnOptions, lambda: settings_of(RunConfig, skip=_NO_FLAG))


def run(options: Any) -> int:
    """Train a model, then print its accuracy and what to type next."""
    from vitrail import distributed
    from vitrail.api import train
    from vitrail.training.signals import Stopped

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    try:
        result = train(
            options.data_source,
            out=options.out,
            model=options.model_name,
            recipe=options.recipe,
            resume=options.resume,
            console=console,
            **given_settings(options, own=OwnOptions),
        )
    except Stopped as stop:
        console.info(f"{stop}; everything is saved. Go on with:\n  {stop.command}")
        return 128 + stop.number
    finally:
        distributed.shutdown()
    print_result(result, console)
    return OK


def print_result(result: Result, console: Console) -> None:
    """Print the accuracy on every split, the paths of the files, and the next command."""
    for split, metrics in result.evaluation.items():
        name = {"val": "validation", "test": "test"}[split]
        correct = round(metrics["top1"] * metrics["num_images"])
        counts = f"{correct:,} of {metrics['num_images']:,}"
        console.success(f"{name} accuracy {metrics['top1']:.2%} ({counts}){recall_note(metrics)}")
    run_folder = result.folder
    if result.folds:
        console.info(f"folds:   {result.folder / 'folds.json'}")
        run_folder = result.folder / "fold-0"
    console.info(f"report:  {run_folder / 'report.html'}")
    console.info(f"model:   {run_folder / 'model.safetensors'}")
    console.info(f"next:    vitrail predict {shlex.quote(str(run_folder))} IMAGE…")
