"""Ridge logistic regression whose ridge strength is tuned on validation rows.

The recipe of RAPTOR (Gao and others, 2026, arXiv 2602.00158): the concept vector is the normalised weight of a
logistic probe with an L2 penalty. The fit happens in principal coordinates with one common scale, where the penalty is
the one of the states themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from artifacts.vectors.coordinates import rotated
from artifacts.vectors.probe import LinearProbe
from artifacts.vectors.refusal import require_classes, require_finite
from artifacts.vectors.score import direction_sign

# Penalty per row: the loss is mean(log-loss) + ridge / 2 * ||weight||^2 at unit mean variance of the coordinates.
RIDGE_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_MAX_STEPS, _TOLERANCE = 5000, 1e-6


@dataclass(frozen=True)
class LogisticFit:
    """A tuned probe.

    Attributes:
        probe: its direction has the sign that the validation rows show.
        ridge: the chosen strength.
        log_losses: mean log-loss of the validation rows by strength, natural logarithm.
    """

    probe: LinearProbe
    ridge: float
    log_losses: dict[float, float]


def fit_logistic(
    states: Tensor,
    labels: Tensor,
    validation_states: Tensor,
    validation_labels: Tensor,
    components: int,
    seed: int = 0,
    sign: int | None = None,
    grid: Sequence[float] = RIDGE_GRID,
) -> LogisticFit:
    """Fit one probe per ridge strength and keep the one with the least validation log-loss.

    Args:
        states: [num_rows, width]; labels: [num_rows], 0 or 1.
        validation_states: [num_validation, width]; validation_labels: choose the strength (the larger of equals) and
            decide the sign.
        components: principal coordinates to fit in, >= 1; fewer when the states have a lower rank.
        seed: of the coordinates where they are found at random.
        sign: of the correlation with the labels, used when the validation rows show none.
        grid: ridge strengths, > 0.

    Raises:
        SignError: the validation rows show no sign and none is given.
        ValueError: states that are not finite, a class without rows, or all rows equal.
    """
    for name, rows, classes in (("states", states, labels), ("validation", validation_states, validation_labels)):
        require_finite(rows, name)
        require_classes(classes)
    coordinates = rotated(states, components, seed)
    inputs, held = coordinates.of(states), coordinates.of(validation_states)
    weights = {ridge: logistic_weights(inputs, labels, ridge) for ridge in grid}
    losses = {ridge: log_loss(held @ weight + bias, validation_labels) for ridge, (weight, bias) in weights.items()}
    ridge = min(losses, key=lambda each: (losses[each], -each))
    weight, bias = weights[ridge]
    return LogisticFit(
        LinearProbe.of_coordinates(coordinates, weight, bias, direction_sign(held @ weight, validation_labels, sign)),
        ridge,
        losses,
    )


def fixed_ridge_probe(states: Tensor, labels: Tensor, ridge: float, components: int, seed: int = 0) -> LinearProbe:
    """A probe with a given ridge strength, for so few rows that none can be spared to tune it.

    Its direction points where its own log-odds of label 1 grow.

    Raises:
        ValueError: states that are not finite, a class without rows, or all rows equal.
    """
    require_finite(states)
    require_classes(labels)
    coordinates = rotated(states, components, seed)
    weight, bias = logistic_weights(coordinates.of(states), labels, ridge)
    return LinearProbe.of_coordinates(coordinates, weight, bias, 1)


def logistic_weights(inputs: Tensor, labels: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Weight [rank], float64, and unpenalised intercept of a ridge logistic regression.

    Args:
        inputs: [num_rows, rank], float64.
        labels: [num_rows], 0 or 1, both present.
        ridge: > 0, relative to the mean log-loss.
    """
    # scikit-learn weighs the summed log-loss with C against ||weight||^2 / 2.
    model = LogisticRegression(C=1 / (ridge * len(inputs)), solver="lbfgs", tol=_TOLERANCE, max_iter=_MAX_STEPS)
    model.fit(inputs.cpu().numpy(), labels.cpu().numpy().astype(np.int64))
    return torch.from_numpy(model.coef_[0].astype(np.float64)).to(inputs.device), float(model.intercept_[0])


def log_loss(log_odds: Tensor, labels: Tensor) -> float:
    """Mean of -log p(label), natural logarithm, for log-odds [num_rows] of label 1."""
    return float(torch.nn.functional.binary_cross_entropy_with_logits(log_odds.double(), labels.double()))
