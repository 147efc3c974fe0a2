"""Find equal and nearly equal images: perceptual hashes give candidates, small grey copies verify them.

The hash is pHash (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2):
the signs of the 8×8 lowest frequencies of a 32×32 grey copy. It is computed for thousands of images at once, which
libraries that hash one image a call cannot do within a training's start.
"""

from __future__ import annotations

import numpy as np

_CHUNK = 4096
# Candidates differ in at most this many of 64 hash bits: of 4 bands of 16 bits, at most 3 differences leave one equal,
# so that every such pair is found.
_HASH_BITS = 3
# Two grey copies are near duplicates when their mean and their 99th-percentile difference are at most these many of
# 255 levels: re-encoding as JPEG at quality 75 stays below, different images of one scene do not.
_MEAN_LEVELS, _PEAK_LEVELS = 3.0, 16.0
_BUCKET_LIMIT = 64


def hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Return the 64-bit perceptual hash [N] uint64 of grey copies [N, 32, 32] uint8."""
    from scipy.fft import dctn

    out = np.empty(len(thumbnails), dtype=np.uint64)
    weights = np.uint64(1) << np.arange(64, dtype=np.uint64)
    for start in range(0, len(thumbnails), _CHUNK):
        chunk = thumbnails[start : start + _CHUNK].astype(np.float32)
        low = np.asarray(dctn(chunk, axes=(1, 2)))[:, :8, :8].reshape(len(chunk), 64)
        bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
        out[start : start + _CHUNK] = (bits * weights).sum(axis=1, dtype=np.uint64)
    return out


def duplicate_pairs(thumbnails: np.ndarray, digests: np.ndarray, *, near: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Find pairs of equal and of nearly equal images.

    Args:
        thumbnails: grey copies [N, 32, 32] uint8.
        digests: [N] uint64 hash of each image's decoded pixels and size.

    Returns:
        The pairs of equal images [P, 2] and of nearly equal ones [Q, 2], as indices, smaller first. Of k equal
        images, k-1 pairs are returned, each with the first.
    """
    order = np.argsort(digests, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(digests[order]) != 0][: len(order)])
    first = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
    exact = np.stack([first, order], axis=1)[first != order]
    exact = exact[np.argsort(exact[:, 1], kind="stable")]
    if not near:
        return exact, np.empty((0, 2), dtype=np.int64)
    unique = np.sort(order[starts])
    near_pairs = [similar_pairs(unique, thumbnails, pairs) for pairs in candidate_pairs(hashes(thumbnails[unique]))]
    nearly = np.unique(np.concatenate([np.empty((0, 2), dtype=np.int64), *near_pairs]), axis=0)
    return exact, nearly


def candidate_pairs(codes: np.ndarray) -> list[np.ndarray]:
    """Return index pairs whose hashes differ in at most `_HASH_BITS` bits, a list of [P, 2], some pairs repeated."""
    found = []
    for band in range(4):
        keys = (codes >> np.uint64(16 * band)).astype(np.uint16)
        order = np.argsort(keys, kind="stable")
        # Pair each image with its next neighbours in the band; a bucket of flat images cannot grow quadratically.
        for step in range(1, _BUCKET_LIMIT):
            left, right = order[:-step], order[step:]
            same = keys[left] == keys[right]
            if not same.any():
                break
            left, right = left[same], right[same]
            close = np.bitwise_count(codes[left] ^ codes[right]) <= _HASH_BITS
            pairs = np.stack([left[close], right[close]], axis=1)
            found.append(np.sort(pairs, axis=1))
    return found


def similar_pairs(unique: np.ndarray, thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the candidate pairs whose grey copies are nearly equal, as indices of all images."""
    pairs = unique[pairs]
    if not len(pairs):
        return pairs
    difference = np.abs(thumbnails[pairs[:, 0]].astype(np.int16) - thumbnails[pairs[:, 1]])
    flat = difference.reshape(len(pairs), -1)
    return pairs[(flat.mean(axis=1) <= _MEAN_LEVELS) & (np.percentile(flat, 99, axis=1) <= _PEAK_LEVELS)]


def group_pairs(numbers: np.ndarray | None) -> np.ndarray:
    """Return pairs [P, 2] that link the images of each group; -1 is no group."""
    if numbers is None:
        return np.empty((0, 2), dtype=np.int64)
    order = np.argsort(numbers, kind="stable")
    order = order[numbers[order] >= 0]
    pairs = np.stack([order[:-1], order[1:]], axis=1)
    return pairs[numbers[pairs[:, 0]] == numbers[pairs[:, 1]]]


def group_numbers(count: int, *pairs: np.ndarray) -> np.ndarray:
    """Return group numbers [count], equal for images that pairs link (connected components)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs])
    graph = coo_matrix((np.ones(len(edges), dtype=np.int8), (edges[:, 0], edges[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]
