"""Build `report.html` from the files of a run: one page that needs no network."""

import base64
import hashlib
import json
import math
import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from vitrail.files import write_bytes
from vitrail.lookup import shorten
from vitrail.report import plots

Json = dict[str, Any]

CONTENTS = {  # file → what the page lacks without it
    "run.json": "the command, what was checked, chosen and found, and the time it took",
    "config.json": "the configuration",
    "metrics.jsonl": "the training curves",
    "evaluation.json": "the final score, the confusion matrix, the mistakes and the calibration",
}
SPLITS = {"test": "test", "val": "validation"}  # the first one found is the headline
ROWS_LIMIT = 1000  # of any table
MISTAKES_LIMIT = 24  # with their previews, under 2 MB


@dataclass(frozen=True)
class RunFiles:
    """The files of a run folder, as far as they could be read.

    Attributes:
        series: metric → its (step, value) points.
        missing: a sentence on each file that could not be read.
    """

    folder: Path
    facts: Json
    config: Json
    evaluation: Json
    series: dict[str, plots.Points]
    missing: list[str]


def build_report(run: Path) -> Path:
    """Write `report.html` into a run folder, from whatever files the run left, and return its path.

    Raises:
        ValueError: the folder holds no `run.json`.
    """
    if not (run / "run.json").is_file():
        raise ValueError(
            f"{str(run)!r} is not a run folder: expected a run.json in it, as 'vitrail train' writes. "
            "Give the folder that training named, or start one with 'vitrail train DATA --out RUN'"
        )
    path = run / "report.html"
    write_bytes(path, render(read_run(run)).encode("utf-8", "backslashreplace"))  # file names may be no valid Unicode
    return path


def read_run(folder: Path) -> RunFiles:
    """Return a run's files; one that is absent or damaged becomes a sentence in `missing`."""
    missing: list[str] = []
    return RunFiles(
        folder,
        facts=_read_object(folder / "run.json", missing),
        config=_read_object(folder / "config.json", missing),
        evaluation=_read_object(folder / "evaluation.json", missing),
        series=_read_series(folder / "metrics.jsonl", missing),
        missing=missing,
    )


def render(run: RunFiles) -> str:
    """Return the page of a run as HTML."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent_text, "clip": clip, "source_hash": source_hash}
    facts = run.facts | {key: _dict(run.facts.get(key)) for key in ("counts", "versions", "machine", "best")}
    split = next((name for name in SPLITS if _score(run.evaluation.get(name))), None)
    result = _dict(run.evaluation.get(split or "val"))
    mistakes = _rows(result.get("mistakes"))[:MISTAKES_LIMIT]
    labels = [str(label) for label in _list(result.get("labels"))]
    confusion = plots.to_counts(result.get("confusion"), len(labels))
    return environment.get_template("page.html.j2").render(
        facts=facts,
        data=_data_name(run),
        folder=shlex.quote(str(run.folder)),
        missing=run.missing,
        command=str(run.facts.get("command") or ""),
        split=SPLITS.get(split or ""),
        result=result,
        chosen_on=_score(run.evaluation.get("val")) if split == "test" else None,
        headline=_headline(run, result, confusion),
        cards=_cards(run, result),
        curves=_curves(run),
        heat=None if confusion is None else plots.confusion_matrix(confusion, labels),
        pairs=[] if confusion is None else plots.most_confused(confusion, labels),
        classes=_classes(result),
        calibration=_calibration(result),
        mistakes=[row | {"image": plots.stored_thumbnail(row.get("thumbnail"))} for row in mistakes],
        problems=_rows(run.facts.get("problems")),
        choices=_rows(run.facts.get("choices"))[:ROWS_LIMIT],
        start=_start(run),
        config=_flat(run.config)[:ROWS_LIMIT],
    )


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a fraction of `total` images; valid also for few images and near 100 %.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    z = 1.959964
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half_width = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half_width), min(1.0, middle + half_width)


def number(value: object) -> float | None:
    """Return a value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def percent_text(value: object) -> str:
    """Return a fraction as percent; only exactly 1 becomes 100 %, and only exactly 0 becomes 0 %."""
    share = number(value)
    if share is None:
        return "–"
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    rounded = round(100 * share, 1)
    return f"{min(max(rounded, 0.1), 99.9) if 0 < share < 1 else rounded} %"


