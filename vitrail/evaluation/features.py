"""Frozen features of images, cached on disk for each image: after ten more images, ten are computed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL
import torch

import vitrail
from vitrail.data.cache.rows import RowCache, rows_folder
from vitrail.data.datasets.base import Dataset
from vitrail.data.loading.reader import ImageReader
from vitrail.evaluation.classifier import Classifier
from vitrail.evaluation.predict_logits import BATCH, predict_logits

FORMAT = 1  # raise it when a model computes something else from the same weights
_SLICE = 4 * BATCH  # images between two looks at the clock
_SAVE_S = 60.0  # an interruption loses at most about this much work


@dataclass(frozen=True)
class Features:
    """Pooled vectors of images.

    Attributes:
        values: [N, D] float32.
        indices: [N] which images of the dataset these are, in the order they were asked for.
        from_cache: how many of them were read and not computed.
        problem: why the cache could not be written, or an empty string.
    """

    values: np.ndarray
    indices: np.ndarray
    from_cache: int
    problem: str = ""


def open_cache(classifier: Classifier, dataset: Dataset, device: torch.device) -> RowCache:
    """Return the cache of a dataset's features.

    They depend on the weights without the head, the architecture, the preprocessing, the kind of device and the versions.
    """
    model = classifier.model
    architecture = dataclasses.replace(model.config, num_classes=0)
    libraries = (vitrail.__version__, torch.__version__, PIL.__version__)
    what = (FORMAT, *libraries, device.type, architecture, classifier.patch_size, classifier.preprocess)
    weights = {name: values for name, values in model.state_dict().items() if not name.startswith("head.")}
    return RowCache(rows_folder("features", dataset.name, what, weights), model.decoder.out_dim, np.float32)


def features_of(
    classifier: Classifier,
    reader: ImageReader,
    indices: np.ndarray,
    *,
    device: torch.device,
    cache: RowCache,
    keys: np.ndarray,
    fresh: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Features:
    """Return the pooled vectors of images, from the cache where it has them, else computed in fp32 and put there.

    A file that can no longer be read is left out and noted in `reader.dropped`.

    Args:
        classifier: its model has no head, so that it returns the pooled vector.
        keys: what each of the images is known by, found out before the first of them was read: one that has changed
            meanwhile is then computed again next time.
        fresh: forget what the cache has.

    Raises:
        ValueError: a feature is not finite.
    """
    if fresh:
        cache.clear()
    values, found = cache.read(keys)
    from_cache, problem = int(found.sum()), ""
    missing, waiting, saved_at = np.flatnonzero(~found), [], time.monotonic()

    def save() -> str:
        rows = np.concatenate(waiting) if waiting else np.zeros(0, dtype=np.int64)
        waiting.clear()
        try:
            cache.add(keys[rows], values[rows])
        except OSError as error:
            return f"{cache.folder}: {error.strerror or error}"
        return ""

    try:
        for start in range(0, len(missing), _SLICE):
            rows = missing[start : start + _SLICE]
            out = predict_logits(
                classifier.model,
                reader,
                indices[rows],
                device=device,
                patch_size=classifier.patch_size,
                advance=lambda done, _, start=start: advance(start + done, len(missing)),
            )
            require_finite_features(out.logits, out.indices, reader.dataset)
            # They come back in the order of the dataset, without those that could not be read.
            rows = rows[np.argsort(indices[rows])]
            rows = rows[np.isin(indices[rows], out.indices)]
            values[rows], found[rows] = out.logits, True
            waiting.append(rows)
            if time.monotonic() - saved_at > _SAVE_S:
                problem, saved_at = problem or save(), time.monotonic()
    finally:
        problem = problem or save()
    return Features(values[found], indices[found], from_cache, problem)


def require_finite_features(values: np.ndarray, indices: np.ndarray, dataset: Dataset) -> None:
    """Raise a ValueError when a feature is not finite."""
    broken = indices[~np.isfinite(values).all(axis=1)]
    if len(broken):
        raise ValueError(
            f"the model's features are not finite, first for {dataset.location(int(broken[0]))}; its weights are broken, "
            "take another model"
        )
