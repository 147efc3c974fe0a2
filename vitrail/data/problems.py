"""Problems of a dataset, in one form for the console, JSON and the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal[
    "unreadable",
    "damaged",
    "refused",
    "duplicate",
    "near-duplicate",
    "leak",
    "label-conflict",
    "missing-class",
    "small-class",
    "imbalance",
    "orientation",
    "mode",
    "name",
]


@dataclass(frozen=True)
class Problem:
    """One problem of a dataset: `paths` are relative to it, `message` is for people."""

    severity: Literal["error", "warning"]
    kind: Kind
    paths: tuple[str, ...]
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Return the problem as JSON values."""
        return {**asdict(self), "paths": list(self.paths)}


def stop_on_errors(problems: Iterable[Problem]) -> None:
    """Raise one ValueError that lists all errors; warnings raise nothing."""
    errors = [problem.message for problem in problems if problem.severity == "error"]
    if errors:
        raise ValueError("\n".join(errors))
