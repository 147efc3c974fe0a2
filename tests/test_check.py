"""`vitrail check`: every kind of finding on images made here, the JSON, the page, and files broken at random."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_sample_image

from vitrail.cli import run
from vitrail.config import DataConfig
from vitrail.data.check.check import CheckResult, check_dataset
from vitrail.data.check.class_names import label_problems
from vitrail.data.check.crop_duplicates import align, crop_candidates
from vitrail.data.problems import Kind
from vitrail.report.check_page import TITLES, summary, write_page

KEYS = {"ok", "num_images", "classes", "problems", "fingerprint", "splits", "modes", "sizes", "form"}


def photo(number: int, width: int = 144, height: int = 108) -> PIL.Image.Image:
    """A part of one of two real photographs, another for each number below 48; the later ones are mirrored."""
    whole = PIL.Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[number % 2]))
    if number >= 24:
        whole = whole.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    row, column = divmod(number % 24 // 2, 4)
    return whole.crop((column * 150, row * 140, column * 150 + 144, row * 140 + 108)).resize((width, height))


def put(path: Path, image: PIL.Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def fill(root: Path, labels: tuple[str, ...] = ("a", "b"), count: int = 13) -> Path:
    """Different images in class folders; a class has every other one of `photo`."""
    for which, label in enumerate(labels):
        for each in range(count):
            put(root / label / f"{each}.png", photo(each * len(labels) + which))
    return root


def check(root: Path, *, quick: bool = False, **settings) -> CheckResult:
    return check_dataset(DataConfig(source=str(root), **settings), quick=quick)


def found(checked: CheckResult, *kinds: str) -> list[tuple[str, ...]]:
    return [problem.paths for problem in checked.problems if problem.kind in kinds]


def test_a_good_set_has_nothing_to_warn_of(tmp_path, capsys):
    root, out = fill(tmp_path / "good"), tmp_path / "check.json"
    assert run(["check", str(root), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "no errors, and nothing to warn of" in said
    assert f"next:    vitrail train {root}" in said
    result = json.loads(out.read_text())
    assert result.keys() >= KEYS
    assert (result["ok"], result["num_images"], result["problems"]) == (True, 26, [])
    assert result["classes"] == {"a": 13, "b": 13}
    assert result["splits"] == {"train": 20, "val": 6}
    assert result["modes"] == {"RGB": 26}
    assert result["sizes"]["median"] == [144, 108]


def test_the_fingerprint_is_that_of_a_training(tmp_path):
    from vitrail.console import Console
    from vitrail.data.setup import load_data

    root = fill(tmp_path / "good")
    trained = load_data(DataConfig(source=str(root)), Console(quiet=True)).splits.fingerprint
    assert check(root).facts["fingerprint"] == trained
    assert check(root, quick=True).facts["fingerprint"] == trained
    assert check(root, split_seed=1).facts["fingerprint"] != trained


def test_broken_files_are_errors_unless_they_may_be_dropped(tmp_path, capsys):
    root, out = fill(tmp_path / "broken"), tmp_path / "check.json"
    whole = (root / "a" / "0.png").read_bytes()
    for name, content in (("cut.png", whole[: len(whole) // 2]), ("empty.jpg", b""), ("page.jpg", b"<html></html>")):
        (root / "a" / name).write_bytes(content)
    huge = PIL.Image.new("1", (400, 400))
    put(root / "b" / "huge.png", huge)
    words = ["check", str(root), "--out", str(out), "--data.limit-pixels", "100000"]
    assert run(words) == 1
    said = " ".join("".join(capsys.readouterr()).split())
    assert "error: 4 errors; fix them first" in said
    assert "a/cut.png: damaged" in said and "--html check.html" in said
    result = json.loads(out.read_text())
    assert not result["ok"]
    given = {path: (each["kind"], each["severity"]) for each in result["problems"] for path in each["paths"]}
    assert given == {
        "a/cut.png": ("damaged", "error"),
        "a/empty.jpg": ("unreadable", "error"),
        "a/page.jpg": ("unreadable", "error"),
        "b/huge.png": ("refused", "error"),
    }
    assert run([*words, "--data.damaged", "drop"]) == 0
    assert json.loads(out.read_text())["ok"]


def test_the_quick_form_reads_headers_and_bytes(tmp_path):
    root = fill(tmp_path / "quick")
    whole = (root / "a" / "0.png").read_bytes()
    (root / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "b" / "same.png").write_bytes(whole)
    put(root / "b" / "print.jpg", photo(0).convert("CMYK"))
    checked = check(root, quick=True)
    assert found(checked, "unreadable") == [("a/empty.png",)]
    assert found(checked, "damaged") == []  # what the summary says
    assert any("truncated files" in line for line in summary(checked))
    assert found(checked, "label-conflict") == [("a/0.png", "b/same.png")]
    assert found(checked, "mode") == [("b/print.jpg",)]


def test_forms_are_told(tmp_path):
    root = fill(tmp_path / "forms")
    exif = PIL.Image.Exif()
    exif[274] = 6
    put(root / "a" / "turned.jpg", photo(27), exif=exif)
    put(root / "a" / "print.jpg", photo(29).convert("CMYK"))
    put(root / "a" / "palette.png", photo(31).convert("P"))
    put(root / "b" / "glass.png", photo(32).convert("RGBA"))
    put(root / "b" / "deep.png", PIL.Image.fromarray(np.asarray(photo(34).convert("L")).astype(np.uint16) * 257))
    put(root / "b" / "moving.gif", photo(36), save_all=True, append_images=[photo(38)])
    put(root / "b" / "line.png", photo(40).resize((200, 3)))
    put(root / "b" / "named.png", photo(42), format="JPEG")
    checked = check(root)
    assert checked.ok
    assert found(checked, "orientation") == [("a/turned.jpg",)]
    assert sorted(path for paths in found(checked, "mode") for path in paths) == sorted(
        [
            "a/print.jpg",
            "a/palette.png",
            "b/glass.png",
            "b/deep.png",
            "b/moving.gif",
            "b/moving.gif",
            "b/line.png",
            "b/line.png",
        ]
    )
    assert found(checked, "name") == [("b/named.png",)]
    assert checked.facts["modes"]["CMYK"] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda image: (image, {"quality": 40}),
        lambda image: (image.resize((72, 54)), {"quality": 90}),
        lambda image: (image.resize((288, 216)), {"quality": 90}),
        lambda image: (image.crop((7, 5, 137, 103)), {"quality": 80}),
        lambda image: (image.crop((14, 0, 144, 108)), {"quality": 80}),
        lambda image: (image.crop((0, 10, 130, 108)).resize((144, 108)), {"quality": 60}),
    ],
    ids=["re-encoded", "halved", "doubled", "cropped all round", "cropped left", "cropped corner, enlarged"],
)
def test_a_changed_copy_leaks_from_part_to_part(tmp_path, change):
    fill(tmp_path / "train")
    fill(tmp_path / "val", count=1)
    for path in (tmp_path / "val").rglob("*.png"):
        path.unlink()
    originals = [("a", 0), ("b", 1), ("a", 4)]
    for label, number in originals:
        image, options = change(photo(number))
        put(tmp_path / "val" / label / f"{number}.jpg", image, **options)
    put(tmp_path / "val" / "b" / "own.png", photo(41))
    leaks = found(check(tmp_path), "leak")
    assert leaks == [
        (f"train/{label}/{number // 2}.png", f"val/{label}/{number}.jpg") for label, number in sorted(originals)
    ]
    assert found(check(tmp_path, near_duplicates=False), "leak") == []


def test_equal_images_in_two_parts_or_classes_are_errors(tmp_path):
    fill(tmp_path / "train")
    put(tmp_path / "val" / "a" / "x.png", photo(0))
    put(tmp_path / "val" / "b" / "y.bmp", photo(2))
    put(tmp_path / "train" / "b" / "z.png", photo(1))
    checked = check(tmp_path)
    assert found(checked, "leak") == [("train/a/0.png", "val/a/x.png"), ("train/a/1.png", "val/b/y.bmp")]
    assert found(checked, "label-conflict") == [("train/a/1.png", "val/b/y.bmp")]
    assert found(checked, "duplicate") == [("train/b/0.png", "train/b/z.png")]
    severities = {problem.kind: problem.severity for problem in checked.problems}
    assert severities["leak"] == severities["label-conflict"] == "error"
    assert severities["duplicate"] == "warning"


def test_alignment_finds_the_window_to_half_a_percent():
    wide = photo(2, 400, 300)
    copies = np.stack([np.asarray(wide.convert("L").resize((96, 96)))] * 2)
    boxes = np.asarray([[0.07, 0.97, 0.04, 0.93], [0.0, 0.91, 0.09, 1.0]], np.float32)
    cut = np.stack(
        [
            np.asarray(
                wide.crop((round(left * 400), round(top * 300), round(right * 400), round(bottom * 300)))
                .convert("L")
                .resize((96, 96))
            )
            for left, right, top, bottom in boxes.tolist()
        ]
    )
    start = np.asarray([[0.04, 0.96, 0.04, 0.96], [0, 0.92, 0.08, 1]], np.float32)
    windows, scores = align(copies, cut, start)
    assert np.abs(windows - boxes).max() < 0.005
    assert scores.min() > 0.98


def test_crop_candidates_stay_few_where_all_images_look_alike():
    base = np.asarray(photo(0).convert("L").resize((32, 32)), dtype=np.int16)
    noise = np.random.default_rng(0).integers(-8, 9, (200, 32, 32))
    alike = np.clip(base + noise, 0, 255).astype(np.uint8)
    pairs, _ = crop_candidates(alike)
    assert 200 <= len(pairs) <= 16 * 200
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len(crop_candidates(alike[:0])[0]) == len(crop_candidates(alike[:1])[0]) == 0


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("cat", "Cat", "dog"), "capital"),
        (("red apple", "red_apple"), "spaces"),
        (("café", unicodedata.normalize("NFD", "café")), "NFC, NFD"),
        (("cat", "c\u0430t"), "look alike"),
        (("cat", "cat\u200b"), "look alike"),
        (("cat ", "dog"), "spaces at its ends"),
    ],
)
def test_label_traps_are_named(labels, words):
    problems = label_problems(labels)
    assert words in problems[0].message
    assert {problem.kind for problem in problems} == {"name"}
    if not all(label.isascii() for label in labels):
        assert "\\" in problems[0].message  # the difference is seen


def test_labels_that_differ_are_no_trap():
    assert label_problems(("cat", "cats", "cot", "1", "10", "大", "太", "n01440764")) == []


def test_missing_small_and_uneven_classes(tmp_path):
    fill(tmp_path / "train", ("a", "b"))
    put(tmp_path / "train" / "c" / "one.png", photo(41))
    put(tmp_path / "val" / "a" / "x.png", photo(43))
    put(tmp_path / "val" / "d" / "y.png", photo(45))
    checked = check(tmp_path)
    assert ("train/d",) in found(checked, "missing-class")
    assert not checked.ok
    assert checked.facts["classes"] == {"a": 14, "b": 13, "c": 1, "d": 1}
    assert any("c" in paths for paths in found(checked, "small-class"))


def test_uneven_classes_are_told(tmp_path):
    fill(tmp_path, ("a",))
    put(tmp_path / "b" / "one.png", photo(41))
    assert len(found(check(tmp_path), "imbalance")) == 1  # 10 to 1


@pytest.mark.parametrize(
    ("made", "given", "words"),
    [
        (("a/1.png", "b/2.png"), "a", "one level too low"),
        (("set/a/1.png", "set/b/2.png"), ".", "one level too high"),
        (("a/train/1.png", "a/val/2.png", "b/train/3.png", "b/val/4.png"), ".", "swap the levels"),
        (("2023/a/1.png", "2023/b/2.png", "2024/a/3.png", "2024/b/4.png"), ".", "Swap the levels if"),
    ],
)
def test_a_wrong_folder_level_is_recognised(tmp_path, made, given, words):
    for number, name in enumerate(made):
        put(tmp_path / "data" / name, photo(number))
    out = tmp_path / "check.json"
    code = run(["check", str(tmp_path / "data" / given), "--out", str(out)])
    result = json.loads(out.read_text())
    problem = next(each for each in result["problems"] if each["kind"] == "name")
    assert words in problem["message"]
    assert code == (1 if problem["severity"] == "error" else 0)


def test_exit_codes_and_files(tmp_path, capsys):
    assert run(["check"]) == 2
    assert run(["check", "digits", "--quik"]) == 2
    assert run(["check", str(tmp_path / "nothing")]) == 1
    (tmp_path / "empty").mkdir()
    assert run(["check", str(tmp_path / "empty"), "--out", str(tmp_path / "e.json")]) == 1
    assert not json.loads((tmp_path / "e.json").read_text())["ok"]
    assert run(["check", "digits", "--out", str(tmp_path / "no" / "x.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert run(["check", "digits", "--out", str(tmp_path / "d.json")]) == 0
    assert json.loads((tmp_path / "d.json").read_text())["num_images"] == 1797
    assert [path.name for path in tmp_path.glob(".*")] == []


class Page(HTMLParser):
    """Tags that must be closed are; images are inline."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        assert not any(str(values.get(key, "")).startswith(("http", "//")) for key in ("src", "href"))
        if tag == "img":
            self.images.append(values["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_offline_file_with_bounded_images(tmp_path):
    root = fill(tmp_path / "<b>data")
    for number in range(40):
        put(root / "a" / f"copy <i>{number}.png", photo(0))
        (root / "b" / f"cut {number}.png").write_bytes((root / "b" / "0.png").read_bytes()[:2000])
    checked = check(root)
    write_page(checked, str(root), tmp_path / "check.html")
    text = (tmp_path / "check.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "<i>" not in text and "copy &lt;i&gt;" in text
    assert "cannot be decoded" in text and "more findings" in text
    assert len(page.images) == 6  # of 41 equal ones
    kind, content = page.images[0].split(",", 1)
    assert kind == "data:image/jpeg;base64"
    assert max(PIL.Image.open(io.BytesIO(base64.b64decode(content))).size) <= 160
    assert re.search(r"width: 100\.0%", text)


def test_every_kind_has_a_title_and_a_remedy():
    assert set(TITLES) == set(get_args(Kind))


def test_the_summary_stays_short(tmp_path):
    root = fill(tmp_path, tuple(f"class {number:02d}" for number in range(40)), count=1)
    for number in range(30):
        (root / "class 00" / f"{number}.jpg").write_bytes(b"")
    lines = summary(check(root))
    assert len(lines) < 30
    assert any("and 28 more, the smallest" in line for line in lines)
    assert any("and 27 more" in line for line in lines)


FORMATS = [
    ("jpg", {"quality": 85}), ("jpg", {"progressive": True}), ("jpg", {"comment": b"x" * 40}), ("png", {}),
    ("gif", {}), ("webp", {}), ("webp", {"lossless": True}), ("tif", {}), ("tif", {"compression": "tiff_lzw"}),
    ("tif", {"compression": "tiff_adobe_deflate"}), ("bmp", {}), ("ppm", {}), ("tga", {"compression": "tga_rle"}),
    ("ico", {}), ("avif", {}), ("jp2", {}),
]  # fmt: skip


@pytest.mark.slow
def test_files_broken_at_random_never_end_the_process(tmp_path):
    random = np.random.default_rng(0)
    image = photo(1, 40, 30)
    for which, (ending, options) in enumerate(FORMATS):
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(ending, ending), **options)
        whole = buffer.getvalue()
        for number in range(150):
            content = bytearray(whole)
            if number % 3 == 0:
                content = content[: random.integers(0, len(content))]
            else:  # flips anywhere, or in the first bytes, where sizes and tables are
                reach = len(content) if number % 3 == 1 else min(len(content), 200)
                for at in random.integers(0, reach, random.integers(1, 12)):
                    content[at] ^= 1 << random.integers(8)
            path = tmp_path / "data" / "ab"[number % 2] / f"{which}_{number}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    out, page = tmp_path / "check.json", tmp_path / "check.html"
    words = ["check", str(tmp_path / "data"), "--out", str(out), "--html", str(page)]
    done = subprocess.run([sys.executable, "-m", "vitrail", *words], capture_output=True, check=False, timeout=200)
    assert done.returncode == 1, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["num_images"] == 150 * len(FORMATS) >= 2000
    broken = {
        path
        for each in result["problems"]
        if each["severity"] == "error"
        for path in each["paths"]
        if path[2:] and each["kind"] in ("unreadable", "damaged", "refused")
    }
    assert result["num_good"] == result["num_images"] - len(broken)
    assert 500 < len(broken) < 2300  # most of the rest differ in a few pixels
    assert page.stat().st_size < 5_000_000
