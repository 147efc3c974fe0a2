"""`vitrail report`: rebuild the HTML page of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from vitrail.cli.output import OK
from vitrail.console import Console

HELP = "Rebuild the HTML page of a run."


@dataclass(frozen=True)
class Options:
    """Options of `vitrail report`."""

    run: Annotated[Positional[str], arg(help="run folder", metavar="RUN")]


def run(options: Options) -> int:
    """Rebuild the page of a run, and print its path."""
    from vitrail.report.run_page import build_report

    Console().info(str(build_report(Path(options.run))))
    return OK
