"""Standardised features in their principal axes: what both linear probes share, from one pass and one decomposition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 8192  # rows of one step: bounds the memory of float64 copies
_RANK = 1e-12  # axes whose variance is a smaller share of the largest are rounding
_CONSTANT = 1e-6  # a feature whose deviation is a smaller share of its size, or of the widest feature's, is constant


@dataclass(frozen=True)
class PrincipalAxes:
    """The principal axes of features that are centred and divided by their deviation. All float64.

    Attributes:
        mean, scale: [D] of each feature; the scale of a constant feature is 1.
        axes: [D, r] orthonormal columns, where r is the rank.
        energy: [r] sum of squares of the standardised features along each axis.
        answers: [r, classes] the features along each axis, summed over each class.
        counts: [classes] images of each class.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    energy: Tensor
    answers: Tensor
    counts: Tensor

    @property
    def num_rows(self) -> int:
        """Number of images N."""
        return int(self.counts.sum())

    def standardise(self, features: Tensor) -> Tensor:
        """Return features [N, D] centred and scaled, in float64."""
        return (features.double() - self.mean) / self.scale

    def project(self, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their coordinates along the axes [n, r], a bounded number of rows at a time."""
        for start in range(0, len(features), _ROWS):
            rows = slice(start, min(start + _ROWS, len(features)))
            yield rows, self.standardise(features[rows]) @ self.axes

    def to_linear_layer(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear layer on raw features, weight [classes, D] and bias [classes], that equals one on coordinates.

        Args:
            weight: [r, classes].
            bias: [classes].
        """
        raw = (self.axes @ weight).T / self.scale
        return raw, bias - raw @ self.mean


def principal_axes(features: Tensor, targets: Tensor, num_classes: int) -> PrincipalAxes:
    """Return the principal axes of features [N, D], from the smaller of X'X [D, D] and XX' [N, N].

    With more rows than features, X'X is summed in one pass over them.
    """
    shift = features[:_ROWS].double().mean(dim=0)  # keeps the sums small: variances do not cancel
    count, width = features.shape
    wide = count <= width
    total, product = torch.zeros_like(shift), torch.zeros(0 if wide else width, width, dtype=torch.float64)
    squares, by_class = torch.zeros_like(shift), torch.zeros(num_classes, width, dtype=torch.float64)
    for start in range(0, count, _ROWS):
        chunk = features[start : start + _ROWS].double() - shift
        total += chunk.sum(dim=0)
        squares += chunk.square().sum(dim=0)
        by_class.index_add_(0, targets[start : start + _ROWS], chunk)
        if not wide:
            product.addmm_(chunk.T, chunk)
    centre = total / count
    deviation = (squares / count - centre.square()).clamp_(min=0).sqrt_()
    size = torch.maximum((shift + centre).abs(), deviation.max())
    scale = torch.where(deviation > _CONSTANT * size, deviation, torch.ones_like(deviation))
    counts = torch.bincount(targets, minlength=num_classes).double()
    by_class = (by_class - counts[:, None] * centre) / scale
    if wide:
        rows = (features.double() - shift - centre) / scale
        energy, axes = torch.linalg.eigh(rows @ rows.T)
        kept = energy > _RANK * energy[-1]
        axes = rows.T @ (axes[:, kept] / energy[kept].sqrt())
    else:
        product = (product - count * torch.outer(centre, centre)) / torch.outer(scale, scale)
        energy, axes = torch.linalg.eigh(product)
        kept = energy > _RANK * energy[-1]
        axes = axes[:, kept]
    return PrincipalAxes(shift + centre, scale, axes, energy[kept], (by_class @ axes).T, counts)
