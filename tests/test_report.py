"""The report of a run: complete, offline, safe against hostile names, and built from whatever is there."""

import base64
import io
import json
import math
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vitrail.report.plots import POINTS_LIMIT, pool, running_mean, thin
from vitrail.report.run_page import ROWS_LIMIT, build_report, clip, percent_text, source_hash, wilson

HOSTILE = [
    "<script>alert(1)</script>", '" onload="alert(2)', "{{ 7 * 7 }} ${x}$", "漢字の葉", "\udcff broken",
    "Quercus_robur_subsp_" * 40, "&amp; 'quoted'", "</title></style>", "url(https://evil.example)", "ok",
]  # fmt: skip


def thumbnail(seed: int, side: int = 8) -> str:
    """A small image as the run stores it."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def evaluation(labels: Sequence[str], num_images: int, seed: int = 0, skill: float = 0.97, side: int = 8) -> dict:
    """The evaluation of a model that is right `skill` of the time and errs towards the next class."""
    rng, classes = np.random.default_rng(seed), len(labels)
    true = np.arange(num_images) % classes
    slip = np.minimum(rng.geometric(0.5, num_images), classes - 1)
    predicted = np.where(rng.random(num_images) < skill, true, (true + slip) % classes)
    confusion = np.zeros((classes, classes), dtype=int)
    np.add.at(confusion, (true, predicted), 1)
    right, seen, named = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    per_class = {
        label: {"precision": float(right[i] / named[i]) if named[i] else None,
                "recall": float(right[i] / max(seen[i], 1)),
                "f1": float(2 * right[i] / max(seen[i] + named[i], 1)), "count": int(seen[i])}
        for i, label in enumerate(labels)
    }  # fmt: skip
    wrong = np.flatnonzero(true != predicted)[:24].tolist()
    true, predicted = true.tolist(), predicted.tolist()
    mistakes = [
        {"path": f"{labels[true[i]]}/{i:04}.png", "label": labels[true[i]], "predicted": labels[predicted[i]],
         "probability": 0.99 - 0.03 * n, "true_probability": 0.005 + 0.01 * n,
         "thumbnail": None if n == 3 else thumbnail(i, side)}
        for n, i in enumerate(wrong)
    ]  # fmt: skip
    bins = [
        {"low": i / 10, "high": (i + 1) / 10, "confidence": i / 10 + 0.06, "accuracy": i / 10 + 0.03,
         "count": i**3 * num_images // 2025} for i in range(10)
    ]  # fmt: skip
    return {
        "split": "val", "num_images": num_images, "top1": float(right.sum() / num_images), "top5": 0.9987,
        "loss": 0.0712, "ece": 0.0123, "labels": list(labels), "per_class": per_class, "temperature": 1.31,
        "confusion": confusion.tolist(), "fingerprint": "9f2c51ab", "calibration": bins, "mistakes": mistakes,
    }  # fmt: skip


def metric_lines(steps: int, every: int) -> list[dict]:
    """A loss that falls with noise, and a validation that is read ten times a run."""
    noise = np.random.default_rng(1).normal(0, 0.06, steps // every + 1)
    lines = []
    for n, step in enumerate(range(every, steps + 1, every)):
        done = step / steps
        fall = math.exp(-5 * done)
        line = {
            "step": step, "epoch": int(90 * done),
            "train/loss": 0.05 + 2.2 * fall * (1 + noise[n]),
            "train/top1": min(1.0, max(0.0, 0.99 - 0.85 * fall * (1 + noise[n]))),
            "train/lr": 1e-3 * min(10 * done, 0.5 + 0.5 * math.cos(math.pi * done)),
            "time/images_per_s": 4210 + n % 7, "time/data_wait": 0.04,
        }  # fmt: skip
        if step % (steps // 10) == 0:
            line |= {"eval/top1": 0.985 - 0.8 * fall, "eval/loss": 0.08 + 2 * fall, "eval/ece": 0.02}
        lines.append(line)
    return lines


def make_run(folder: Path, labels: Sequence[str], splits: dict[str, dict], steps: int = 900, every: int = 5) -> Path:
    """Writes a run folder as training leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    choices = [("model.patch_size", "2", "8-pixel images: a patch of 2 gives 16 tokens"),
               ("optim.lr", "0.001", "the usual rate for AdamW at this batch size"),
               ("run.epochs", "90", "small data: more rounds, about one minute on this machine")]  # fmt: skip
    facts = {
        "command": "vitrail train digits --out runs/digits", "status": "finished",
        "started_at": "2026-03-12T14:03:22",
        "train_seconds": 63.4, "num_parameters": 803_914, "labels": list(labels),
        "versions": {"vitrail": "0.1.0", "torch": "2.11.0", "python": "3.11.7"},
        "machine": {"cpu": "AMD EPYC 7B13", "cores": 2, "device": "cpu", "precision": "bf16"},
        "counts": {"train": 1437, "val": 360, "test": 0}, "best": {"step": 720, "epoch": 71, "top1": 0.989},
        "choices": [dict(zip(("setting", "value", "reason"), choice, strict=True)) for choice in choices],
        "problems": [{"severity": "warning", "kind": "duplicate",
                      "paths": [f"{labels[0]}/{i:03}.png" for i in range(5)],
                      "message": "5 images are the same; kept on one side of the split"}],
    }  # fmt: skip
    config = {
        "model": {"image_size": 8, "patch_size": 2, "encoder": "conv"},
        "optim": {"lr": 0.001, "warmup": "5%"},
    }
    lines = "\n".join(json.dumps(line) for line in metric_lines(steps, every))
    (folder / "metrics.jsonl").write_text(lines, "utf-8")
    for name, content in [("run", facts), ("config", config), ("evaluation", splits)]:
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    return folder


