"""`vitrail check`: find problems of a dataset before training."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from vitrail.cli.options import DataArgument, LazyOptions, given_settings, require_folder, section_of
from vitrail.cli.output import OK, fail, write_json
from vitrail.config import RECIPE_NAMES, AugmentConfig, DataConfig
from vitrail.console import Console

if TYPE_CHECKING:
    from vitrail.data.check.check import CheckResult

HELP = "Find what would spoil a training: broken files, leaks, wrong labels, unusual images."

_RECIPE = f"its settings: {', '.join(RECIPE_NAMES)}, or an earlier run's config.json (default: auto)"
# DATA answers the first; the others change nothing that is checked.
_NO_FLAG = ("source", "memory_bytes", "sampling", "folds", "fold", "decode", "cache_side", "cache_bytes")


@dataclass(frozen=True)
class OwnOptions:
    """Options of `vitrail check` that are no settings of a run."""

    data_source: DataArgument
    out: Annotated[str | None, arg(help="write all findings as JSON", metavar="FILE")] = None
    html: Annotated[str | None, arg(help="write a page with the images in question", metavar="FILE")] = None
    quick: Annotated[bool, arg(help="read headers and compare bytes, but decode nothing")] = False
    show_augmentation: Annotated[
        bool, arg(help="write a contact sheet of what training would see, with what was drawn")
    ] = False
    out_sheet: Annotated[str | None, arg(help="its file (default: augmentation.png)", metavar="FILE")] = None
    recipe: Annotated[str | None, arg(help=_RECIPE, metavar="NAME")] = None


# With the settings of data and of augmentation, as in `vitrail train`.
Options = LazyOptions(
    OwnOptions,
    lambda: [section_of("data", DataConfig, skip=_NO_FLAG, otherwise=""), section_of("augment", AugmentConfig)],
)


def run(options: Any) -> int:
    """Check the data, print a summary, and write the files that are asked for."""
    from vitrail.data.check.check import check_dataset
    from vitrail.report.check_page import summary

    for flag, path in (("--out", options.out), ("--html", options.html), ("--out-sheet", options.out_sheet)):
        require_folder(flag, path)
    refuse_options_without_sheet(options)
    console = Console()
    config = DataConfig(source=options.data_source, **given_settings(options.data))
    checked = check_dataset(config, quick=options.quick, bar=console.bar)
    for line in summary(checked):
        console.info(line)
    write_findings(options, checked, console)
    if not checked.ok:
        return fail_with_errors(options, checked, console)
    if options.show_augmentation:
        write_contact_sheet(options, config, console)
    console.success("no errors" + ("" if checked.problems else ", and nothing to warn of"))
    console.info(f"next:    vitrail train {shlex.quote(options.data_source)}")
    return OK


def refuse_options_without_sheet(options: Any) -> None:
    """Refuse options that only the contact sheet uses when none is asked for.

    Raises:
        ValueError: such an option is given without `--show-augmentation`.
    """
    augment = given_settings(options.augment, "augment")
    given = {f"--{name.replace('_', '-')}": value for name, value in augment.items()}
    given |= {"--out-sheet": options.out_sheet, "--recipe": options.recipe}
    for name, value in given.items():
        if value is not None and not options.show_augmentation:
            raise ValueError(f"{name} {value} is for the contact sheet; add --show-augmentation, or leave it out")


def write_findings(options: Any, result: CheckResult, console: Console) -> None:
    """Write all findings as JSON and as a page, as far as they are asked for."""
    from vitrail.report.check_page import write_page

    if options.out is not None:
        write_json(options.out, result.to_dict())
        console.info(f"all findings: {options.out}")
    if options.html is not None:
        write_page(result, options.data_source, Path(options.html))
        console.info(f"page: {options.html}")


def write_contact_sheet(options: Any, config: DataConfig, console: Console) -> None:
    """Write the contact sheet of images as training would see them."""
    from vitrail.report.contact_sheet import write_sheet

    path = options.out_sheet or "augmentation.png"
    given = given_settings(options.augment, "augment")
    write_sheet(config, Path(path), recipe=options.recipe or "auto", given=given)
    console.info(f"what training would see: {path}")


def fail_with_errors(options: Any, result: CheckResult, console: Console) -> int:
    """Print how many errors there are, and where to see them; return the exit code."""
    number = sum(problem.severity == "error" for problem in result.problems)
    if options.html is None and result.dataset is not None:
        data = shlex.quote(options.data_source)
        console.info(f"next:    vitrail check {data} --html check.html   (a page with the images in question)")
    return fail(f"{number:,} errors; fix them first" if number > 1 else "1 error; fix it first")
