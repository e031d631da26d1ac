"""Principal axes of a set of states, found without a [width, width] matrix when both sides are large."""

from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from artifacts.vectors.refusal import require_finite

# Largest side for which an exact eigendecomposition is cheap: 2048 x 2048 doubles, some seconds on one core.
EXACT_SIDE = 2048
# Eigenvalues below this share of the largest are rounding noise of the squared matrix, not directions of the data.
RELATIVE_FLOOR = 1e-10


@dataclass(frozen=True)
class PrincipalAxes:
    """Centred states X - mean = left * scales @ basis.T, cut to the axes that carry variance.

    Attributes:
        mean: [width], float64.
        basis: [width, rank], float64, orthonormal columns, largest scale first.
        scales: [rank], float64, singular values of the centred states.
        left: [num_rows, rank], float64, orthonormal columns.
    """

    mean: Tensor
    basis: Tensor
    scales: Tensor
    left: Tensor

    @property
    def rank(self) -> int:
        return self.scales.numel()


def principal_axes(states: Tensor, max_rank: int, seed: int = 0, name: str = "states") -> PrincipalAxes:
    """Singular value decomposition of centred states through their smaller side.

    Exact while min(num_rows, width) <= 2048 (the Gram or the covariance matrix, whichever is smaller); above it the
    randomised method of Halko, Martinsson and Tropp (2011) with `max_rank` axes.

    Args:
        states: [num_rows, width], any float dtype.
        max_rank: keep at most this many axes.
        seed: of the randomised method.
        name: of the states, for messages.

    Raises:
        ValueError: fewer than two rows, rows that are not finite, or all rows equal.
    """
    if states.shape[0] < 2:
        raise ValueError(f"{states.shape[0]} row(s) have no principal axes; at least 2 are needed")
    require_finite(states, name)
    rows = states.double()
    mean = rows.mean(0)
    centred = rows - mean
    basis, scales = _axes(centred, max_rank, seed)
    keep = scales > scales[:1] * RELATIVE_FLOOR**0.5
    basis, scales = basis[:, keep][:, :max_rank], scales[keep][:max_rank]
    if scales.numel() == 0:
        raise ValueError(f"{name}: all {states.shape[0]} rows are equal, so they have no principal axes")
    return PrincipalAxes(mean, basis, scales, centred @ basis / scales)


def _axes(centred: Tensor, max_rank: int, seed: int) -> tuple[Tensor, Tensor]:
    num_rows, width = centred.shape
    if min(num_rows, width) > EXACT_SIDE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, scales, basis = torch.svd_lowrank(centred, q=min(max_rank, num_rows, width), niter=4)
        return basis, scales
    if width <= num_rows:
        values, vectors = _largest(centred.T @ centred, max_rank)
        return vectors, values.sqrt()
    values, vectors = _largest(centred @ centred.T, max_rank)
    scales = values.sqrt()
    # Rows of the data carry the axes: basis = X^T U / s. The floor keeps empty axes finite until they are cut.
    return centred.T @ vectors / scales.clamp_min(scales[0] * 1e-12 + 1e-300), scales


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` largest eigenvalues, none below 0, and eigenvectors of a symmetric matrix, largest first."""
    side = len(matrix)
    if matrix.is_cuda or 2 * count > side:
        values, vectors = torch.linalg.eigh(matrix)
    else:
        # LAPACK finds a few eigenvectors in a third of the time of all of them.
        found = scipy.linalg.eigh(matrix.numpy(), subset_by_index=[side - count, side - 1])
        values, vectors = (torch.from_numpy(each.copy()) for each in found)
    return values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