def edit(run: Path, **changes: object) -> None:
    """Changes facts of `run.json`."""
    path = run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


DIGITS = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "digits", DIGITS, {"val": evaluation(DIGITS, 360)})
    build_report(run)
    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "<b>&", HOSTILE, {"val": evaluation(HOSTILE, 300, skill=0.7)})
    tag = "<img src=https://evil.example>"
    problem = {"severity": tag, "kind": "<u>", "paths": [tag], "message": "<a href=x>"}
    edit(run, command=f"vitrail train '{tag}'", problems=[problem], status=tag, machine={tag: tag})
    edit(run, choices=[{"setting": tag, "value": tag, "reason": tag}], best={"step": 1, "epoch": tag})
    build_report(run)
    return run


class Page(HTMLParser):
    """Collects the elements of a page with their attributes, and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.source = "", path.read_text("utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_headline_says_what_the_files_say(digits: Path):
    page, result = Page(digits / "report.html"), json.loads((digits / "evaluation.json").read_text())["val"]
    assert f"{percent_text(result['top1'])} of 360 validation images right" in page.text
    figures = ["99.9 %", "0.071", "1.2 %", "1 min 3 s", "804 k", "4,21", "9f2c51ab"]
    for words in [*figures, "slightly optimistic", "vitrail train digits", "vitrail predict"]:
        assert words in page.text
    low, high = wilson(round(result["top1"] * 360), 360)
    assert f"between {percent_text(low)} and {percent_text(high)}" in page.text


def test_a_test_split_is_the_headline_and_validation_is_reported_to_have_chosen(tmp_path: Path):
    splits = {"val": evaluation(DIGITS, 360), "test": evaluation(DIGITS, 500, seed=2)}
    text = Page(build_report(make_run(tmp_path, DIGITS, splits))).text
    assert f"{percent_text(splits['test']['top1'])} of 500 test images right" in text
    assert "The validation images chose the best epoch" in text and "optimistic" not in text


def test_every_count_of_the_confusion_matrix_is_on_the_page(digits: Path):
    source = (digits / "report.html").read_text("utf-8")
    body = source.split('<table class="heat')[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = [[int(cell or 0) for cell in re.findall(r"<td[^>]*>([\d,]*)</td>", row)] for row in body.split("</tr>")[:-1]]
    confusion = json.loads((digits / "evaluation.json").read_text())["val"]["confusion"]
    assert rows == confusion
    wrong = np.array(confusion) - np.diag(np.diag(confusion))
    true, predicted = np.unravel_index(wrong.argmax(), wrong.shape)
    assert f"{true} taken for {predicted}: {wrong.max()} time" in Page(digits / "report.html").text


@pytest.mark.parametrize("name", ["digits", "hostile"])
def test_nothing_is_loaded_from_outside(name: str, request: pytest.FixtureRequest):
    page = Page(request.getfixturevalue(name) / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "a") or (attributes["href"] or "").startswith(
            "#"
        )
        for key in ("src", "href", "xlink:href", "data", "action"):
            assert re.match(r"#|data:image/", attributes.get(key) or "#")
        assert not any(key.startswith("on") for key in attributes)
        assert not re.search(r"url\((?!#)", attributes.get("style") or "")
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert sum(tag == "script" for tag, _ in page.elements) == 1


def test_hostile_names_stay_text(hostile: Path):
    page = Page(hostile / "report.html")
    assert not {"u", "a href=x"} & {tag for tag, _ in page.elements}
    assert all((a.get("src") or "").startswith("data:image/png;base64,") for tag, a in page.elements if tag == "img")
    for name in HOSTILE:
        assert clip(name.encode("utf-8", "backslashreplace").decode()) in page.text or len(name) > 80
    assert "49" not in re.findall(r"<bdi>([^<]*)</bdi>", page.source)


def test_the_only_script_is_the_one_the_policy_names(digits: Path):
    source = (digits / "report.html").read_text("utf-8")
    script = source.split("<script>")[1].split("</script>")[0]
    assert f"script-src '{source_hash(script)}'" in source


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_figures_are_well_formed_and_described(classes: int, tmp_path: Path):
    labels = [f"class {i:02}" for i in range(classes)]
    source = build_report(make_run(tmp_path, labels, {"val": evaluation(labels, 400)})).read_text("utf-8")
    figures = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(figures) == (6 if classes > 30 else 5)
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("aria-label") or root.get("aria-hidden")
    identifiers = re.findall(r'\bid="([^"]+)"', source)
    assert len(identifiers) == len(set(identifiers))
    assert ("Top-5" in source) == (classes > 5)


@pytest.mark.slow
def test_a_large_run_gives_a_bounded_page(tmp_path: Path):
    labels = [f"class {i:04} of a long list" for i in range(1000)]
    result = evaluation(labels, 20_000, skill=0.8, side=96)
    run = make_run(tmp_path, labels, {"val": result}, steps=100_000, every=1)
    edit(run, problems=[{"severity": "warning", "kind": "mode", "paths": ["a"] * 50, "message": "grey"}] * 5000)
    started = time.perf_counter()
    source = build_report(run).read_text("utf-8")
    assert len(source.encode()) < 3_000_000
    assert time.perf_counter() - started < 20
    assert source.count("<tr>") < ROWS_LIMIT + 200 and "4,950 more" in source


def test_a_killed_run_says_what_it_lacks(tmp_path: Path):
    run = make_run(tmp_path / "runs" / "digits", DIGITS, {})
    (run / "evaluation.json").unlink()
    edit(run, status="running", best=None, train_seconds=None)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 905, "train/lo')
    text = Page(build_report(run)).text
    for words in (
        "has not finished",
        "evaluation.json is not there",
        "1 of the lines",
        "right so far",
        "--resume",
    ):
        assert words in text


@pytest.mark.parametrize(
    "facts", ["{}", "[]", "{", '{"best": 3, "counts": [], "choices": {}, "problems": [1], "command": 5}']
)
def test_any_run_json_gives_a_page(facts: str, tmp_path: Path):
    (tmp_path / "run.json").write_text(facts)
    (tmp_path / "evaluation.json").write_text(
        '{"val": {"top1": null, "num_images": 0, "labels": ["a"], "confusion": [[1, 2]]}}'
    )
    text = Page(build_report(tmp_path)).text
    assert "No score yet" in text and "metrics.jsonl is not there" in text


def test_a_folder_that_is_no_run_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"not a run folder: expected a run.json.*vitrail train"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_equal_runs_give_equal_pages_and_no_scraps(digits: Path):
    first = (digits / "report.html").read_bytes()
    assert build_report(digits).read_bytes() == first
    assert not [path for path in digits.iterdir() if path.name.startswith(".")]


def test_wilson_interval_and_percent_are_honest():
    assert wilson(356, 360) == pytest.approx((0.97184, 0.99567), abs=1e-4)
    assert wilson(5, 5)[0] == pytest.approx(0.5655, abs=1e-4) and wilson(5, 5)[1] == 1
    assert [percent_text(x) for x in (1, 0.9999, 0.9889, 0.0001, 0, None, math.nan)] == [
        "100 %", "99.9 %", "98.9 %", "0.1 %", "0 %", "–", "–"]  # fmt: skip


def test_thinned_curves_keep_their_mean():
    steps, values = thin([(step, float(step)) for step in range(100_000)])
    assert len(steps) == POINTS_LIMIT and np.mean(values) == pytest.approx(49_999.5)
    assert running_mean([3.0] * 500) == [3.0] * 500
    assert pool(np.eye(1000)).shape == (143, 143)
