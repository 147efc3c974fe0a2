"""Find images that are a slight crop of another one, or a copy re-encoded or resized too roughly for the plain hash.

A crop moves every pixel a little, which changes a hash of the whole image. So each image's lowest frequencies are
compared with those of 25 windows of every other image; similar pairs are then aligned to a fraction of a pixel (Lucas &
Kanade 1981, with a shift and a scale for each axis) and must agree everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image

from vitrail.data.cache.scans import THUMBNAIL
from vitrail.data.datasets.base import Dataset
from vitrail.data.images.decode import ImageError

# The interval of a window along an axis. A crop between two of them is within 4 % of one, near enough for `align`.
INTERVALS = np.asarray([(0.0, 1.0), (0.08, 1.0), (0.0, 0.92), (0.04, 0.96), (0.08, 0.92)], dtype=np.float32)
LIMIT = 50_000  # images; the time grows with their square, and at this number it is minutes
_FREQUENCIES = 8
# Of 1.4 million pairs of different photographs, one in 10,000 reaches this cosine.
_ALIKE = 0.8
_PER_IMAGE = 16  # candidates of one image: where all images are similar, the nearest
_ELEMENTS = 2**25  # of one block of the comparison: 128 MiB
_LARGEST_CUT = 0.2  # of a side, as a share
_ROUNDS = 12
_CHUNK = 512
SMALLEST_SIDE = 48  # pixels; a slight crop of a smaller image is too like its neighbours
_FINE = 96  # side of the fine copies, pixels
# Least correlation of small copies that are compared again, finer, and of the fine copies of a crop.
_COARSE_CORRELATION, _FINE_CORRELATION = 0.88, 0.95


def cropped_pairs(
    dataset: Dataset, chosen: np.ndarray, sizes: np.ndarray, thumbnails: np.ndarray, workers: int
) -> np.ndarray:
    """Find pairs of images of which one is a slight crop of the other, or a rough copy.

    Args:
        chosen: indices of the images to compare, each different from all others.
        sizes: [N, 2] of all images.
        thumbnails: grey copies [N, 32, 32] of all images.

    Returns:
        [P, 2] indices, smaller first.
    """
    chosen = chosen[sizes[chosen].min(axis=1) >= SMALLEST_SIDE]
    if not 2 <= len(chosen) <= LIMIT:
        return np.empty((0, 2), dtype=np.int64)
    pairs, windows = crop_candidates(thumbnails[chosen])
    pairs = chosen[pairs]
    pairs, windows = _correlated(pairs, windows, _COARSE_CORRELATION, lambda indices: thumbnails[indices])
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:

        def fine(indices: np.ndarray) -> np.ndarray:
            return np.stack(list(pool.map(lambda index: _fine_copy(dataset, int(index)), indices)))

        pairs, _ = _correlated(pairs, windows, _FINE_CORRELATION, fine)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _correlated(
    pairs: np.ndarray, windows: np.ndarray, least: float, copies: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs whose correlation is at least `least` once they are aligned, and their windows."""
    keep, aligned = np.zeros(len(pairs), dtype=bool), windows.copy()
    for at in range(0, len(pairs), _CHUNK):
        chunk = slice(at, at + _CHUNK)
        first, second = copies(pairs[chunk, 0]), copies(pairs[chunk, 1])
        aligned[chunk], score = align(first, second, windows[chunk])
        keep[chunk] = score >= least
    return pairs[keep], aligned[keep]


def _fine_copy(dataset: Dataset, index: int) -> np.ndarray:
    """Return the fine grey copy of an image; black where it cannot be read any more."""
    try:
        image = dataset.read(index, "L")
    except (ImageError, OSError):
        return np.zeros((_FINE, _FINE), dtype=np.uint8)
    return np.asarray(image.resize((_FINE, _FINE), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0))


