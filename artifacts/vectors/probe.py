"""A linear classifier of states: a direction, and the probability of the concept."""

from dataclasses import dataclass

from torch import Tensor

from artifacts.vectors.coordinates import Coordinates
from artifacts.vectors.difference import unit


@dataclass(frozen=True)
class LinearProbe:
    """Log-odds of label 1 that are linear in the states: states @ weight + bias.

    Attributes:
        direction: [width], unit, float32, towards label 1.
        weight: [width], float64.
        bias: log-odds at a state of zero.
    """

    direction: Tensor
    weight: Tensor
    bias: float

    @staticmethod
    def of_coordinates(coordinates: Coordinates, weight: Tensor, bias: float, sign: int) -> "LinearProbe":
        """The probe whose log-odds are z @ weight + bias in coordinates z.

        Args:
            coordinates: rank r.
            weight: [r], float64.
            bias: log-odds at the mean state.
            sign: +1 or -1, turns the direction and leaves the classifier as it is.
        """
        covector = coordinates.covector(weight)
        return LinearProbe(unit(covector * sign), covector, bias - float(coordinates.mean @ covector))

    def log_odds(self, states: Tensor) -> Tensor:
        """Log-odds of label 1 for states [num_rows, width]; [num_rows], float64."""
        return states.double() @ self.weight + self.bias

    def probabilities(self, states: Tensor) -> Tensor:
        """Probability of label 1 for states [num_rows, width]; [num_rows], float64."""
        return self.log_odds(states).sigmoid()
