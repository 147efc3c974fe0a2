"""Datasets of the Hugging Face hub: `hf:FOLDER` on this machine, or `hf:NAME` through the extra `hf`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from vitrail.data.datasets.base import FileDataset, ParquetDataset
from vitrail.data.datasets.folder import open_image_folder
from vitrail.data.datasets.parquet import open_parquet
from vitrail.files import cache_folder, filled_folder
from vitrail.lookup import first_line


def open_hf_dataset(
    name: str, *, limit_pixels: int, damaged: Literal["refuse", "keep"]
) -> FileDataset | ParquetDataset:
    """List the images of a local folder (class folders, or Parquet files with images in them) or of a named dataset.

    Raises:
        ValueError: there is no such folder, or the extra that names need is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        dataset_name = f"hf:{folder.resolve().name}"
        if files := sorted(folder.rglob("*.parquet")):
            return open_parquet(files, dataset_name, limit_pixels=limit_pixels, damaged=damaged)
        return replace(open_image_folder(folder, limit_pixels=limit_pixels, damaged=damaged), name=dataset_name)
    if not name or name.startswith((".", "/", "~")):
        raise ValueError(
            f"hf:{name}: no such folder; expected a dataset's name, or a folder of class folders or .parquet"
        )
    return open_parquet(download(name), f"hf:{name}", limit_pixels=limit_pixels, damaged=damaged)


def download(name: str) -> list[Path]:
    """Return the Parquet files of a named dataset, one for each split; they are downloaded on the first call.

    Raises:
        ValueError: the extra is not installed, or the dataset cannot be fetched.
    """
    folder = cache_folder() / "hf" / re.sub(r"[^A-Za-z0-9._-]", "--", name)

    def fill(draft: Path) -> None:
        try:
            from datasets import load_dataset  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        except ImportError:
            raise ValueError(
                f"hf:{name}: datasets of the hub need the package datasets; type pip install 'vitrail[hf]', or download "
                "its .parquet files and name their folder: hf:FOLDER"
            ) from None
        try:
            splits = load_dataset(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"hf:{name}: cannot be fetched: {first_line(error)}") from None
        for split, rows in splits.items():
            rows.to_parquet(draft / f"{split}.parquet")

    return sorted(filled_folder(folder, fill).glob("*.parquet"))
