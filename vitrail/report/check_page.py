"""Show the findings of `vitrail check`: lines for the terminal, and one offline page with the images in question."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image

from vitrail.data.check.check import CheckResult
from vitrail.data.datasets.base import Dataset
from vitrail.data.images.decode import ImageError
from vitrail.data.problems import Kind, Problem
from vitrail.files import write_bytes
from vitrail.report.run_page import clip

CLASSES_SHOWN, PATHS_SHOWN = 12, 3  # on the terminal
FINDINGS_LIMIT, THUMBNAILS_LIMIT, ROWS_LIMIT = 24, 6, 1000  # on the page: findings a kind, images a finding, classes
_SIDE = 160  # of a thumbnail, pixels
TITLES: dict[Kind, tuple[str, str]] = {
    "unreadable": ("unreadable files", "fix or remove them, or --data.damaged drop"),
    "damaged": ("damaged images", "fix or remove them, or --data.damaged drop (or keep: decode what is there)"),
    "refused": ("images that are too large", "shrink them, or raise --data.limit-pixels"),
    "leak": ("images in two splits", "keep each in one split, or the evaluation is too good"),
    "label-conflict": ("images under two labels", "keep the right one"),
    "missing-class": ("missing classes", "add images, or remove the class from every split"),
    "name": ("names and folders", "rename or move what is named"),
    "duplicate": ("equal images", "remove the copies; in a flat folder they stay on one side of the split anyway"),
    "near-duplicate": ("nearly equal images", "check whether they are copies; in a flat folder they stay on one side"),
    "small-class": ("small classes", "more images help most here"),
    "imbalance": ("uneven classes", "look at the recall of each class, not only at the accuracy"),
    "orientation": ("images turned by EXIF", "nothing to do: Vitrail turns them in training and in use"),
    "mode": ("unusual forms", "nothing to do if the images are meant so"),
}


def by_kind(problems: tuple[Problem, ...]) -> Iterator[tuple[Kind, list[Problem]]]:
    """Yield each kind that was found with its problems, the most serious kinds first."""
    for kind in TITLES:
        if of_kind := [problem for problem in problems if problem.kind == kind]:
            yield kind, of_kind


def summary(result: CheckResult) -> list[str]:
    """Return the lines for the terminal: what the dataset is, then the findings of each kind."""
    return [*dataset_summary(result), *findings_summary(result.problems)]


def dataset_summary(result: CheckResult) -> list[str]:
    """Return lines on the dataset: its splits, classes, sizes and formats; none where it could not be opened."""
    facts = result.facts
    lines = []
    if result.dataset is not None:
        lines.append(f"{result.dataset.name}: {facts['num_images']:,} images, {len(facts['classes'])} classes")
        if "splits" in facts:
            splits = ", ".join(f"{number:,} {split}" for split, number in facts["splits"].items())
            lines.append(f"  splits   {splits} ({facts['rule']})")
        ranked = sorted(facts["classes"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{clip(label, 40)} {number:,}" for label, number in ranked[:CLASSES_SHOWN])
        rest = len(ranked) - CLASSES_SHOWN
        least = f"; and {rest:,} more, the smallest {clip(ranked[-1][0], 40)} {ranked[-1][1]:,}" if rest > 0 else ""
        lines.append(f"  classes  {shown}{least}")
        if "sizes" in facts:
            sizes = (f"{name} {width} × {height}" for name, (width, height) in facts["sizes"].items())
            lines.append(f"  sizes    {', '.join(sizes)}")
        for which in ("modes", "formats"):
            if facts[which]:
                lines.append(f"  {which:<8} {', '.join(f'{name} {number:,}' for name, number in facts[which].items())}")
        lines.append(f"  scanned  {scan_summary(facts)}")
    return lines


def findings_summary(problems: tuple[Problem, ...]) -> list[str]:
    """Return lines on the findings: for each kind their number, the first of them, and the remedy."""
    lines = []
    for kind, found in by_kind(problems):
        severity = "error" if any(problem.severity == "error" for problem in found) else "warning"
        title, remedy = TITLES[kind]
        lines.append(f"{severity}: {title}: {len(found):,} {'finding' if len(found) == 1 else 'findings'}")
        lines += [f"    {problem.message}" for problem in found[:PATHS_SHOWN]]
        if len(found) > PATHS_SHOWN:
            lines.append(f"    … and {len(found) - PATHS_SHOWN:,} more")
        lines.append(f"    remedy: {remedy}")
    return lines


def scan_summary(facts: dict[str, Any]) -> str:
    """Return what was scanned, and what was not."""
    if facts["form"] == "quick":
        return "headers and bytes only (--quick): truncated files and near duplicates are not found"
    if not facts["near_duplicates"]:
        return "every pixel; not for near duplicates (--data.near-duplicates)"
    if not facts["crops_compared"]:
        return "every pixel; for near duplicates, but for so many images not for slight crops"
    if facts["num_cached"]:
        return f"every pixel ({facts['num_cached']:,} of {facts['num_images']:,} images from the cache)"
    return f"every pixel, {facts['num_images'] / max(facts.get('seconds', 0), 0.01):,.0f} images/s"


def write_page(result: CheckResult, name: str, path: Path) -> None:
    """Write the page of a check, atomically.

    Args:
        name: the dataset as the user typed it.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["clip"] = clip
    most = max([1, *result.facts["classes"].values()])
    classes = [(label, number, 100 * number / most) for label, number in result.facts["classes"].items()]
    index_of = {} if result.dataset is None else {path: index for index, path in enumerate(result.dataset.paths)}
    page = environment.get_template("check.html.j2").render(
        data=name,
        ok=result.ok,
        facts=result.facts,
        scanned=scan_summary(result.facts) if result.dataset is not None else "",
        classes=classes[:ROWS_LIMIT],
        kinds=[_section(result, kind, found, index_of) for kind, found in by_kind(result.problems)],
    )
    write_bytes(path, page.encode("utf-8", "backslashreplace"))  # file names may be no valid Unicode


def _section(result: CheckResult, kind: Kind, found: list[Problem], index_of: dict[str, int]) -> dict[str, Any]:
    """Return one kind of finding as the template shows it."""
    title, remedy = TITLES[kind]
    rows = []
    for problem in found[:FINDINGS_LIMIT]:
        images = [
            (path, jpeg_thumbnail(result.dataset, index_of.get(path))) for path in problem.paths[:THUMBNAILS_LIMIT]
        ]
        more = len(problem.paths) - len(images)
        rows.append({"severity": problem.severity, "message": problem.message, "images": images, "more": more})
    return {"kind": kind, "title": title, "remedy": remedy, "rows": rows, "count": len(found)}


def jpeg_thumbnail(dataset: Dataset | None, index: int | None) -> str | None:
    """Return an image as a small JPEG data address; empty if it cannot be decoded, None where there is no such image."""
    if dataset is None or index is None:
        return None
    try:
        image = dataset.read(index, "RGB")
    except (ImageError, OSError):
        return ""
    image.thumbnail((_SIDE, _SIDE), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
