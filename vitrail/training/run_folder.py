"""The folder that one training leaves: configuration, split, metrics, weights, report."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.config import RunConfig, load_config, save_config
from vitrail.data.datasets.open import run_name, same_dataset
from vitrail.data.setup import CheckedData
from vitrail.data.splits.splits import save_splits
from vitrail.files import write_text

FIRST_FOLD = "fold-0"


@dataclass(frozen=True)
class Run:
    """A run's folder. Only the main process writes to it."""

    folder: Path
    is_main: bool = True

    @property
    def model(self) -> Path:
        """The best weights."""
        return self.folder / "model.safetensors"

    @property
    def last(self) -> Path:
        """The exact state."""
        return self.folder / "last"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.folder / "metrics.jsonl"

    @property
    def has_state(self) -> bool:
        """Whether training can go on from here."""
        return (self.last / "state.safetensors").exists()

    def info(self) -> dict[str, Any]:
        """Return what `run.json` holds."""
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))

    def note(self, **values: Any) -> None:
        """Add to `run.json`."""
        if self.is_main:
            path = self.folder / "run.json"
            known = self.info() if path.exists() else {}
            write_text(path, json.dumps(known | values, indent=2) + "\n")

    def note_problem(self, problem: Mapping[str, Any]) -> None:
        """Add a problem that was found during the run to those in `run.json`."""
        if self.is_main:
            self.note(problems=[*self.info().get("problems", []), problem])

    def log(self, **values: Any) -> None:
        """Add a line to the metrics, on disk at once."""
        if self.is_main:
            with self.metrics.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(values) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that will be computed again."""
        if not self.is_main or not self.metrics.exists():
            return
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    lines.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # the line that was being written when the process was killed
        write_text(self.metrics, "".join(f"{line}\n" for line in lines))


def create_run(folder: Path, config: RunConfig, checked: CheckedData, **info: Any) -> Run:
    """Make a new run folder with its configuration and split.

    Raises:
        ValueError: the folder holds something already, or cannot be made.
    """
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder)
    save_config(config, folder / "config.json")
    save_splits(checked.dataset, checked.splits, folder / "split.json")
    run.note(status="running", started_at=now(), **info)  # last: with this file the folder is a run
    return run


def check_new(folder: Path) -> None:
    """Raise a ValueError when a run cannot begin in this folder, because it is a file or holds something."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another --out")
    # What a start leaves that was killed before run.json made it a run.
    beginnings = {"config.json", "split.json"}
    if folder.exists() and any(each.name not in beginnings and not is_draft(each) for each in folder.iterdir()):
        if (folder / "run.json").exists():
            raise ValueError(f"{folder}: holds a run already; choose another --out, or go on with that run by --resume")
        raise ValueError(f"{folder}: is not empty; choose another --out")


def open_run(folder: Path) -> tuple[Run, RunConfig]:
    """Open a run folder to go on with it.

    Raises:
        ValueError: it is no run.
    """
    if not (folder / "config.json").exists() or not (folder / "run.json").exists():
        raise ValueError(f"{folder}: is no run (it has no config.json and run.json); start one without --resume")
    for location in (folder, folder / "last"):
        for draft in location.glob(".*.part"):  # left by a process that was killed while writing
            draft.unlink(missing_ok=True)
    return Run(folder), load_config(folder / "config.json")


def is_draft(path: Path) -> bool:
    """Whether a file is an unfinished write of `vitrail.files`."""
    return path.name.startswith(".") and path.name.endswith(".part")


def new_run_folder(source: str, root: Path = Path("runs")) -> Path:
    """Return the first free folder `runs/<data name>`, `runs/<data name>-2`, …"""
    name = run_name(source)
    number = 1
    while (folder := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def newest_run_folder(source: str, root: Path = Path("runs")) -> Path:
    """Return the newest run folder of a dataset.

    Raises:
        ValueError: there is none.
    """
    runs = [each.parent for pattern in ("*/run.json", f"*/{FIRST_FOLD}/run.json") for each in root.glob(pattern)]
    found = [each for each in runs if same_dataset(load_config(each / "config.json").data.source, source)]
    if not found:
        raise ValueError(f"no run of {source} in {root}/ to resume; name it with --out RUN")
    newest = max(found, key=lambda each: (each / "run.json").stat().st_mtime)
    return newest.parent if newest.name == FIRST_FOLD and newest.parent != root else newest


def has_folds(folder: Path) -> bool:
    """Whether a folder holds a run for each fold of a cross-validation."""
    return (folder / FIRST_FOLD / "run.json").exists()


def now() -> str:
    """Return the time in ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
