"""CCA aligner: canonical variates of the expert, shrunk by how far they are shared, lifted to the target's space."""

from typing import Final

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes, principal_axes
from artifacts.aligner.ridge import ridge_penalty
from artifacts.aligner.targets import centred_targets

# Axes of the target; the canonical variates are never more than the narrower side has axes.
_OUTPUT_AXES: Final = 1024


def fit_cca(axes: PrincipalAxes, outputs: Tensor, regularisation: float) -> AffineMap:
    """Canonical correlation analysis with ridge whitening, lifted back to the target's units.

    Both sides are whitened in their principal axes with 1 / sqrt(s^2 + lambda), lambda as in `fit_ridge` (the canonical
    ridge of Vinod, Journal of Econometrics 4, 1976). The whitened cross-covariance P diag(rho) Q^T predicts the
    target's canonical variate j as rho_j times the expert's. Without more that product is ridge regression again, so
    each is shrunk by Breiman and Friedman's factor ("curds and whey", JRSS B 59, 1997, by generalised cross-validation)

        d = (1 - g) (rho^2 - g) / ((1 - g)^2 rho^2 + g^2 (1 - rho^2)),  0 where rho^2 <= g,

    with g the effective degrees of freedom of the whitening per row: a correlation that so many dimensions reach by
    chance counts as none.

    It treats all shared variance alike, however small in either model, and drops what is not shared; it gains on ridge
    where targets have many dimensions of their own. With few rows per dimension it drops weakly shared concepts too.

    Args:
        axes: of the expert's states, num_rows rows.
        outputs: [num_rows, output_size], the target's states of the same texts.
        regularisation: > 0, of both whitenings.

    Raises:
        ValueError: target rows that do not pair, are not finite or are all equal.
    """
    centred_targets(axes, outputs)
    output_axes = principal_axes(outputs, max(axes.rank, _OUTPUT_AXES))
    inputs_norm, outputs_norm = _ridge_norm(axes, regularisation), _ridge_norm(output_axes, regularisation)
    input_share, output_share = axes.scales / inputs_norm, output_axes.scales / outputs_norm
    shared = input_share[:, None] * (axes.left.T @ output_axes.left) * output_share
    left, correlations, right = torch.linalg.svd(shared, full_matrices=False)
    kept = correlations * _shrinkage(correlations, float(input_share.square().sum()) / (len(axes.left) - 1))
    lifted = right * outputs_norm @ output_axes.basis.T
    coefficients = left / inputs_norm[:, None] * kept @ lifted
    return AffineMap(axes.mean, output_axes.mean, axes.basis, coefficients)


def _ridge_norm(axes: PrincipalAxes, regularisation: float) -> Tensor:
    return (axes.scales.square() + ridge_penalty(axes, regularisation)).sqrt()


def _shrinkage(correlations: Tensor, freedom: float) -> Tensor:
    squared = correlations.square().clamp_max(1.0)
    excess = (1 - freedom) * (squared - freedom).clamp_min(0)
    scale = (1 - freedom) ** 2 * squared + freedom**2 * (1 - squared)
    return excess / scale.clamp_min(torch.finfo(torch.float64).tiny)
