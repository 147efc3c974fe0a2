"""The k nearest neighbours as a classifier: what features are worth without any fitting."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

K = 20
_TEMPERATURE = 0.07
_CHUNK_BYTES = 16_000_000  # of one block of similarities: fits the last cache


def neighbours(targets: Tensor) -> int:
    """Return the number of neighbours to ask: 20, but no more than a class of the usual size has images."""
    counts = torch.bincount(targets)
    return min(K, int(counts[counts > 0].median()))


def knn_predict(known: Tensor, targets: Tensor, asked: Tensor, *, k: int, num_classes: int) -> Tensor:
    """Return the class [M] that the k nearest known images vote for.

    Nearness is the cosine of two feature vectors; a vote weighs exp(cosine / 0.07). Of equal classes the first wins.

    Args:
        known: features [N, D] with their class indices, targets [N].
        asked: features [M, D].

    Source: Caron et al. 2021, DINO, appendix F.1; Wu et al. 2018, "Unsupervised feature learning via non-parametric
    instance discrimination", section 3.4.
    """
    known, asked = F.normalize(known.float(), dim=1), F.normalize(asked.float(), dim=1)
    rows = max(1, _CHUNK_BYTES // (4 * len(known)))
    found = []
    for chunk in asked.split(rows):
        cosines, neighbours_of = (chunk @ known.T).topk(min(k, len(known)), dim=1)
        # Only quotients of votes matter: the nearest gets 1, so that no exponential is large.
        votes = torch.exp((cosines - cosines[:, :1]) / _TEMPERATURE)
        total = torch.zeros(len(chunk), num_classes).scatter_add_(1, targets[neighbours_of], votes)
        found.append(total.argmax(dim=1))
    return torch.cat(found)
