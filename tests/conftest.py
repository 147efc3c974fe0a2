"""Fixtures, and shape annotations that are executed: a tensor of another shape than a signature says is an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import PIL.Image
import pytest

_ANNOTATED = [
    "vitrail.models",
    "vitrail.kernels",
    "vitrail.data.augment",
]
jaxtyping.install_import_hook(_ANNOTATED, "beartype.beartype")

# A training in a test must not depend on the machine's load through thread timing; two threads are what CI has.
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the cache of the tests apart from the user's, and one for the session, so that all tests choose the same kernels."""
    os.environ["VITRAIL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed torch, so that a test's random tensors are the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real images beside the repository; tests that need it are skipped where it is missing."""
    root = Path(os.environ.get("VITRAIL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real images at {root}; set VITRAIL_SHARED_DATA")
    return root


def draw_image(label: int, number: int, side: int = 16) -> PIL.Image.Image:
    """Return a small colour image whose class can be learned: a bright bar whose angle is the class, in noise."""
    random = np.random.default_rng([label, number])
    pixels = random.integers(0, 90, (side, side, 3), dtype=np.uint8)
    middle = int(random.integers(side // 4, 3 * side // 4))
    colour = random.integers(150, 255, 3)
    if label == 0:
        pixels[middle - 1 : middle + 1] = colour
    elif label == 1:
        pixels[:, middle - 1 : middle + 1] = colour
    else:
        for row in range(side):
            pixels[row, (row + middle) % side] = colour
    return PIL.Image.fromarray(pixels)


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """Return a function that writes class folders of learnable images and returns their root."""

    def make(
        root: Path, *, classes: tuple[str, ...] = ("flat", "steep", "slant"), count: int = 20, side: int = 16
    ) -> Path:
        for label, name in enumerate(classes):
            (root / name).mkdir(parents=True)
            for number in range(count):
                draw_image(label, number, side).save(root / name / f"{number:03d}.png")
        return root

    return make


TINY = {
    "variant": "nano8",
    "epochs": 2.0,
    "batch_size": 16,
    "model.depth": 2,
    "model.embed_dim": 24,
    "model.num_heads": 2,
}


@pytest.fixture(scope="session")
def tiny() -> dict:
    """Return the settings of a training that takes a second."""
    return dict(TINY)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path]) -> tuple[Path, Path]:
    """Return (run folder, data folder) of a finished small training."""
    from vitrail.api import train
    from vitrail.console import Console

    folder = tmp_path_factory.mktemp("run")
    data = make_folder(folder / "shapes")
    result = train(data, out=folder / "out", console=Console(quiet=True), **TINY)
    return result.folder, data
