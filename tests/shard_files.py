"""Helpers of the tests of shards: write tars of small images, open them as datasets."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image

from vitrail.data.datasets.base import TarDataset
from vitrail.data.datasets.open import open_dataset


def png(level: int) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (5, 4), (level, 20, 30)).save(file, "PNG")
        return file.getvalue()


def tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def with_cls(*levels: int, first: int = 0) -> dict[str, bytes]:
    """Return samples of two classes by number, whose images have these levels of red."""
    files = {}
    for number, level in enumerate(levels, first):
        files |= {f"{number:04d}.png": png(level), f"{number:04d}.cls": str(level % 2).encode()}
    return files


def opened(location: object) -> TarDataset:
    dataset = open_dataset(str(location))
    assert isinstance(dataset, TarDataset)
    return dataset


def reds(dataset: TarDataset) -> list[int]:
    return [dataset.read(index, "RGB").getpixel((0, 0))[0] for index in range(len(dataset.paths))]
