"""Every verdict of the nasty images in the shared data folder (its README says what the columns mean)."""

from __future__ import annotations

import csv
import os
import re
import resource
from pathlib import Path

import pytest

from vitrail.data.images.decode import ImageError, inspect_image, is_image_name, read_image

# The list calls this image ok, because Pillow's second load() after a failed one reports success. Its stream
# breaks off 3 of 128 rows before the end, which is what the list's own README calls damaged.
CORRECTED = {"pillow/broken_data_stream.png": "damaged"}


@pytest.fixture(scope="module")
def shared_data() -> Path:
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("VITRAIL_SHARED_DATA", default))
    if not (folder / "nasty" / "verdicts.tsv").is_file():
        pytest.skip(f"no nasty/verdicts.tsv in {folder}; set VITRAIL_SHARED_DATA to the shared data folder")
    return folder


@pytest.fixture(scope="module")
def rows(shared_data) -> list[dict[str, str]]:
    with open(shared_data / "nasty" / "verdicts.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def noted(row: dict[str, str], pattern: str, default: str) -> str:
    match = re.search(pattern, row["notes"])
    return match[1] if match else default


def expected(row: dict[str, str]) -> dict[str, object]:
    """Return what `inspect_image` must find; sizes in the list are as stored, ours are after rotation by EXIF."""
    facts: dict[str, object] = {"verdict": CORRECTED.get(row["file"], row["verdict"])}
    if not row["format"]:
        return facts
    facts["format"] = row["format"]
    facts["orientation"] = max(1, int(noted(row, r"EXIF orientation (\d)", "1")))
    width, height = map(int, row["size"].split("x"))
    facts["width"], facts["height"] = (height, width) if facts["orientation"] >= 5 else (width, height)
    facts["frames"] = int(noted(row, r"frames (\d+)", "1"))
    if mode := noted(row, r"mode (I;16|\w+)", ""):
        facts["mode"] = mode
    return facts


def test_every_file_gets_its_verdict_and_its_facts(shared_data, rows):
    assert len(rows) == 136
    wrong = []
    for row in rows:
        info = inspect_image(shared_data / "nasty" / row["file"])
        wanted = expected(row)
        got = {key: getattr(info, key) for key in wanted}
        if got != wanted or (info.reason == "") != (info.verdict == "ok"):
            wrong.append((row["file"], wanted, info))
    assert wrong == []


def test_good_files_read_the_same_from_bytes_and_have_the_reported_size(shared_data, rows):
    for row in rows:
        path = shared_data / "nasty" / row["file"]
        if (verdict := expected(row)["verdict"]) == "ok":
            image, info = read_image(path), inspect_image(path, decode=False)
            assert (image.mode, image.size) == ("RGB", (info.width, info.height)), row["file"]
            assert read_image(path.read_bytes(), mode="L").size == image.size
        else:
            with pytest.raises(ImageError) as caught:
                read_image(path)
            assert (caught.value.verdict, caught.value.path) == (verdict, str(path))


def test_damaged_files_can_be_kept_and_other_broken_files_cannot(shared_data, rows):
    for row in rows:
        path, wanted = shared_data / "nasty" / row["file"], expected(row)
        if wanted["verdict"] == "damaged":
            assert read_image(path, damaged="keep").size == (wanted["width"], wanted["height"])
        elif wanted["verdict"] != "ok":
            with pytest.raises(ImageError):
                read_image(path, damaged="keep")


def test_memory_stays_bounded(shared_data, rows):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for row in rows:
        inspect_image(shared_data / "nasty" / row["file"])
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mib < 200


def test_hidden_files_are_not_images_by_name(rows):
    hidden = {row["file"] for row in rows if not is_image_name(row["file"])}
    assert hidden == {
        "made/._appledouble.jpg",
        "made/.hidden.jpg",
        "made/ext_none",
        "pillow/pngtest_bad.png.bin",
    }


def test_images_of_all_orientations_are_the_same_after_rotation(shared_data, rows):
    """The eight landscapes (and portraits) are one photograph, stored in eight ways."""
    for series in ("Landscape", "Portrait"):
        names = [row["file"] for row in rows if f"/{series}_" in row["file"]]
        small = [read_image(shared_data / "nasty" / name, mode="L").resize((18, 12)).tobytes() for name in names]
        assert len(small) >= 5
        for pixels in small[1:]:
            difference = sum(abs(a - b) for a, b in zip(small[0], pixels, strict=True)) / len(pixels)
            assert difference < 12, (series, difference)
