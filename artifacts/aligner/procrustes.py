"""Procrustes aligner: a rotation and one scale, the stiffest map that pairs can choose."""

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes
from artifacts.aligner.targets import centred_targets

# Singular values of the cross-covariance below this share of the largest belong to axes that share nothing.
_RELATIVE_FLOOR = 1e-10


def fit_procrustes(axes: PrincipalAxes, outputs: Tensor) -> AffineMap:
    """Orthogonal Procrustes with scale between the principal axes of both sides.

    With X the expert's principal coordinates and Yc the centred targets, the rotation is R = P Q^T from the singular
    value decomposition X^T Yc = P D Q^T (Schoenemann, Psychometrika 31, 1966) and the scale is that of least squares,
    trace(D) / ||X R||^2. The right singular vectors lie in the span of the targets, so the principal axes of that side
    need no decomposition of their own. Between unequal sizes R is a partial isometry: it keeps the shared axes as they
    are and drops the others (the usual answer, though not the least squares one where the target is the narrower).

    It has no hyper-parameter and little freedom, so few pairs are enough and permuted pairs hardly fit. What it cannot
    do is stretch: where the models give one latent quantity different weight relative to the others, the mapped
    direction is bent towards the axes that are large in the expert.

    Args:
        axes: of the expert's states, num_rows rows.
        outputs: [num_rows, output_size], the target's states of the same texts.

    Raises:
        ValueError: target rows that do not pair, are not finite or are all equal.
    """
    centred, output_mean = centred_targets(axes, outputs)
    cross = axes.scales[:, None] * (axes.left.T @ centred)
    left, strengths, right = torch.linalg.svd(cross, full_matrices=False)
    keep = strengths > strengths[:1] * _RELATIVE_FLOOR
    rotation = left[:, keep] @ right[keep]
    # The rows of `right` are orthonormal, so ||X R|| is the norm of the coordinates along `left`.
    spread = (axes.scales[:, None] * left[:, keep]).square().sum()
    return AffineMap(axes.mean, output_mean, axes.basis, strengths[keep].sum() / spread * rotation)
