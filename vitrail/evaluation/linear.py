"""Two linear probes on features in memory: ridge regression in closed form, multinomial logistic regression."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.evaluation.calibration import fit_temperature
from vitrail.evaluation.pca import PrincipalAxes

# Penalties per image that ridge regression tries, in half decades.
GRID = tuple(10 ** (step / 2) for step in range(-12, 5))
TOLERANCE = 1e-4  # largest entry of the gradient at which logistic regression ends, where its curvature is about 1
_LIMIT = 500  # steps of L-BFGS; 20 to 40 are usual
_DOUBLE_BYTES = 1_000_000_000  # coordinates that take more are kept in float32
_SAMPLE = 4096


@dataclass(frozen=True)
class Ridge:
    """Ridge regression to one-hot targets.

    Attributes:
        penalty: the λ with the least leave-one-out error.
        weight, bias: [r, classes] and [classes], on coordinates of a `PrincipalAxes`.
        errors: leave-one-out squared error per image, for each penalty of the grid.
        top1: leave-one-out accuracy, for each penalty of the grid.
    """

    penalty: float
    weight: Tensor
    bias: Tensor
    errors: tuple[float, ...]
    top1: tuple[float, ...]


def fit_ridge(features: Tensor, targets: Tensor, axes: PrincipalAxes) -> Ridge:
    """Fit ridge regression to centred one-hot targets; the exact leave-one-out error chooses the penalty.

    The residual of an image by a fit without it is its residual divided by 1 - h, where h is its leverage 1/N +
    x'(X'X + λ)⁻¹x (Golub, Heath & Wahba 1979, section 1): no fit is repeated, and in the axes of X'X every λ costs one small
    matrix product. Means are refitted with each image left out; the scale of the features is not.
    """
    count, prior = axes.num_rows, axes.counts / axes.num_rows
    shrink = [1 / (axes.energy + step * count) for step in GRID]
    errors, right = torch.zeros(len(GRID), dtype=torch.float64), torch.zeros(len(GRID), dtype=torch.float64)
    for rows, coordinate_rows in axes.project(features):
        answers = F.one_hot(targets[rows], len(prior)).double()
        leverage = 1 / count + coordinate_rows.square() @ torch.stack(shrink, dim=1)
        for number, factor in enumerate(shrink):
            residual = answers - prior - coordinate_rows @ (factor[:, None] * axes.answers)
            residual /= (1 - leverage[:, number, None]).clamp(min=1e-12)
            errors[number] += residual.square().sum()
            right[number] += ((answers - residual).argmax(dim=1) == targets[rows]).sum()
    best = int(errors.argmin())
    weight = shrink[best][:, None] * axes.answers
    return Ridge(GRID[best] * count, weight, prior, tuple((errors / count).tolist()), tuple((right / count).tolist()))


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression.

    Attributes:
        penalty: α, of the mean cross-entropy plus α/2 times the squared weights on standardised features.
        weight, bias: [r, classes] and [classes], on coordinates of a `PrincipalAxes`.
        steps: how often loss and gradient were computed.
        gradient: largest entry of the gradient that was left.
    """

    penalty: float
    weight: Tensor
    bias: Tensor
    steps: int
    gradient: float


def fit_logistic(
    features: Tensor, targets: Tensor, axes: PrincipalAxes, ridge: Ridge, *, penalty: float | None = None
) -> Logistic:
    """Minimise the mean cross-entropy plus penalty/2 times the squared weights, the bias left free, by L-BFGS.

    It starts at the ridge solution. Every axis is scaled by the root of its curvature, p·energy/N + penalty with p the
    variance of a class's probability when all are as likely, so that the problem is nearly round and few steps suffice.

    Args:
        penalty: α; unless given, the ridge's λ/N times p: as strong, measured by the curvature, as the one that the
            leave-one-out error chose.
    """
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    count, (rank, classes) = axes.num_rows, ridge.weight.shape
    variance = (1 - 1 / classes) / classes
    penalty = variance * ridge.penalty / count if penalty is None else penalty
    coordinate_rows = coordinates(features, axes)
    curvature = torch.cat([variance * axes.energy / count + penalty, torch.tensor([variance]).double()])
    scale, rows = curvature.rsqrt()[:, None], torch.arange(count)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = (scale * torch.from_numpy(flat).view(rank + 1, classes)).split([rank, 1])
        log_probabilities = torch.addmm(
            bias.to(coordinate_rows), coordinate_rows, weight.to(coordinate_rows)
        ).log_softmax(dim=1)
        value = -log_probabilities[rows, targets].sum(dtype=torch.float64) / count
        error = log_probabilities.exp_()
        error[rows, targets] -= 1
        by_weight, by_bias = (
            (coordinate_rows.T @ error).double() / count,
            error.sum(dim=0, dtype=torch.float64)[None] / count,
        )
        slope = scale * torch.cat([by_weight + penalty * weight, by_bias])
        return float(value + penalty / 2 * weight.square().sum()), slope.view(-1).numpy()

    start = (torch.cat(as_logits(ridge, coordinate_rows, targets)) / scale).view(-1).numpy()
    options = {"maxiter": _LIMIT, "maxfun": 2 * _LIMIT, "gtol": TOLERANCE, "ftol": 0.0}
    # SciPy's small steps wake a thread pool of their own, whose waiting would take the cores from PyTorch's.
    with threadpool_limits(1, user_api="blas"):
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    weight, bias = (scale * torch.from_numpy(found.x).view(rank + 1, classes)).split([rank, 1])
    return Logistic(penalty, weight, bias[0], int(found.nfev), float(np.abs(found.jac).max()))


def coordinates(features: Tensor, axes: PrincipalAxes) -> Tensor:
    """Return the features along the axes of the spectrum [N, r], float64 where they fit."""
    shape = (len(features), len(axes.energy))
    coordinate_rows = torch.empty(
        shape, dtype=torch.float64 if 8 * shape[0] * shape[1] <= _DOUBLE_BYTES else torch.float32
    )
    for rows, found in axes.project(features):
        coordinate_rows[rows] = found
    return coordinate_rows


def as_logits(ridge: Ridge, coordinate_rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return a ridge solution's weight and bias [1, classes], times the one factor that makes its cross-entropy least."""
    some = slice(None, None, max(1, len(coordinate_rows) // _SAMPLE))
    scores = coordinate_rows[some].double() @ ridge.weight + ridge.bias
    factor = 1 / fit_temperature(scores.numpy(), targets[some].numpy())
    return factor * ridge.weight, factor * ridge.bias[None]