def crop_candidates(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs (whole, crop) [P, 2] of grey copies [N, 32, 32] uint8, and a first window for their alignment.

    Returns:
        The pairs, as indices, and left, right, top, bottom [P, 4] of the window of the first, as shares of its sides.
    """
    count, windows = len(thumbnails), len(INTERVALS) ** 2
    whole = np.concatenate(
        [_spectra(thumbnails[at : at + 4096], INTERVALS[:1])[:, 0] for at in range(0, count, 4096)] or [_NOTHING]
    )
    block = max(1, _ELEMENTS // (windows * max(count, 1)))
    pairs, starts = [np.empty((0, 2), dtype=np.int64)], [np.empty((0, 4), dtype=np.float32)]
    for at in range(0, count, block):
        cropped = _spectra(thumbnails[at : at + block], INTERVALS)
        cosine = (cropped.reshape(-1, cropped.shape[-1]) @ whole.T).reshape(len(cropped), windows, count)
        best = cosine.max(axis=1)
        best[np.arange(len(best)), np.arange(at, at + len(best))] = -1
        if count > _PER_IMAGE:
            least = np.partition(best, count - _PER_IMAGE, axis=1)[:, count - _PER_IMAGE, None]
            best[best < least] = -1
        first, second = np.nonzero(best > _ALIKE)
        window = cosine[first, :, second].argmax(axis=1)
        pairs.append(np.stack([first + at, second], axis=1))
        vertical, horizontal = np.divmod(window, len(INTERVALS))
        starts.append(np.concatenate([INTERVALS[horizontal], INTERVALS[vertical]], axis=1))
    return np.concatenate(pairs), np.concatenate(starts)


def align(whole: np.ndarray, crop: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the window of each first image that matches the second image.

    Args:
        whole: grey copies [P, S, S].
        crop: grey copies [P, S, S].
        start: [P, 4] left, right, top, bottom to begin with, as shares of the sides.

    Returns:
        The windows [P, 4], and the correlation [P] of pixels inside them with those of the second images.
    """
    side = whole.shape[1]
    u = ((np.arange(side) + 0.5) / side).astype(np.float32)
    source, target = whole.astype(np.float32), _standard(crop.astype(np.float32))
    window, best = start.copy(), start.copy()
    score = np.full(len(whole), -1, dtype=np.float32)
    for _ in range(_ROUNDS):
        seen = _standard(_window_pixels(source, window))
        now = (seen * target).mean(axis=(1, 2))
        better = now > score
        score[better], best[better] = now[better], window[better]
        slope_y, slope_x = np.gradient(seen, axis=(1, 2))
        slope_x *= side / (window[:, 1] - window[:, 0])[:, None, None]
        slope_y *= side / (window[:, 3] - window[:, 2])[:, None, None]
        moves = np.stack([slope_x * (1 - u), slope_x * u, slope_y * (1 - u)[:, None], slope_y * u[:, None]], axis=-1)
        flat = moves.reshape(len(moves), -1, 4)
        normal = flat.transpose(0, 2, 1) @ flat
        normal += np.eye(4, dtype=np.float32) * (1e-3 * np.trace(normal, axis1=1, axis2=2) + 1e-3)[:, None, None]
        residual = (target - seen).reshape(len(seen), -1, 1)
        step = np.linalg.solve(normal, flat.transpose(0, 2, 1) @ residual)[:, :, 0]
        window = window + np.clip(step, -0.05, 0.05)
        window[:, 0::2] = np.clip(window[:, 0::2], 0, _LARGEST_CUT)
        window[:, 1::2] = np.clip(window[:, 1::2], 1 - _LARGEST_CUT, 1)
    return best, score


def _window_pixels(images: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return windows of images [P, S, S], resized to the images' own size by linear interpolation."""
    side = images.shape[1]
    return _sampling(window[:, 2:], side) @ images @ _sampling(window[:, :2], side).transpose(0, 2, 1)


def _sampling(interval: np.ndarray, side: int) -> np.ndarray:
    """Return matrices [P, S, S] that interpolate pixels in the intervals [P, 2] along an axis."""
    u = (np.arange(side) + 0.5) / side
    at = (interval[:, :1] + (interval[:, 1:] - interval[:, :1]) * u) * side - 0.5
    weight = 1 - np.abs(np.clip(at, 0, side - 1)[:, :, None] - np.arange(side))
    return np.clip(weight, 0, None).astype(np.float32)


def _standard(images: np.ndarray) -> np.ndarray:
    """Return images [P, S, S] with mean 0 and deviation 1; flat ones are 0."""
    centred = images - images.mean(axis=(1, 2), keepdims=True)
    return centred / np.maximum(centred.std(axis=(1, 2), keepdims=True), 1.0)


def _spectra(thumbnails: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Return the lowest frequencies of all windows [N, windows, 64]: vertical intervals × horizontal ones, length 1."""
    from scipy.fft import dct

    transform = np.asarray(dct(np.eye(THUMBNAIL, dtype=np.float32), axis=0, norm="ortho"))[:_FREQUENCIES]
    rows = np.concatenate(list(transform @ _sampling(intervals, THUMBNAIL)))  # [intervals · 8, 32]
    number = len(intervals)
    low = (rows @ thumbnails.astype(np.float32) @ rows.T).reshape(-1, number, _FREQUENCIES, number, _FREQUENCIES)
    frequency = np.arange(_FREQUENCIES)
    # Weighted by frequency, since the spectra of photographs fall off with it.
    low = low.transpose(0, 1, 3, 2, 4) * np.sqrt(np.hypot(frequency[:, None], frequency))
    flat = low.reshape(len(thumbnails), number**2, -1).astype(np.float32)
    return flat / np.maximum(np.linalg.norm(flat, axis=2, keepdims=True), 1.0)


_NOTHING = np.empty((0, _FREQUENCIES**2), dtype=np.float32)