def clip(value: object, limit: int = 80) -> str:
    """Return a text, a long one without its middle: both ends of a file name tell the most."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit // 2) :]}"


def source_hash(script: str) -> str:
    """Return the hash of a script for a content security policy that lets this script run and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _read(path: Path, missing: list[str]) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except FileNotFoundError:
        missing.append(f"{path.name} is not there, so this page lacks {CONTENTS[path.name]}.")
        return ""


def _read_object(path: Path, missing: list[str]) -> Json:
    text = _read(path, missing)
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        missing.append(f"{path.name} is damaged or cut short, so this page lacks {CONTENTS[path.name]}.")
    return _dict(value)


def _read_series(path: Path, missing: list[str]) -> dict[str, plots.Points]:
    """Return one series of (step, value) per metric; where a resume repeats a step, its later value counts."""
    series: dict[str, dict[int, float]] = defaultdict(dict)
    damaged = 0
    for line in _read(path, missing).splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged += 1
            continue
        for name, value in record.items():
            if (value := number(value)) is not None:
                series[name][step] = value
    if damaged:
        missing.append(f"{damaged} of the lines of {path.name} could not be read and are left out.")
    return {name: sorted(values.items()) for name, values in series.items()}


def _dict(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _rows(value: object) -> list[Json]:
    return [row for row in _list(value) if isinstance(row, dict)]


def _data_name(run: RunFiles) -> str:
    try:
        arguments = shlex.split(str(run.facts.get("command", "")))
    except ValueError:  # an unbalanced quote
        arguments = []
    return arguments[2] if len(arguments) > 2 and not arguments[2].startswith("-") else run.folder.resolve().name


def _score(result: object) -> tuple[float, int] | None:
    """Return top-1 and the number of images it was counted on, or None where either is unknown."""
    top1, total = number(_dict(result).get("top1")), number(_dict(result).get("num_images"))
    return (top1, int(total)) if top1 is not None and 0 <= top1 <= 1 and total and total >= 1 else None


def _headline(run: RunFiles, result: Json, confusion: np.ndarray | None) -> Json:
    """Return the accuracy with its interval and that of always answering the most common class, or the best so far."""
    if score := _score(result):
        low, high = wilson(round(score[0] * score[1]), score[1])
        common = float(confusion.sum(1).max() / max(confusion.sum(), 1)) if confusion is not None else None
        return {"top1": score[0], "total": score[1], "low": low, "high": high, "common": common}
    best = max(run.series.get("eval/top1", []), key=lambda point: point[1], default=None)
    return {"so_far": best[1], "step": best[0]} if best else {}


def _cards(run: RunFiles, result: Json) -> list[tuple[str, str, str]]:
    """Return the key figures as (name, value, meaning); an unknown figure has no card."""
    classes = len(_list(result.get("labels")) or _list(run.facts.get("labels")))
    guess = f"0 is perfect; pure guessing is {math.log(classes):.2f}" if classes > 1 else "0 is perfect"
    speeds = [value for _, value in run.series.get("time/images_per_s", [])]
    waits = [value for _, value in run.series.get("time/data_wait", [])]
    speed = float(np.median(speeds)) if speeds else None
    waiting = f"; {percent_text(float(np.mean(waits)))} of the time spent waiting for them" if waits else ""
    parameters = number(run.facts.get("num_parameters"))
    cards = [
        ("Top-1", number(result.get("top1")), percent_text, "accuracy: the first answer is right"),
        (
            "Top-5",
            number(result.get("top5")) if classes > 5 else None,
            percent_text,
            "the true class is among the first five answers",
        ),
        ("Loss", number(result.get("loss")), "{:.3f}".format, guess),
        (
            "Calibration error",
            number((result.get("calibrated") or result).get("ece")),
            percent_text,
            "how far the stated probabilities are from the accuracy",
        ),
        ("Training time", number(run.facts.get("train_seconds")), _duration, "on the machine named below"),
        ("Speed", speed, "{:,.0f} /s".format, f"images a second{waiting}"),
        ("Parameters", parameters, _short, f"{parameters or 0:,.0f} trained weights"),
    ]
    return [(name, write(value), meaning) for name, value, write, meaning in cards if value is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _short(count: float) -> str:
    size, unit = next((pair for pair in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if count >= pair[0]), (1, ""))
    return f"{count / size:.3g}{unit}"


def _curves(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return the curves as (title, meaning, figure)."""
    best = number(_dict(run.facts.get("best")).get("step"))
    wanted = [
        ("Loss", "lower is better", "train/loss", "eval/loss", False),
        ("Accuracy", "the share of images that are right", "train/top1", "eval/top1", True),
        ("Learning rate", "the size of the training steps", "train/lr", "", False),
    ]
    drawn = []
    for title, meaning, training, validation, is_fraction in wanted:
        lines = {"training": run.series.get(training, []), "validation": run.series.get(validation, [])}
        ends = [f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in lines.items() if line]
        if ends:
            options = {"percent": is_fraction, "description": f"{title}: {', '.join(ends)}"}
            drawn.append((title, meaning, plots.curve(**lines, best_step=best, **options)))
    return drawn


def _classes(result: Json) -> list[tuple[str, Json]]:
    """Return every class's figures, the lowest recall first, a class without images last."""
    keys = ("precision", "recall", "f1", "count")
    found = [(str(label), _dict(row)) for label, row in _dict(result.get("per_class")).items()]
    rows = [(label, {key: number(row.get(key)) for key in keys}) for label, row in found]
    return sorted(rows, key=lambda row: (not row[1]["count"], row[1]["recall"] or 0))


def _calibration(result: Json) -> Json | None:
    keys = ("low", "high", "confidence", "accuracy", "count")
    bins = [{key: number(row.get(key)) for key in keys} for row in _rows(result.get("calibration"))]
    filled = [row for row in bins if row["count"] and None not in row.values()]
    known = [{key: float(row[key] or 0) for key in keys} for row in filled]
    if not known:
        return None
    total = sum(row["count"] for row in known)
    excess = sum(row["count"] * (row["confidence"] - row["accuracy"]) for row in known) / total
    points = "; ".join(f"confidence {row['confidence']:.0%}, accuracy {row['accuracy']:.0%}" for row in known)
    return {"excess": excess, "svg": plots.reliability(known, f"Calibration: {points}")}


def _start(run: RunFiles) -> Json | None:
    """Return what became of the weights that the run started from, as rows; None when it started at random."""
    start = _dict(run.facts.get("start"))
    if not start:
        return None
    titles = {"resized": "Resized", "missing": "Started at random", "unexpected": "Left out", "notes": "Notes"}
    listed = {key: [str(line) for line in _list(start.get(key))] for key in titles}
    rows = [("Weights loaded", str(start.get("loaded", "–")))]
    rows += [("Head", str(start.get("head") or "loaded, with its classes"))]
    rows += [(titles[key], shorten(texts, between="; ")) for key, texts in listed.items() if texts]
    trained, total = number(run.facts.get("num_learning")), number(run.facts.get("num_parameters"))
    if trained and total:
        rows.append(("Trained", f"{trained:,.0f} of the model's {total:,.0f} parameters"))
    return {"origin": str(start.get("origin", "")), "rows": rows}


def _flat(section: Json, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        rows += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return rows
