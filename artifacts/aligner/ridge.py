"""Ridge aligner: an affine map between the residual streams of two models, fitted on the same texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes


def fit_ridge(axes: PrincipalAxes, outputs: Tensor, regularisation: float) -> AffineMap:
    """Closed-form ridge regression from the decomposed inputs to the outputs.

    Solves min ||Yc - Xc W||^2 + lambda ||W||^2 with lambda = regularisation * mean squared singular value, so the
    number means the same for every width and number of rows.

    Args:
        axes: of the inputs, `num_rows` rows.
        outputs: [num_rows, output_size].
        regularisation: > 0.
    """
    targets = outputs.double()
    output_mean = targets.mean(0)
    projected = axes.left.T @ (targets - output_mean)
    return AffineMap(axes.mean, output_mean, axes.basis, _shrinkage(axes, regularisation)[:, None] * projected)


def choose_regularisation(
    axes: PrincipalAxes, outputs: Tensor, held_inputs: Tensor, held_outputs: Tensor, grid: Sequence[float]
) -> float:
    """The value of `grid` whose map has the best R^2 on held-out pairs (the larger one of equals: less variance)."""
    projected_inputs = (held_inputs.double() - axes.mean) @ axes.basis
    targets = outputs.double()
    output_mean = targets.mean(0)
    projected = axes.left.T @ (targets - output_mean)
    best = max(
        (
            r_squared(projected_inputs * _shrinkage(axes, value) @ projected + output_mean, held_outputs, output_mean),
            value,
        )
        for value in grid
    )
    return best[1]


def r_squared(predicted: Tensor, actual: Tensor, reference: Tensor) -> float:
    """Share of variance explained, all dimensions together: 1 - ||y - p||^2 / ||y - reference||^2.

    Args:
        predicted, actual: [num_rows, width].
        reference: [width], the mean of the rows that the map was fitted on: what a map that knows nothing predicts.
    """
    truth = actual.double()
    residual = (truth - predicted).square().sum()
    total = (truth - reference).square().sum()
    return float(1 - residual / total.clamp_min(torch.finfo(torch.float64).tiny))


def _shrinkage(axes: PrincipalAxes, regularisation: float) -> Tensor:
    squared = axes.scales.square()
    # One value per input dimension, as trace(X^T X) / width; axes that were cut count as zero.
    penalty = regularisation * squared.sum() / axes.mean.numel()
    return axes.scales / (squared + penalty)
