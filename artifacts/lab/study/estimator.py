"""Ways to fit a direction to a few labelled states."""

from enum import StrEnum
from typing import Final

from torch import Tensor

from artifacts.vectors.coordinates import whitened
from artifacts.vectors.difference import difference_of_means, unit
from artifacts.vectors.logistic import fixed_ridge_probe
from artifacts.vectors.rfm import best_agop, power_iteration

# So few rows cannot tune a ridge strength; 1 is the middle of the tuned grid and was no worse than its neighbours.
_RIDGE: Final = 1.0
_COMPONENTS: Final = 32
_ITERATIONS: Final = 3


class Estimator(StrEnum):
    """How a direction is fitted; `MATCHED` only to labels that a model gave to unlabelled texts."""

    DIFFERENCE = "difference of means"
    LOGISTIC = "logistic"
    RFM = "RFM"
    MATCHED = "matched difference"


def fit_direction(estimator: Estimator, states: Tensor, labels: Tensor, unlabelled: Tensor) -> Tensor:
    """Unit direction [width], float32, towards label 1.

    Args:
        estimator: not `MATCHED`.
        states: [num_rows, width] of the labelled texts; labels: [num_rows], 0 or 1.
        unlabelled: [num_unlabelled, width]; RFM takes its whitened coordinates from them, since a handful of labelled
            rows spans too few.

    Raises:
        ValueError: a class without rows, or states that allow no direction.
    """
    if estimator is Estimator.DIFFERENCE:
        return difference_of_means(states, labels)
    if estimator is Estimator.LOGISTIC:
        return fixed_ridge_probe(states, labels, _RIDGE, states.shape[1]).direction
    coordinates = whitened(unlabelled, _COMPONENTS)
    inputs = coordinates.of(states)
    # No row can be spared for validation, so the iteration is chosen on the rows themselves.
    top = power_iteration(best_agop(inputs, labels, inputs, labels, _ITERATIONS, seed=0))
    direction = unit(coordinates.displacement(top))
    # An eigenvector has no sign. The labelled means give it one, weak as they may be.
    along = float(direction.double() @ difference_of_means(states, labels).double())
    return direction if along >= 0 else -direction
