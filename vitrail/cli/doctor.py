"""`vitrail doctor`: report what this machine can do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from vitrail.cli.options import require_folder
from vitrail.cli.output import OK, write_json
from vitrail.console import Console

if TYPE_CHECKING:
    from vitrail.doctor import Finding

HELP = "Say what this machine can do: processors, number formats, decoders, attention kernels."

_MODELS = ("micro4", "s16", "s16-local7")  # small images, photographs, large images with local attention


@dataclass(frozen=True)
class Options:
    """Options of `vitrail doctor`."""

    models: Annotated[
        Positional[tuple[str, ...]], arg(help="variants whose attention is measured", metavar="NAME…")
    ] = _MODELS
    fresh: Annotated[bool, arg(help="measure again what was measured before")] = False
    out: Annotated[str | None, arg(help="write all lines as JSON", metavar="FILE")] = None


def run(options: Options) -> int:
    """Examine this machine, print what it can do, and write it when a file is asked for."""
    from vitrail.doctor import examine

    require_folder("--out", options.out)
    findings = examine(options.models, fresh=options.fresh)
    print_findings(findings, Console())
    if options.out is not None:
        write_json(options.out, [dataclasses.asdict(finding) for finding in findings])
    return OK


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings under their topics, values aligned within a topic."""
    for topic, members in itertools.groupby(findings, key=lambda finding: finding.topic):
        group = list(members)
        width = 2 + max(len(finding.name) for finding in group)
        console.terminal.print(f"[bold]{topic}[/]")
        for finding in group:
            console.info(f"  {finding.name:<{width}}{finding.value}")
            if finding.advice:
                console.warn(finding.advice)
