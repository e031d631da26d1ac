"""Ridge aligner: an affine map between the residual streams of two models, fitted on the same texts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from artifacts.aligner.affine import AffineMap
from artifacts.aligner.axes import PrincipalAxes
from artifacts.aligner.targets import centred_targets
from artifacts.vectors.refusal import require_finite


def fit_ridge(axes: PrincipalAxes, outputs: Tensor, regularisation: float) -> AffineMap:
    """Closed-form ridge regression from the decomposed inputs to the outputs.

    Solves min ||Yc - Xc W||^2 + lambda ||W||^2 with lambda = regularisation * mean squared singular value, so the
    number means the same for every width and number of rows.

    It is the best affine prediction of the target's states, so it keeps what both models hold, at the size that it has
    in the target, and loses what only the expert holds. It cannot map a concept that the mapping texts do not vary.

    Args:
        axes: of the inputs, `num_rows` rows.
        outputs: [num_rows, output_size].
        regularisation: > 0.

    Raises:
        ValueError: target rows that do not pair, are not finite or are all equal.
    """
    centred, output_mean = centred_targets(axes, outputs)
    projected = axes.left.T @ centred
    return AffineMap(axes.mean, output_mean, axes.basis, _shrinkage(axes, regularisation)[:, None] * projected)


def choose_ridge(
    axes: PrincipalAxes, outputs: Tensor, held_inputs: Tensor, held_outputs: Tensor, grid: Sequence[float]
) -> float:
    """The value of `grid` whose map has the best R^2 on held-out pairs (the larger one of equals: less variance).

    The whole grid costs one projection of the pairs; each value only scales its rows.
    """
    require_finite(held_inputs, "held-out expert states")
    require_finite(held_outputs, "held-out target states")
    projected_inputs = (held_inputs.double() - axes.mean) @ axes.basis
    centred, output_mean = centred_targets(axes, outputs)
    projected = axes.left.T @ centred
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


def ridge_penalty(axes: PrincipalAxes, regularisation: float) -> Tensor:
    """lambda: `regularisation` times trace(X^T X) / width, axes that were cut counting as zero."""
    return regularisation * axes.scales.square().sum() / axes.mean.numel()


def _shrinkage(axes: PrincipalAxes, regularisation: float) -> Tensor:
    return axes.scales / (axes.scales.square() + ridge_penalty(axes, regularisation))
